"""Servers: what they refuse, when a stamp counts, and when a token is replaced."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
from typing import Any

import pytest
from stream_tools import (
    HOST,
    Log,
    Plain,
    RecordingBackend,
    Tokened,
    client_tls,
    connected,
    port_of,
    protecting,
    server_tls,
    serving,
)

import ipsec_aio
from ipsec_aio import Assurance, ProtectionError, Require
from ipsec_aio.errors import BackendDenied, BackendUnavailable
from ipsec_aio.net import listening
from ipsec_aio.net.connection import Connection, Judge
from ipsec_aio.net.terms import Terms

OTHER = "127.0.0.9"
SO_MARK = 36


def no_terms(judge: Judge) -> Terms:
    return Terms(asyncio.get_running_loop(), None, 0, None, judge.refusals)


@contextlib.asynccontextmanager
async def one_connection(backend: Any, source: str = HOST, **options: Any) -> Any:
    """A server, and a connection of it that is up."""
    log = Log()
    made: list[Tokened] = []

    def factory() -> Tokened:
        made.append(Tokened(log))
        return made[-1]

    async with (
        serving(factory, backend, **options) as server,
        connected(port_of(server), source=source),
    ):
        await log.until("made")
        yield server, made[0]


async def epoch_seen() -> None:
    """Let the loop run what a change of epoch has scheduled."""
    for _ in range(3):
        await asyncio.sleep(0)


# Requirements


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_what_is_refused_is_reset_unheard(tls: bool, caplog: Any) -> None:
    caplog.set_level(logging.WARNING)
    unheard = Tokened()
    options: dict[str, Any] = {"ssl": server_tls()} if tls else {}
    theirs: dict[str, Any] = {"ssl": client_tls(), "server_hostname": "x"} if tls else {}
    async with serving(
        lambda: unheard, protecting(), require=Require(encrypted=True), **options
    ) as server:
        for _ in range(3):
            with contextlib.suppress(ConnectionResetError):
                async with connected(port_of(server), source=OTHER, **theirs) as client:
                    [(error,)] = await client.log.until("lost")
                    assert isinstance(error, ConnectionResetError)
        async with connected(port_of(server), **theirs):
            await unheard.log.until("made")
        stats = server.ipsec_stats
    assert (stats.received, stats.refused, stats.protected) == (4, 3, 1)
    assert stats.refused_by == {"encrypted": 3}
    assert unheard.log.kinds[0] == "made"
    assert unheard.log.kinds.count("made") == 1
    [record] = [r for r in caplog.records if r.name == "ipsec_aio.net"]
    assert OTHER in record.getMessage()
    assert "Server" in record.getMessage()


async def test_a_connection_that_falls_short_is_an_error_to_who_opened_it() -> None:
    async with serving(Plain, protecting()) as server:
        unheard = Tokened()
        with pytest.raises(ProtectionError) as caught:
            await ipsec_aio.create_connection(
                lambda: unheard,
                HOST,
                port_of(server),
                backend=protecting(),
                require=Require(assurance=Assurance.EXACT),
            )
        assert caught.value.clause == "assurance"
        assert isinstance(caught.value, PermissionError)
        await epoch_seen()
        assert unheard.log.events == []


async def test_no_backend_and_a_closed_one_are_clear_errors(monkeypatch: Any) -> None:
    monkeypatch.delenv("IPSEC_AIO_BACKEND", raising=False)
    with pytest.raises(BackendUnavailable, match="backend"):
        await ipsec_aio.create_server(Plain, HOST, 0)
    closed = protecting()
    await closed.aclose()
    with pytest.raises(BackendUnavailable, match="closed"):
        await ipsec_aio.create_server(Plain, HOST, 0, backend=closed)
    with pytest.raises(BackendUnavailable, match="closed"):
        await ipsec_aio.create_connection(Plain, HOST, 1, backend=closed)


# Listening


async def test_ports_are_registered_before_listen_and_given_back_after_the_last() -> None:
    backend = protecting()
    listened: list[bool] = []
    sock = socket.socket()
    sock.bind((HOST, 0))

    def look(port: int) -> None:
        assert port == sock.getsockname()[1]
        listened.append(bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)))

    backend.on_register = look
    server_side: Any = Tokened()
    server = await ipsec_aio.create_server(lambda: server_side, sock=sock, backend=backend)
    assert listened == [False]
    [registration] = backend.registrations
    async with connected(port_of(server)):
        await server_side.log.until("made")
        server.close()
        server.close()
        await epoch_seen()
        assert not registration.closed.is_set()
        assert server_side.transport.get_extra_info("ptoken").assurance is Assurance.EXACT
    await server_side.log.until("lost")
    server_side.transport = None
    gc.collect()
    await asyncio.wait_for(registration.closed.wait(), 5)


async def test_an_idle_server_gives_its_ports_back_at_once() -> None:
    backend = protecting()
    server = await ipsec_aio.create_server(Plain, [HOST, OTHER], 0, backend=backend)
    assert len({sock.getsockname()[1] for sock in server.sockets}) == len(backend.registrations)
    server.close()
    await asyncio.gather(*(r.closed.wait() for r in backend.registrations))


async def test_a_port_that_cannot_be_covered_closes_the_server() -> None:
    backend = protecting()

    def deny(port: int) -> None:
        raise BackendDenied("no")

    backend.on_register = deny
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        address = sock.getsockname()
        with pytest.raises(BackendDenied):
            await ipsec_aio.create_server(Plain, sock=sock, backend=backend)
        await epoch_seen()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*address)


async def test_the_servers_own_methods() -> None:
    backend = protecting()
    served = Plain()
    server = await ipsec_aio.create_server(
        lambda: served, HOST, 0, backend=backend, start_serving=False
    )
    assert isinstance(server, asyncio.AbstractServer)
    assert not server.is_serving()
    assert server.get_loop() is asyncio.get_running_loop()
    assert repr(server).startswith("<Server")
    with pytest.raises(AttributeError):
        _ = server.no_such_attribute
    await server.start_serving()
    assert server.is_serving()
    task = asyncio.create_task(server.serve_forever())
    async with connected(port_of(server)):
        await served.log.until("made")
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not server.is_serving()
    assert not server.sockets
    await server.wait_closed()
    await served.log.until("lost")
    served.transport = None
    gc.collect()
    await asyncio.wait_for(backend.registrations[0].closed.wait(), 5)
    async with await ipsec_aio.create_server(Plain, HOST, 0, backend=backend) as other:
        assert other.is_serving()
    assert not other.is_serving()


async def test_a_socket_that_listened_before_is_in_doubt() -> None:
    log = Log()
    sock = socket.create_server((HOST, 0))
    server = await ipsec_aio.create_server(lambda: Tokened(log), sock=sock, backend=protecting())
    async with connected(port_of(server)):
        [(token, _)] = await log.until("made")
    assert token.assurance is Assurance.UNKNOWN
    assert "listening before" in repr(token)
    server.close()


async def test_a_marked_listener_is_in_doubt() -> None:
    with socket.socket() as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_MARK, 0)
        except PermissionError:
            pytest.skip("marks cannot be set here")
    log = Log()
    sock = socket.socket()
    sock.bind((HOST, 0))
    server = await ipsec_aio.create_server(lambda: Tokened(log), sock=sock, backend=protecting())
    with socket.socket(fileno=_dup(server.sockets[0])) as same:
        same.setsockopt(socket.SOL_SOCKET, SO_MARK, 0x1001)
        async with connected(port_of(server)):
            [(token, _)] = await log.until("made")
        assert token.assurance is Assurance.UNKNOWN
        assert "mark of its own" in repr(token)
        same.setsockopt(socket.SOL_SOCKET, SO_MARK, 0)
        async with connected(port_of(server)):
            (token, _) = (await log.until("made", 2))[1]
        assert token.assurance is Assurance.EXACT
    server.close()


def _dup(sock: Any) -> int:
    return os.dup(sock.fileno())


async def test_an_mptcp_listener_is_in_doubt() -> None:
    try:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
    except OSError:
        pytest.skip("this kernel has no MPTCP")
    sock.bind((HOST, 0))
    log = Log()
    try:
        server = await ipsec_aio.create_server(
            lambda: Tokened(log), sock=sock, backend=protecting()
        )
    except OSError:
        sock.close()
        pytest.skip("the loop takes no MPTCP socket")
    async with connected(port_of(server)):
        [(token, _)] = await log.until("made")
    assert token.assurance is Assurance.UNKNOWN
    assert "plain TCP" in repr(token)
    server.close()


async def test_another_namespace_is_in_doubt() -> None:
    backend = protecting()
    backend.cookie = 1
    async with one_connection(backend) as (server, protocol):
        [(token, _)] = protocol.log.of("made")
        assert token.assurance is Assurance.UNKNOWN
        assert "namespace" in repr(token)
        transport, client = await ipsec_aio.create_connection(
            Tokened, HOST, port_of(server), backend=backend
        )
        assert "namespace" in repr(transport.get_extra_info("ptoken"))
        transport.abort()
        await client.log.until("lost")


async def test_decrypted_fragments_keep_streams_in_doubt() -> None:
    backend = protecting()
    server = await ipsec_aio.create_server(Tokened, HOST, 0, backend=backend)
    backend.registrations[0].fragments = True
    async with connected(port_of(server)) as client:
        transport = client.transport
        await epoch_seen()
        assert transport is not None
    assert any("fragments" in evidence.doubt for evidence in backend.evidence)
    server.close()


async def test_the_mark_is_read_where_it_can_mean_something() -> None:
    backend = protecting()
    async with one_connection(backend) as (server, protocol):
        assert [e.mark for e in _accepted(backend)] == [None]
        backend.registrations[0].marks = True
        async with connected(port_of(server)):
            await protocol.log.until("made", 2)
        last = _accepted(backend)[-1]
        assert (last.mark, last.generation) == (0, backend.registrations[0].generation)


def _accepted(backend: RecordingBackend) -> list[Any]:
    return [evidence for evidence in backend.evidence if evidence.local_port]


async def test_a_unix_socket_has_a_token_that_knows_nothing(tmp_path: Any) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(tmp_path / "s"))
    log = Log()
    backend = protecting()
    server = await ipsec_aio.create_server(lambda: Tokened(log), sock=sock, backend=backend)
    assert backend.registrations == []
    _, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
    [(token, _)] = await log.until("made")
    assert token.assurance is Assurance.UNKNOWN
    writer.close()
    await writer.wait_closed()
    await log.until("lost")
    server.close()


async def test_ipv6_and_mapped_addresses() -> None:
    backend = RecordingBackend()
    backend.add_sa(src=HOST, dst=HOST)
    log = Log()
    sock = socket.socket(socket.AF_INET6)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", 0))
    server = await ipsec_aio.create_server(lambda: Tokened(log), sock=sock, backend=backend)
    async with connected(port_of(server)):
        [(token, _)] = await log.until("made")
    assert token.assurance is Assurance.EXACT
    server.close()


# Time


async def test_a_lost_stamp_ends_what_rests_on_it_and_heals(monkeypatch: Any) -> None:
    backend = protecting()
    async with one_connection(backend) as (server, protocol):
        transport = protocol.transport
        [(first, _)] = protocol.log.of("made")
        backend.lose_stamp()
        await epoch_seen()
        second = transport.get_extra_info("ptoken")
        assert second.assurance is Assurance.UNKNOWN
        assert "stamp was lost" in repr(second)
        assert first.protected, "a token that was handed out stays what it is"
        backend.restore_stamp()
        await epoch_seen()
        assert transport.get_extra_info("ptoken").assurance is Assurance.UNKNOWN
        async with connected(port_of(server)):
            (early, _) = (await protocol.log.until("made", 2))[1]
            assert early.assurance is Assurance.UNKNOWN
            assert "from before" in repr(early)
        monkeypatch.setattr(listening, "SETTLE", 0.0)
        async with connected(port_of(server)):
            (healed, _) = (await protocol.log.until("made", 3))[2]
            assert healed.assurance is Assurance.EXACT


async def test_changes_of_sas_leave_an_accepted_connection_alone() -> None:
    backend = protecting()
    [sa] = backend._sas.values()
    async with one_connection(backend) as (_, protocol):
        [(token, _)] = protocol.log.of("made")
        backend.rekey(sa, spi=0x2002)
        backend.delete_sa(sa)
        await epoch_seen()
        backend.flush_sas()
        await epoch_seen()
        backend.lose_events()
        await epoch_seen()
        assert protocol.transport.get_extra_info("ptoken") is token
        assert token.protected


async def test_an_inferred_connection_follows_the_policies_but_never_up() -> None:
    now = 100.0
    backend = RecordingBackend()
    backend.clock = lambda: now
    backend.resolver.clock = lambda: now
    backend.resolver.is_own = lambda address: False
    backend.lose_stamp()
    policy = backend.add_policy(src=OTHER, dst=HOST)
    now += 60
    async with one_connection(backend, OTHER) as (server, protocol):
        transport = protocol.transport
        assert transport.get_extra_info("ptoken").assurance is Assurance.POLICY
        backend.lose_events()
        await epoch_seen()
        assert transport.get_extra_info("ptoken").assurance is Assurance.UNKNOWN
        backend.recover()
        now += 60
        backend.set_default("allow")
        await epoch_seen()
        assert transport.get_extra_info("ptoken").assurance is Assurance.POLICY
        backend.delete_policy(policy)
        await epoch_seen()
        assert transport.get_extra_info("ptoken").assurance is Assurance.NONE
        async with connected(port_of(server), source=OTHER):
            (clear, _) = (await protocol.log.until("made", 2))[1]
            assert clear.assurance is Assurance.NONE
            backend.add_policy(src=OTHER, dst=HOST)
            now += 60
            backend.set_default("allow")
            await epoch_seen()
            assert transport.get_extra_info("ptoken").assurance is Assurance.POLICY


async def test_a_connection_that_began_in_clear_never_claims_a_later_policy() -> None:
    now = 100.0
    backend = RecordingBackend()
    backend.clock = lambda: now
    backend.resolver.clock = lambda: now
    backend.resolver.is_own = lambda address: False
    backend.lose_stamp()
    async with one_connection(backend, OTHER) as (_, protocol):
        [(token, _)] = protocol.log.of("made")
        assert token.assurance is Assurance.NONE
        backend.add_policy(src=OTHER, dst=HOST)
        now += 60
        backend.set_default("allow")
        await epoch_seen()
        assert protocol.transport.get_extra_info("ptoken").assurance <= Assurance.NONE


async def test_a_connection_made_during_a_resync_recovers() -> None:
    backend = RecordingBackend()
    backend.lose_stamp()
    backend.lose_events()
    async with one_connection(backend, OTHER) as (_, protocol):
        assert protocol.transport.get_extra_info("ptoken").assurance is Assurance.UNKNOWN
        backend.recover()
        await epoch_seen()
        assert protocol.transport.get_extra_info("ptoken").assurance is Assurance.NONE


async def test_a_closed_backend_leaves_its_connections_unknown() -> None:
    backend = protecting()
    async with one_connection(backend) as (server, protocol):
        await backend.aclose()
        await epoch_seen()
        token = protocol.transport.get_extra_info("ptoken")
        assert token.assurance is Assurance.UNKNOWN
        assert "closed" in repr(token)
        async with connected(port_of(server)):
            (late, _) = (await protocol.log.until("made", 2))[1]
            assert late.assurance is Assurance.UNKNOWN


async def test_a_subscription_ends_with_its_last_connection() -> None:
    backend = protecting()
    async with one_connection(backend):
        assert len(backend._subscribers) == 2, "its server's, and its own"
    gc.collect()
    await epoch_seen()
    gc.collect()
    await epoch_seen()
    assert not backend._subscribers


# What sockets can do meanwhile


async def test_a_socket_that_cannot_be_examined_is_in_doubt() -> None:
    backend = protecting()
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        registration: Any = await backend.register(6, sock.getsockname()[1])
        listener = listening.Listener(loop, backend, registration, [sock])
        registration.marks = True
        closed = socket.socket()
        closed.close()
        assert "cannot be examined" in listening.unfitness(closed, backend)
        assert listener.read(0, 1) == (0, registration.generation, "")
        assert listener.read(None, 1)[2] == "the mark cannot be read"
    assert listener.read(0, 2)[2] == "the listening socket has a mark of its own"


@pytest.mark.parametrize(
    ("face", "reason"),
    [
        ("gone on uvloop", "cannot be examined"),
        ("closed", "no listener of ours"),
        ("unix", "not an IP socket"),
        ("none", "not an IP socket"),
    ],
)
async def test_a_connection_whose_socket_cannot_be_examined_is_in_doubt(
    face: str, reason: str
) -> None:
    backend = protecting()
    judge = Judge.of(asyncio.get_running_loop(), backend)
    one, other = socket.socketpair()
    closed = socket.socket()
    closed.close()

    class Gone:
        def fileno(self) -> int:
            return -1

    faces = {"gone on uvloop": Gone(), "closed": closed, "unix": one, "none": None}

    class Lost(asyncio.Transport):
        def get_extra_info(self, name: str, default: Any = None) -> Any:
            return faces[face] if name == "socket" else (HOST, 1)

    with one, other:
        token = Connection(judge, no_terms(judge), {}).made(Lost())
    assert token.assurance is Assurance.UNKNOWN
    assert reason in repr(token)


async def test_a_closed_backend_makes_every_socket_unfit() -> None:
    class Closed(RecordingBackend):
        @property
        def netns_cookie(self) -> int | None:
            raise BackendUnavailable("closed")

    with socket.socket() as sock:
        assert listening.unfitness(sock, Closed()) == "the backend is closed"


async def test_a_port_that_no_listener_has_is_in_doubt() -> None:
    backend = protecting()
    judge = Judge.of(asyncio.get_running_loop(), backend)
    async with serving(Plain, backend) as server, connected(port_of(server)) as client:
        stray = Connection(judge, no_terms(judge), {})
        token = stray.made(client.transport)
        assert token.assurance is Assurance.UNKNOWN
        assert "no listener" in repr(token)


async def test_a_duplicate_of_its_socket_keeps_no_news_from_a_connection() -> None:
    backend = protecting()
    judge = Judge.of(asyncio.get_running_loop(), backend)
    async with one_connection(backend) as (_, protocol):
        stray = Connection(judge, no_terms(judge), None)
        stray.made(protocol.transport)
        del stray
        assert protocol.transport.get_extra_info("ptoken").assurance is Assurance.EXACT
        backend.lose_stamp()
        await epoch_seen()
        assert protocol.transport.get_extra_info("ptoken").assurance is Assurance.UNKNOWN
