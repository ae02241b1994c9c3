"""Datagrams come with the token of their own packet; nothing else about asyncio changes."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any

import pytest
from datagram_tools import HERE, Plain, Tokened, close, memory, until

import ipsec_aio
from ipsec_aio import Assurance, Require, create_datagram_endpoint, current_ptoken
from ipsec_aio.net import refusals
from ipsec_aio.net.stats import IPsecStats

pytestmark = pytest.mark.usefixtures("way")


async def pair(backend: Any, server: Any = Tokened, **options: Any) -> tuple[Any, Any, Any, Any]:
    """A server on 127.0.0.1 and a client that is connected to it."""
    transport, protocol = await create_datagram_endpoint(server, HERE, backend=backend, **options)
    there = transport.get_extra_info("sockname")
    client, other = await create_datagram_endpoint(Tokened, remote_addr=there, backend=backend)
    return transport, protocol, client, other


async def test_each_datagram_carries_its_channels_token() -> None:
    transport, protocol, client, _ = await pair(memory())
    client.sendto(b"one")
    client.sendto(b"two")
    (one, two) = await protocol.log.until("data", 2)
    assert one[:2] == (b"one", client.get_extra_info("sockname"))
    assert one[2].protected
    assert one[2].assurance is Assurance.EXACT
    assert two[2] is one[2]
    await close(transport, client)


async def test_clear_traffic_is_known_to_be_clear() -> None:
    transport, protocol, client, _ = await pair(ipsec_aio.MemoryBackend())
    client.sendto(b"clear")
    ((_, _, token),) = await protocol.log.until("data")
    assert not token.protected
    assert token.assurance is Assurance.NONE
    await close(transport, client)


async def test_two_peers_of_one_socket_have_two_tokens() -> None:
    backend = memory()
    transport, protocol, client, _ = await pair(backend)
    there = transport.get_extra_info("sockname")
    other, _ = await create_datagram_endpoint(Tokened, ("127.0.0.2", 0), there, backend=backend)
    client.sendto(b"protected")
    other.sendto(b"clear")
    said = {data: token.protected for data, _, token in await protocol.log.until("data", 2)}
    assert said == {b"protected": True, b"clear": False}
    await close(transport, client, other)


async def test_connection_made_has_a_token_only_where_there_is_a_peer() -> None:
    transport, protocol, client, other = await pair(memory())
    assert protocol.log.events[0] == ("made", None)
    ((token,),) = other.log.of("made")
    assert isinstance(token, ipsec_aio.PToken)
    assert not token.protected
    assert transport.get_extra_info("ptoken") is None
    assert transport.get_extra_info("ptoken", 1) == 1
    assert isinstance(client.get_extra_info("ptoken"), ipsec_aio.PToken)
    await close(transport, client)


async def test_a_connected_socket_resolves_each_datagram() -> None:
    backend = memory()
    transport, protocol, client, other = await pair(backend)
    client.sendto(b"ping")
    ((_, addr, _),) = await protocol.log.until("data")
    transport.sendto(b"protected", addr)
    await other.log.until("data")
    backend.flush_sas()
    transport.sendto(b"clear", addr)
    before, after = await other.log.until("data", 2)
    assert (before[2].protected, after[2].protected) == (True, False)
    await close(transport, client)


async def test_changes_of_the_tables_reach_the_next_datagram() -> None:
    backend = memory()
    transport, protocol, client, _ = await pair(backend)
    said: list[Assurance] = []
    changes: list[Callable[[], None]] = [lambda: None, backend.lose_events, backend.recover]
    for change in (*changes, backend.flush_sas):
        change()
        client.sendto(b"x")
        said.append((await protocol.log.until("data", len(said) + 1))[-1][2].assurance)
    assert said == [Assurance.EXACT, Assurance.UNKNOWN, Assurance.EXACT, Assurance.NONE]
    await close(transport, client)


async def test_a_backend_closed_under_an_endpoint_makes_everything_unknown() -> None:
    backend = memory()
    transport, protocol, client, other = await pair(backend, require=Require(integrity=True))
    client.sendto(b"known")
    await protocol.log.until("data")
    await backend.aclose()
    client.sendto(b"unknown")
    ((_, error),) = await protocol.log.until("refused")
    assert error.clause == "integrity"
    addr = client.get_extra_info("sockname")
    transport.sendto(b"back", addr)
    ((_, _, token),) = await other.log.until("data")
    assert token.assurance is Assurance.UNKNOWN
    assert "closed" in token.audit_string
    assert client.get_extra_info("ptoken").assurance is Assurance.UNKNOWN
    await close(transport, client)


async def test_plain_protocols_are_taken_unchanged() -> None:
    transport, protocol, client, _ = await pair(memory(), server=Plain)
    client.sendto(b"plain")
    ((data, addr),) = await protocol.log.until("data")
    assert (data, addr) == (b"plain", client.get_extra_info("sockname"))
    await close(transport, client)


class NotADatagramProtocol(asyncio.Protocol):
    """What counts is the methods: pyrad's server derives from the wrong class."""

    def __init__(self) -> None:
        self.got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.got.set_result(data)


class Duck:
    """Not derived from anything."""

    def __init__(self) -> None:
        self.got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        pass

    def connection_lost(self, exc: Exception | None) -> None:
        pass

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.got.set_result(data)


@pytest.mark.parametrize("factory", [NotADatagramProtocol, Duck])
async def test_what_counts_is_the_methods(factory: Any) -> None:
    transport, protocol, client, _ = await pair(memory(), server=factory)
    client.sendto(b"x")
    assert await asyncio.wait_for(protocol.got, 5) == b"x"
    transport.close()
    await close(client)


async def test_set_protocol_judges_anew() -> None:
    transport, first, client, _ = await pair(memory(), server=Plain)
    second = Tokened()
    client.sendto(b"1")
    await first.log.until("data")
    transport.set_protocol(second)
    assert transport.get_protocol() is second
    client.sendto(b"2")
    ((_, _, token),) = await second.log.until("data")
    assert token.protected
    transport.set_protocol(first)
    client.sendto(b"3")
    assert [data for data, _ in await first.log.until("data", 2)] == [b"1", b"3"]
    await close(transport, client)


class Contexts(Tokened):
    """Looks at current_ptoken() from everywhere."""

    def connection_made(self, transport: Any, ptoken: Any) -> None:
        self.tasks = [asyncio.ensure_future(self.later("made"))]
        self.log.note("seen in made", current_ptoken())
        super().connection_made(transport, ptoken)

    def datagram_received(self, data: bytes, addr: Any, ptoken: Any) -> None:
        self.log.note("seen", current_ptoken())
        self.tasks.append(asyncio.ensure_future(self.later(data)))
        super().datagram_received(data, addr, ptoken)

    async def later(self, what: object) -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self.log.note("later", what, current_ptoken())


async def test_current_ptoken_is_the_datagrams_also_in_its_tasks() -> None:
    backend = memory()
    transport, protocol, client, _ = await pair(backend, server=Contexts)
    there = transport.get_extra_info("sockname")
    other, _ = await create_datagram_endpoint(Tokened, ("127.0.0.2", 0), there, backend=backend)
    client.sendto(b"protected")
    other.sendto(b"clear")
    got = {data: token for data, _, token in await protocol.log.until("data", 2)}
    later = dict(await protocol.log.until("later", 3))
    assert later == got | {"made": None}
    assert [token for (token,) in protocol.log.of("seen")] == list(got.values())
    assert current_ptoken() is None
    await close(transport, client, other)


async def test_what_a_wake_up_looks_at_is_nobodys() -> None:
    """A backend's news are told in the reader's context, which the last datagram's was."""
    backend = memory()
    transport, protocol, client, _ = await pair(backend)
    seen: list[object] = []
    unsubscribe = backend.subscribe(lambda: seen.append(current_ptoken()))
    for count in range(1, 20):
        client.sendto(b"x")
        await protocol.log.until("data", 2 * count - 1)
        backend.mirror.bump()
        client.sendto(b"y")
        await until(lambda count=count: len(seen) >= count)
        await protocol.log.until("data", 2 * count)
    assert set(seen) == {None}
    unsubscribe()
    await close(transport, client)


async def test_news_of_a_backend_that_a_datagram_has_opened_are_nobodys_either() -> None:
    outer = memory()
    transport, protocol, client, _ = await pair(outer)
    there = transport.get_extra_info("sockname")
    opened: list[tuple[ipsec_aio.MemoryBackend, object]] = []
    seen: list[object] = []

    class Opening(Tokened):
        def datagram_received(self, data: bytes, addr: Any, ptoken: Any) -> None:
            backend = memory()
            opened.append((backend, backend.subscribe(lambda: seen.append(current_ptoken()))))
            super().datagram_received(data, addr, ptoken)

    transport.set_protocol(opening := Opening())
    client.sendto(b"x", there)
    await opening.log.until("data")
    ((backend, unsubscribe),) = opened
    for turn in range(1, 4):
        backend.mirror.bump()
        backend.drain()
        await until(lambda turn=turn: len(seen) == turn)
    assert set(seen) == {None}
    unsubscribe()
    transport.set_protocol(protocol)
    await close(transport, client)


async def test_current_ptoken_of_a_connected_socket() -> None:
    backend = memory()
    transport, _, client, _ = await pair(backend)
    there = transport.get_extra_info("sockname")
    connected, protocol = await create_datagram_endpoint(
        Contexts, remote_addr=there, backend=backend
    )
    ((token,),) = protocol.log.of("seen in made")
    assert token is protocol.log.of("made")[0][0]
    assert (await protocol.log.until("later"))[0][1] is token
    await close(transport, client, connected)


class TestRequire:
    async def test_refused_datagrams_are_dropped_and_counted(self) -> None:
        backend = memory()
        transport, protocol, client, _ = await pair(backend, require=Require(encrypted=True))
        there = transport.get_extra_info("sockname")
        other, _ = await create_datagram_endpoint(Tokened, ("127.0.0.2", 0), there, backend=backend)
        other.sendto(b"clear")
        ((addr, error),) = await protocol.log.until("refused")
        client.sendto(b"protected")
        assert [data for data, _, _ in await protocol.log.until("data")] == [b"protected"]
        assert addr == other.get_extra_info("sockname")
        assert isinstance(error, ipsec_aio.ProtectionError)
        assert error.clause == "encrypted"
        assert transport.ipsec_stats == IPsecStats(2, 1, 0, 1, {"encrypted": 1})
        await close(transport, client, other)
        assert transport.ipsec_stats.refused == 1

    async def test_a_snapshot_does_not_change(self) -> None:
        transport, protocol, client, _ = await pair(memory(), require=Require(encrypted=True))
        before = transport.ipsec_stats
        client.sendto(b"x")
        await protocol.log.until("data")
        assert before == IPsecStats()
        assert transport.ipsec_stats.received == 1
        with pytest.raises(TypeError):
            before.refused_by["x"] = 1
        await close(transport, client)

    async def test_a_flood_is_counted_but_told_and_logged_now_and_then(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        backend = memory()
        transport, protocol, client, _ = await pair(backend, require=Require(integrity=True))
        there = transport.get_extra_info("sockname")
        other, _ = await create_datagram_endpoint(Tokened, ("127.0.0.2", 0), there, backend=backend)
        with caplog.at_level(logging.WARNING, "ipsec_aio"):
            for _ in range(100):
                other.sendto(b"clear")
            client.sendto(b"protected")
            await protocol.log.until("data")
        assert transport.ipsec_stats.refused_by == {"integrity": 100}
        assert len(protocol.log.of("refused")) == refusals.TOLD_PER_SECOND
        assert len(caplog.records) == 1
        assert "127.0.0.2" in caplog.text
        await close(transport, client, other)

    async def test_plain_protocols_are_guarded_too(self) -> None:
        backend = ipsec_aio.MemoryBackend()
        transport, protocol, client, _ = await pair(
            backend, server=Plain, require=Require(assurance=Assurance.EXACT)
        )
        client.sendto(b"clear")
        await until(lambda: transport.ipsec_stats.refused)
        assert not protocol.log.of("data")
        await close(transport, client)

    async def test_an_error_in_datagram_refused_goes_to_the_loops_handler(self) -> None:
        class Failing(Tokened):
            def datagram_refused(self, addr: Any, error: Any) -> None:
                raise ZeroDivisionError

        reports: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, report: reports.append(report))
        transport, _, client, _ = await pair(
            ipsec_aio.MemoryBackend(), server=Failing, require=Require(encrypted=True)
        )
        client.sendto(b"clear")
        await until(lambda: reports)
        assert isinstance(reports[0]["exception"], ZeroDivisionError)
        await close(transport, client)

    async def test_require_must_be_a_require(self) -> None:
        with pytest.raises(TypeError, match="Require"):
            await pair(memory(), require=True)


@pytest.mark.parametrize(
    ("local", "target", "source"),
    [
        (("::1", 0), "::1", "::1"),
        (("::", 0), "::1", "::1"),
        (("0.0.0.0", 0), "127.0.0.1", "127.0.0.1"),
        (("::", 0), "127.0.0.1", "::ffff:127.0.0.1"),
    ],
)
async def test_families_wildcards_and_dual_stack(local: Any, target: str, source: str) -> None:
    backend = memory()
    with socket.socket(
        socket.AF_INET6 if ":" in local[0] else socket.AF_INET, socket.SOCK_DGRAM
    ) as sock:
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(local)
        transport, protocol = await create_datagram_endpoint(
            Tokened, sock=sock.dup(), backend=backend
        )
    port = transport.get_extra_info("sockname")[1]
    client, _ = await create_datagram_endpoint(Tokened, remote_addr=(target, port), backend=backend)
    client.sendto(b"x")
    ((_, addr, token),) = await protocol.log.until("data")
    assert addr[:2] == (source, client.get_extra_info("sockname")[1])
    assert len(addr) == (4 if ":" in local[0] else 2)
    assert token.assurance is Assurance.EXACT
    await close(transport, client)
