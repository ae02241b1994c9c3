"""Connections whose peer is not known yet: nothing is read, and nothing lost, until it is."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from notes import PATIENCE
from stream_tools import (
    HOST,
    Buffered,
    Log,
    Plain,
    RecordingBackend,
    Tokened,
    client_tls,
    connected,
    on_uvloop,
    port_of,
    server_tls,
    serving,
)

import ipsec_aio
from ipsec_aio import ProtectionError, Require
from ipsec_aio.net import streams

MOON = Require(encrypted=True, peer="moon.example.org")
OTHER = "127.0.0.9"
FAR = 60.0
"""A deadline that no test waits for."""


@pytest.fixture(autouse=True)
async def room(monkeypatch: Any) -> AsyncIterator[list[streams._Accepting]]:
    """All servers of a test; at its end none has connections or bytes that wait."""
    servers: list[streams._Accepting] = []
    init = streams._Accepting.__init__

    def noted(self: streams._Accepting, *arguments: Any) -> None:
        init(self, *arguments)
        servers.append(self)

    monkeypatch.setattr(streams._Accepting, "__init__", noted)
    yield servers
    async with asyncio.timeout(PATIENCE):
        while any(server.held or server.kept for server in servers):  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert {(server.held, server.kept) for server in servers} <= {(0, 0)}


@pytest.fixture(params=["plain", "tls"])
def tls(request: Any) -> Any:
    """Options of server and client, without and with TLS."""
    if request.param == "plain":
        return {}, {}
    return {"ssl": server_tls()}, {"ssl": client_tls(), "server_hostname": "localhost"}


def waiting(peer: str = HOST, **options: Any) -> tuple[RecordingBackend, Any]:
    """A backend whose SA from a peer awaits its identity."""
    backend = RecordingBackend(**options)
    return backend, backend.add_sa(src=peer, dst=HOST, identity_pending=True)


@contextlib.asynccontextmanager
async def held(backend: Any, factory: Any, tls: Any = ({}, {}), **options: Any) -> Any:
    """A server, and a client whose connection waits."""
    options = {"require": MOON, "deadline": FAR, **options, **tls[0]}
    pauses = Log()
    accepting = streams._Accepting.holds_one

    def holds_one(self: Any) -> bool:
        pauses.note("held")
        return accepting(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams._Accepting, "holds_one", holds_one)
        async with (
            serving(factory, backend, **options) as server,
            connected(port_of(server), **tls[1]) as client,
        ):
            await pauses.until("held")
            yield server, client


@pytest.mark.parametrize("protocol", [Tokened, Plain, Buffered])
async def test_what_was_sent_meanwhile_comes_after_connection_made(tls: Any, protocol: Any) -> None:
    if tls[0] and protocol is Buffered:
        pytest.skip("asyncio's TLS reads into a copy of a bytearray's second half")
    backend, sa = waiting()
    log = Log()
    async with held(backend, lambda: protocol(log), tls) as (server, client):
        data = bytes(range(256)) * 400
        client.transport.write(data[:10])
        client.transport.write(data[10:])
        for _ in range(5):
            await asyncio.sleep(0)
        assert log.events == []
        assert server.ipsec_stats.received == 0
        backend.identify(sa, peer="moon.example.org")
        got = await log.bytes(len(data))
        assert got == data, "something was lost"
        assert log.kinds[0] == "made"
        assert log.kinds.count("made") == 1
        token = log.of("made")[0][0]
        assert str(token.peer) == "moon.example.org"
        assert {seen for _, seen in log.of("data")} == {token}
        assert (server.ipsec_stats.received, server.ipsec_stats.refused) == (1, 0)
        client.transport.write_eof() if not tls[1] else client.transport.close()
        await log.until("lost")


async def test_somebody_else_is_reset_unheard(tls: Any) -> None:
    backend, sa = waiting()
    log = Log()
    async with held(backend, lambda: Tokened(log), tls) as (server, client):
        client.transport.write(b"never read")
        backend.identify(sa, peer="sun.example.org")
        [(error,)] = await client.log.until("lost")
        assert isinstance(error, ConnectionResetError)
        assert server.ipsec_stats.refused_by == {"peer": 1}
    assert log.events == []


async def test_at_the_deadline_it_is_reset(tls: Any) -> None:
    backend, _ = waiting()
    log = Log()
    async with held(backend, lambda: Tokened(log), tls, deadline=0.05) as (server, client):
        client.transport.write(b"never read")
        [(error,)] = await client.log.until("lost")
        assert isinstance(error, ConnectionResetError)
        assert server.ipsec_stats.refused_by == {"peer": 1}
    assert log.events == []


async def test_a_deadline_of_none_waits_for_nobody() -> None:
    backend, _ = waiting()
    log = Log()
    async with serving(lambda: Tokened(log), backend, require=MOON, deadline=0) as server:
        with contextlib.suppress(ConnectionResetError):
            async with connected(port_of(server)) as client:
                await client.log.until("lost")
        assert server.ipsec_stats.refused == 1
    assert log.events == []


async def test_what_an_identity_cannot_mend_is_refused_at_once() -> None:
    backend, _ = waiting()
    async with serving(Tokened, backend, require=MOON & Require(min_bits=512)) as server:
        with contextlib.suppress(ConnectionResetError):
            async with connected(port_of(server)) as client:
                await client.log.until("lost")
        assert server.ipsec_stats.refused == 1


async def test_an_sa_that_is_not_known_yet_is_waited_for() -> None:
    backend = RecordingBackend()
    backend.hold_events()
    backend.add_sa(src=HOST, dst=HOST, peer="moon.example.org")
    log = Log()
    async with held(backend, lambda: Tokened(log)) as (_, client):
        client.transport.write(b"hello")
        assert log.events == []
        backend.release_events()
        assert await log.bytes(5) == b"hello"
        assert log.of("made")[0][0].protected


async def test_a_peer_that_says_all_and_leaves_is_heard() -> None:
    backend, sa = waiting()
    log = Log()
    async with held(backend, lambda: Tokened(log)) as (_, client):
        client.transport.write(b"all of it")
        client.transport.close()
        await client.log.until("lost")
        backend.identify(sa, peer="moon.example.org")
        assert await log.bytes(9) == b"all of it"
        await log.until("lost")
        assert log.kinds == ["made", "data", "eof", "lost"]


async def test_a_user_that_pauses_in_connection_made_stays_paused() -> None:
    class Pausing(Tokened):
        def connection_made(self, transport: Any, ptoken: Any) -> None:
            super().connection_made(transport, ptoken)
            transport.pause_reading()

    backend, sa = waiting()
    protocol = Pausing()
    async with held(backend, lambda: protocol) as (_, client):
        client.transport.write(b"hello")
        backend.identify(sa, peer="moon.example.org")
        await protocol.log.until("made")
        for _ in range(10):
            await asyncio.sleep(0)
        assert protocol.log.of("data") == []
        protocol.transport.resume_reading()
        assert await protocol.log.bytes(5) == b"hello"


async def test_only_so_many_wait(monkeypatch: Any) -> None:
    monkeypatch.setattr(streams, "HELD_LIMIT", 1)
    backend, sa = waiting()
    log = Log()
    async with held(backend, lambda: Tokened(log)) as (server, client):
        with contextlib.suppress(ConnectionResetError):
            async with connected(port_of(server)) as second:
                await second.log.until("lost")
        assert server.ipsec_stats.refused == 1
        backend.identify(sa, peer="moon.example.org")
        await log.until("made")
        backend.delete_sa(sa)
        sa = backend.add_sa(src=HOST, dst=HOST, identity_pending=True)
        async with connected(port_of(server)):
            for _ in range(10):
                await asyncio.sleep(0)
            backend.identify(sa, peer="moon.example.org")
            await log.until("made", 2)
        assert client.log.of("lost") == []


async def test_a_peer_that_says_nothing_and_leaves_is_heard() -> None:
    backend, sa = waiting()
    log = Log()
    async with held(backend, lambda: Tokened(log)) as (_, client):
        client.transport.close()
        await client.log.until("lost")
        for _ in range(5):
            await asyncio.sleep(0)
        backend.identify(sa, peer="moon.example.org")
        await log.until("lost")
        assert log.kinds == ["made", "eof", "lost"]


async def test_only_so_much_is_kept(monkeypatch: Any) -> None:
    """On uvloop, where the first piece is read before reading can be paused."""
    monkeypatch.setattr(streams, "KEPT_LIMIT", 3)
    backend, sa = waiting()
    log = Log()
    async with held(backend, lambda: Tokened(log)) as (server, client):
        client.transport.write(b"hello")
        if on_uvloop():
            await client.log.until("lost")
            assert server.ipsec_stats.refused == 1
        else:
            backend.identify(sa, peer="moon.example.org")
            await log.bytes(5)


async def test_what_comes_before_the_wait_has_begun_takes_no_room_for_good(
    monkeypatch: Any, room: Any
) -> None:
    """What the client says is there when the connection is accepted."""
    monkeypatch.setattr(streams, "KEPT_LIMIT", 3)
    backend, _ = waiting()
    async with serving(Tokened, backend, require=MOON, deadline=0.05) as server:
        for number in range(1, 4):
            with socket.create_connection((HOST, port_of(server))) as client:
                client.sendall(b"hello")
                async with asyncio.timeout(PATIENCE):
                    while server.ipsec_stats.refused < number:  # noqa: ASYNC110
                        await asyncio.sleep(0)
            assert (room[0].held, room[0].kept) == (0, 0)
        assert server.ipsec_stats.refused_by == {"peer": 3}


async def test_what_comes_when_the_wait_is_over_is_delivered_and_takes_no_room(
    room: Any,
) -> None:
    """Between the end of the wait and the handover, as a loop that reads on may bring it."""
    backend, sa = waiting()
    log = Log()
    handovers: list[Any] = []
    late = streams._Handover._settle_late

    def settle_late(self: Any) -> None:
        self.data_received(b"at the last moment")
        assert room[0].kept == 18
        handovers.append(self)
        late(self)
        assert (room[0].held, room[0].kept) == (0, 0)
        late(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams._Handover, "_settle_late", settle_late)
        async with held(backend, lambda: Tokened(log)) as (server, _):
            backend.identify(sa, peer="moon.example.org")
            assert await log.bytes(18) == b"at the last moment"
            assert server.ipsec_stats.received == 1
            assert log.kinds.count("made") == 1


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Buffered, "get_buffer"),
        (Buffered, "buffer_updated"),
        (Tokened, "data_received"),
        (Tokened, "eof_received"),
    ],
)
async def test_what_a_protocol_raises_then_ends_its_connection(kind: Any, name: str) -> None:
    """As it does where the loop delivers."""

    def fail(self: Any, *arguments: Any) -> Any:
        raise ZeroDivisionError("on purpose")

    raised: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: raised.append(context))
    backend, sa = waiting()
    protocol = type("Failing", (kind,), {name: fail})()
    late = streams._Handover._settle_late

    def settle_late(self: Any) -> None:
        self.data_received(b"early")
        self.eof_received()
        late(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams._Handover, "_settle_late", settle_late)
        async with held(backend, lambda: protocol) as (_, client):
            backend.identify(sa, peer="moon.example.org")
            await client.log.until("lost")
    assert [context["message"] for context in raised] == [
        f"Fatal error: protocol.{name}() call failed."
    ]
    assert raised[0]["protocol"] is protocol
    await protocol.log.until("lost")


async def test_a_buffer_without_room_ends_it() -> None:
    class Roomless(Buffered):
        def get_buffer(self, sizehint: int) -> bytearray:
            return bytearray()

    raised: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: raised.append(context))
    backend, sa = waiting()
    async with held(backend, Roomless) as (_, client):
        client.transport.write(b"hello")
        backend.identify(sa, peer="moon.example.org")
        await client.log.until("lost")
    assert [type(context["exception"]) for context in raised] == [RuntimeError]


async def test_what_a_user_raises_that_resumes_later_ends_it() -> None:
    """On uvloop, where what was read before comes from resume_reading()."""

    class Pausing(Tokened):
        def connection_made(self, transport: Any, ptoken: Any) -> None:
            super().connection_made(transport, ptoken)
            transport.pause_reading()

        def data_received(self, data: bytes) -> None:
            raise ZeroDivisionError("on purpose")

    raised: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: raised.append(context))
    backend, sa = waiting()
    protocol = Pausing()
    async with held(backend, lambda: protocol) as (_, client):
        client.transport.write(b"hello")
        for _ in range(10):
            await asyncio.sleep(0)
        backend.identify(sa, peer="moon.example.org")
        await protocol.log.until("made")
        protocol.transport.resume_reading()
        await client.log.until("lost")
    assert [type(context["exception"]) for context in raised] == [ZeroDivisionError]


async def test_whoever_takes_over_at_once_gets_what_was_said_before() -> None:
    """On uvloop, where something was read before."""
    second = Tokened()

    class Passing(Tokened):
        def connection_made(self, transport: Any, ptoken: Any) -> None:
            super().connection_made(transport, ptoken)
            transport.set_protocol(second)

    backend, sa = waiting()
    async with held(backend, Passing) as (_, client):
        client.transport.write(b"hello")
        for _ in range(10):
            await asyncio.sleep(0)
        backend.identify(sa, peer="moon.example.org")
        assert await second.log.bytes(5) == b"hello"


async def test_a_backend_that_is_closed_meanwhile_refuses() -> None:
    backend, _ = waiting()
    async with held(backend, Tokened) as (server, client):
        await backend.aclose()
        await client.log.until("lost")
        assert server.ipsec_stats.refused == 1


async def test_a_transport_that_is_aborted_meanwhile_is_forgotten() -> None:
    backend, _ = waiting()
    log = Log()
    raws: list[Any] = []
    made = streams._Handover.connection_made

    def connection_made(self: Any, transport: Any) -> None:
        raws.append(transport)
        made(self, transport)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams._Handover, "connection_made", connection_made)
        async with held(backend, lambda: Tokened(log)) as (server, client):
            raws[0].abort()
            await client.log.until("lost")
            assert server.ipsec_stats.received == 0
    assert log.events == []


# Outgoing


@contextlib.asynccontextmanager
async def outgoing(backend: Any, **options: Any) -> Any:
    """A task that connects, and waits for the identity of whom it is connected to."""
    waits = Log()
    wait = streams._Handover._wait

    async def noted(self: Any, *words: Any) -> None:
        waits.note("waits")
        await wait(self, *words)

    log = Log()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams._Handover, "_wait", noted)
        async with serving(Talking, RecordingBackend(), OTHER) as server:
            task = asyncio.ensure_future(
                ipsec_aio.create_connection(
                    lambda: Tokened(log),
                    OTHER,
                    port_of(server),
                    backend=backend,
                    **{"require": MOON, "deadline": FAR, **options},
                )
            )
            await waits.until("waits")
            try:
                yield task, log
            finally:
                task.cancel()
                await asyncio.wait([task])


class Talking(Plain):
    """Speaks first."""

    def connection_made(self, transport: Any) -> None:
        transport.write(b"welcome")


def inferred() -> tuple[RecordingBackend, Any]:
    """A backend that trusts its policies, and an SA under one, of which nobody knows the peer."""
    backend, sa = waiting(OTHER, trust_policy=True)
    backend.lose_stamp()
    backend.resolver.is_own = lambda address: False
    backend.add_policy(src=OTHER, dst=HOST)
    # It is as old as it has to be for what comes now to have come under it.
    now = backend.clock() + 1.0
    sooner = backend.clock
    backend.clock = backend.resolver.clock = lambda: max(now, sooner() + 1.0)
    return backend, sa


async def test_whoever_connects_hears_nothing_before_the_peer_is_known() -> None:
    backend, sa = inferred()
    async with outgoing(backend) as (task, log):
        assert log.events == []
        backend.identify(sa, peer="moon.example.org")
        transport, _ = await task
        assert await log.bytes(7) == b"welcome"
        assert log.kinds[0] == "made"
        transport.abort()
        await log.until("lost")


async def test_connecting_to_somebody_else_is_an_error() -> None:
    backend, sa = inferred()
    async with outgoing(backend) as (task, log):
        backend.identify(sa, peer="sun.example.org")
        with pytest.raises(ProtectionError, match="peer"):
            await task
    assert log.events == []


async def test_connecting_to_nobody_known_is_an_error_at_the_deadline() -> None:
    backend, _ = inferred()
    async with outgoing(backend, deadline=0.05) as (task, log):
        with pytest.raises(ProtectionError, match="peer"):
            await task
    assert log.events == []


async def test_connecting_may_be_cancelled_meanwhile() -> None:
    backend, _ = inferred()
    async with outgoing(backend) as (task, log):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert log.events == []
