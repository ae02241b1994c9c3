"""The small parts that transports share."""

from __future__ import annotations

import asyncio
import contextvars
import socket
from typing import Any

import pytest

import ipsec_aio
from ipsec_aio.evidence import Evidence
from ipsec_aio.kernel.sockopts import socket_cookie
from ipsec_aio.net import registry
from ipsec_aio.net.context import TokenCell, current, current_ptoken
from ipsec_aio.net.protocols import check_protocol, takes_token
from ipsec_aio.net.refusals import LOG_INTERVAL, TOLD_PER_SECOND, Refusals
from ipsec_aio.net.stats import Counters, IPsecStats
from ipsec_aio.tokens import PToken


def token(doubt: str = "for the test") -> PToken:
    return ipsec_aio.MemoryBackend().resolve(Evidence(17, b"", 0, b"", 0, doubt=doubt))


class TestContext:
    def test_there_is_none(self) -> None:
        assert current_ptoken() is None

    def test_a_cell_is_set_for_a_call_and_taken_back(self) -> None:
        one, two = TokenCell(token()), TokenCell(token())

        def inside(factor: int, *, plus: int) -> tuple[PToken | None, PToken | None, int]:
            return current_ptoken(), two.run(current_ptoken), factor + plus

        assert one.run(inside, 1, plus=2) == (one.ptoken, two.ptoken, 3)
        assert current_ptoken() is None
        with pytest.raises(ZeroDivisionError):
            one.run(lambda: 1 / 0)
        assert current_ptoken() is None

    def test_what_a_cell_holds_can_be_replaced_for_every_context(self) -> None:
        cell = TokenCell()
        context = contextvars.copy_context()
        context.run(current.set, cell)
        copied = context.copy()
        assert copied.run(current_ptoken) is None
        cell.ptoken = token()
        assert copied.run(current_ptoken) is cell.ptoken
        assert context.run(current_ptoken) is cell.ptoken


class Connected:
    """A connection whose transport has this socket."""

    def __init__(self, sock: socket.socket | None) -> None:
        self.cookie: int | None = None
        self.transport: Any = self if sock is not None else None
        self._sock = sock

    def get_extra_info(self, name: str) -> socket.socket | None:
        assert name == "socket"
        return self._sock


class TestRegistry:
    def test_a_socket_is_known_by_whatever_names_it(self) -> None:
        with socket.socket() as sock, socket.socket() as other, sock.dup() as same:
            connection: Any = Connected(sock)
            registry.remember(connection)
            assert registry.recall(same) is connection
            assert registry.recall(same) is connection
            assert registry.recall(other) is None
            assert connection in registry.living()
            registry.forget(connection)
            registry.forget(connection)
            assert registry.recall(sock) is None
            assert connection not in registry.living()

    def test_two_connections_of_one_socket_do_not_hide_each_other(self) -> None:
        with socket.socket() as sock:
            one: Any = Connected(sock)
            two: Any = Connected(sock)
            registry.remember(one)
            registry.remember(two)
            assert registry.recall(sock) is two
            assert {one, two} <= set(registry.living())
            registry.forget(one)
            assert registry.recall(sock) is two
            assert one not in registry.living()
            assert two in registry.living()
            registry.forget(two)
            assert registry.recall(sock) is None

    def test_a_connection_that_is_gone_is_nobodys(self) -> None:
        with socket.socket() as sock:
            gone: Any = Connected(sock)
            registry.remember(gone)
            assert registry.recall(sock) is gone
            number = id(gone)
            gone.transport = None
            del gone
            assert registry.recall(sock) is None
            assert None not in registry.living()
            other: Any = Connected(sock)
            other.cookie = socket_cookie(sock)
            registry.forget(other)
            assert other.cookie not in registry._numbered
            registry._living.pop(number, None)

    def test_whose_socket_is_not_to_be_had_is_not_found_by_it(self) -> None:
        closed = socket.socket()
        closed.close()
        early: Any = Connected(None)
        late: Any = Connected(closed)
        other: Any = Connected(None)
        other.transport = other
        with socket.socket() as sock:
            for connection in (early, late, other):
                registry.remember(connection)
            assert registry.recall(sock) is None
            early.transport, early._sock = early, sock
            assert registry.recall(sock) is early
        for connection in (early, late, other):
            registry.forget(connection)

    def test_a_closed_socket_is_nobodys(self) -> None:
        sock = socket.socket()
        sock.close()
        assert registry.recall(sock) is None


class TestRefusals:
    error = ipsec_aio.ProtectionError("encrypted", "it was clear")

    def test_all_are_counted_and_some_are_told(self, caplog: pytest.LogCaptureFixture) -> None:
        counters = Counters()
        refusals = Refusals(counters)
        told = [refusals.add("endpoint", "peer", self.error, 100.0) for _ in range(50)]
        assert told == [True] * TOLD_PER_SECOND + [False] * (50 - TOLD_PER_SECOND)
        assert refusals.add("endpoint", "peer", self.error, 101.0)
        assert counters.snapshot() == IPsecStats(refused=51, refused_by={"encrypted": 51})
        assert len(caplog.records) == 1
        refusals.add("endpoint", "other", self.error, 100.0 + LOG_INTERVAL)
        assert [record.getMessage() for record in caplog.records] == [
            "'endpoint' refused 1 since the last report; now 'peer': encrypted: it was clear",
            "'endpoint' refused 51 since the last report; now 'other': encrypted: it was clear",
        ]

    def test_clauses_are_told_apart(self) -> None:
        counters = Counters()
        refusals = Refusals(counters)
        refusals.add("", "", self.error, 0.0)
        refusals.add("", "", ipsec_aio.ProtectionError("assurance", ""), 0.0)
        assert counters.snapshot().refused_by == {"encrypted": 1, "assurance": 1}


class TestProtocols:
    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            (ipsec_aio.Protocol, asyncio.Protocol),
            (ipsec_aio.BufferedProtocol, asyncio.BufferedProtocol),
            (ipsec_aio.DatagramProtocol, asyncio.DatagramProtocol),
        ],
    )
    def test_loops_and_libraries_take_them_for_what_they_are(self, ours: Any, theirs: Any) -> None:
        assert isinstance(ours(), theirs)
        assert takes_token(ours())
        assert not takes_token(theirs())
        assert not hasattr(ours(), "__dict__")

    def test_a_buffered_protocol_brings_its_buffer(self) -> None:
        with pytest.raises(NotImplementedError):
            ipsec_aio.BufferedProtocol().get_buffer(-1)

    def test_defaults_do_nothing(self) -> None:
        transport: Any = object()
        stream, datagram = ipsec_aio.Protocol(), ipsec_aio.DatagramProtocol()
        stream.connection_made(transport, token())
        stream.data_received(b"")
        assert not stream.eof_received()
        stream.pause_writing()
        stream.resume_writing()
        stream.connection_lost(None)
        datagram.connection_made(transport, None)
        datagram.datagram_received(b"", None, token())
        datagram.error_received(OSError())
        datagram.datagram_refused(None, TestRefusals.error)
        buffered = ipsec_aio.BufferedProtocol()
        buffered.connection_made(transport, token())
        buffered.buffer_updated(0)
        assert not buffered.eof_received()

    def test_one_class_can_be_several(self) -> None:
        class Both(ipsec_aio.Protocol, ipsec_aio.DatagramProtocol):
            def connection_made(self, transport: Any, ptoken: Any) -> None:
                pass

        assert isinstance(Both(), asyncio.Protocol)
        assert isinstance(Both(), asyncio.DatagramProtocol)

    def test_what_is_no_protocol(self) -> None:
        check_protocol(asyncio.Protocol())
        with pytest.raises(TypeError, match="no connection_made"):
            check_protocol(3)
        with pytest.raises(TypeError, match="not an instance"):
            check_protocol(asyncio.Protocol)
