"""Latched connections: what breaks and restores them, and what happens to the bytes meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import uvloop
from kernel_tools import KernelBackend, Policies
from stream_tools import (
    HOST,
    Buffered,
    Log,
    Plain,
    RecordingBackend,
    Tokened,
    client_tls,
    connected,
    port_of,
    server_tls,
    serving,
)

import ipsec_aio
from ipsec_aio import Assurance, Latch, LatchParameters, LatchReason, LatchState, Require
from ipsec_aio.enums import Direction, Mode, PolicyAction
from ipsec_aio.net.connection import Judge
from ipsec_aio.sa import Algorithm

PEER, OTHER = "127.0.0.20", "127.0.0.21"
WEAK = Algorithm("rfc4106(gcm(aes))", 160, 64)
PAUSE = Latch(on_break="pause")
ESTABLISHED, BROKEN, CLOSED = LatchState.ESTABLISHED, LatchState.BROKEN, LatchState.CLOSED


class Latched(Tokened):
    """Notes what happens to its latch, and what was to be seen at that moment."""

    def latch_broken(self, reason: LatchReason) -> None:
        self.log.note("broken", reason, ipsec_aio.current_ptoken(), status(self))

    def latch_restored(self) -> None:
        self.log.note("restored", ipsec_aio.current_ptoken(), status(self))

    def protection_changed(self, old: Any, new: Any) -> None:
        self.log.note("changed")


class LatchedBuffered(Buffered):
    """The same with buffers of its own."""

    latch_broken = Latched.latch_broken
    latch_restored = Latched.latch_restored


def status(protocol: Any) -> Any:
    return protocol.transport.get_extra_info("ipsec_latch")


def backed(backend: RecordingBackend | None = None, **changes: Any) -> RecordingBackend:
    """A backend with an SA from our peer, and the policies that demand it."""
    backend = backend or RecordingBackend()
    backend.add_sa(src=PEER, dst=HOST, reqid=1, **changes)
    backend.add_policy(src=PEER, dst=HOST, reqid=1)
    backend.add_policy(src=HOST, dst=PEER, reqid=1, direction="out")
    return backend


@pytest.fixture(params=["plain", "tls"])
def tls(request: Any) -> Any:
    """Options of server and client, without and with TLS."""
    if request.param == "plain":
        return {}, {}
    return {"ssl": server_tls()}, {"ssl": client_tls(), "server_hostname": "localhost"}


@contextlib.asynccontextmanager
async def latched(
    backend: Any,
    latch: Any = PAUSE,
    kind: Any = Latched,
    tls: Any = ({}, {}),
    **options: Any,
) -> AsyncIterator[tuple[Any, Any, Any]]:
    """A latched connection: the server's protocol, the client's, and the first SA."""
    (sa, *_) = backend._sas.values()
    protocol = kind()
    async with (
        serving(lambda: protocol, backend, latch=latch, **tls[0], **options) as server,
        connected(port_of(server), source=PEER, **tls[1]) as client,
    ):
        await protocol.log.until("made")
        yield protocol, client, sa
        # One that is held does not see its peer go.
        last = protocol.transport.get_protocol()
        protocol.transport.abort()
        await (last or protocol).log.until("lost")


async def accepted(backend: RecordingBackend) -> None:
    """Wait until it was asked about a connection."""
    async with asyncio.timeout(5):
        while not any(e.local_port for e in backend.evidence):  # noqa: ASYNC110
            await asyncio.sleep(0)


async def seen() -> None:
    """Let what the backend was told go round."""
    for _ in range(3):
        await asyncio.sleep(0)


# -- what is told ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Latched, Plain])
async def test_a_latched_connection_says_so(tls: Any, kind: Any) -> None:
    async with latched(backed(), True, kind, tls) as (protocol, client, sa):
        state, held_by, parameters, reason, breaks = status(protocol)
        assert (state, held_by, reason, breaks) == (ESTABLISHED, "user", None, 0)
        assert parameters.mode is Mode.TRANSPORT
        assert parameters.protocols == (50,)
        assert parameters.quality[0].aead == sa.aead
        assert protocol.transport.get_extra_info("ptoken").protected
        assert protocol.transport.get_extra_info("peername")[0] == PEER
        assert protocol.transport.get_protocol() is protocol
        client.transport.write(b"ping")
        assert await protocol.log.bytes(4) == b"ping"
        protocol.transport.write(b"po")
        protocol.transport.writelines([b"n", b"g"])
        assert await client.log.bytes(4) == b"pong"
        assert "broken" not in protocol.log.kinds


async def test_an_unlatched_connection_has_no_latch() -> None:
    protocol = Tokened()
    backend = backed()
    async with (
        serving(lambda: protocol, backend) as server,
        connected(port_of(server), source=PEER),
    ):
        await protocol.log.until("made")
        assert status(protocol) is None
        assert server.latch is None


async def test_a_thousand_equivalent_rekeys_keep_it() -> None:
    backend = backed()
    async with latched(backend, True) as (protocol, client, old):
        for _ in range(1000):
            new = backend.rekey(old)
            await seen()
            backend.delete_sa(old)
            await seen()
            old = new
        client.transport.write(b"still here")
        assert await protocol.log.bytes(10) == b"still here"
        assert status(protocol).breaks == 0
        assert {"broken", "changed", "pause"}.isdisjoint(protocol.log.kinds)


# -- a break resets --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Latched, LatchedBuffered])
async def test_a_weaker_rekey_resets(tls: Any, kind: Any) -> None:
    backend = backed()
    async with latched(backend, True, kind, tls) as (protocol, client, sa):
        token = protocol.transport.get_extra_info("ptoken")
        backend.rekey(sa, aead=WEAK)
        client.transport.write(b"too late")
        [(reason, current, shown)] = await protocol.log.until("broken")
        assert reason is LatchReason.QUALITY
        assert current is token
        assert (shown.state, shown.reason, shown.breaks) == (BROKEN, LatchReason.QUALITY, 1)
        assert await protocol.log.until("lost") == [(None,)]
        assert "data" not in protocol.log.kinds
        assert protocol.log.kinds[-2:] == ["broken", "lost"]
        [(error,)] = await client.log.until("lost")
        if not tls[0]:
            assert isinstance(error, ConnectionResetError)


@pytest.mark.parametrize("how", ["lost", "policy", "other", "expired"])
async def test_what_else_breaks(how: str) -> None:
    backend = backed()
    async with latched(backend, True) as (protocol, _, sa):
        if how == "lost":
            backend.delete_sa(sa)
        elif how == "expired":
            backend.expire(sa)
        elif how == "policy":
            backend.flush_policies()
        else:
            backend.add_policy(src=PEER, dst=HOST, reqid=2)
        [(reason, *_)] = await protocol.log.until("broken")
        wanted = LatchReason.LOST if how in ("lost", "expired") else LatchReason.POLICY
        assert reason is wanted
        await protocol.log.until("lost")


@pytest.mark.parametrize("how", ["stamp", "backend"])
@pytest.mark.parametrize("latch", [True, PAUSE])
async def test_lost_evidence_ends_it(how: str, latch: Any) -> None:
    backend = backed()
    async with latched(backend, latch) as (protocol, _, _):
        if how == "stamp":
            backend.lose_stamp()
        else:
            await backend.aclose()
        [(reason, *_)] = await protocol.log.until("broken")
        assert reason is LatchReason.EVIDENCE
        await protocol.log.until("lost")
        assert protocol.log.kinds[-2:] == ["broken", "lost"]


async def test_lost_events_break_nothing() -> None:
    backend = backed()
    async with latched(backend, True) as (protocol, client, sa):
        backend.lose_events()
        await seen()
        client.transport.write(b"on")
        await protocol.log.bytes(2)
        backend.recover()
        await seen()
        assert status(protocol).state is ESTABLISHED
        backend.lose_events()
        backend.delete_sa(sa)
        await seen()
        backend.recover()
        [(reason, *_)] = await protocol.log.until("broken")
        assert reason is LatchReason.LOST


async def test_what_a_callback_raises_stops_nothing() -> None:
    class Raising(Latched):
        def latch_broken(self, reason: LatchReason) -> None:
            super().latch_broken(reason)
            raise ZeroDivisionError("on purpose")

    raised: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: raised.append(context))
    backend = backed()
    async with latched(backend, True, Raising) as (protocol, _, sa):
        backend.delete_sa(sa)
        await protocol.log.until("lost")
    assert [type(context["exception"]) for context in raised] == [ZeroDivisionError]


class Sore(Latched):
    """Raises what it is told to where it is told to, once."""

    error: BaseException | None = None
    where = ""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.fail("data_received")

    def eof_received(self) -> bool:
        super().eof_received()
        self.fail("eof_received")
        return True

    def latch_broken(self, reason: LatchReason) -> None:
        super().latch_broken(reason)
        self.fail("latch_broken")

    def fail(self, where: str) -> None:
        if self.error is not None and where == self.where:
            error, self.error = self.error, None
            raise error


class SoreBuffered(LatchedBuffered):
    """The same with buffers of its own."""

    error: BaseException | None = None

    def buffer_updated(self, nbytes: int) -> None:
        super().buffer_updated(nbytes)
        if self.error is not None:
            raise self.error


@contextlib.asynccontextmanager
async def one_and_others(kind: Any = Sore) -> AsyncIterator[Any]:
    """A backend of many peers, latched connections by peer, and their clients."""
    peers = [f"127.0.0.{number}" for number in range(20, 32)]
    backend = LateNews()
    sas = {}
    for reqid, peer in enumerate(peers, 1):
        sas[peer] = backend.add_sa(src=peer, dst=HOST, reqid=reqid)
        backend.add_policy(src=peer, dst=HOST, reqid=reqid)
        backend.add_policy(src=HOST, dst=peer, reqid=reqid, direction="out")
    made: list[Any] = []
    unmade = [kind() for _ in peers]

    def factory() -> Any:
        made.append(unmade[len(made)])
        return made[-1]

    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(factory, backend, latch=PAUSE))
        clients = {}
        for peer in peers:
            clients[peer] = await stack.enter_async_context(connected(port_of(server), source=peer))
        for each in unmade:
            await each.log.until("made")
        found = {each.transport.get_extra_info("peername")[0]: each for each in made}
        yield backend, sas, found, clients
        for each in made:
            each.transport.abort()
            await each.log.until("lost")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Sore, "data_received"),
        (Sore, "eof_received"),
        (Sore, "latch_broken"),
        (SoreBuffered, "buffer_updated"),
    ],
)
async def test_what_one_protocol_raises_breaks_all_latches_that_are_to_break(
    kind: Any, name: str
) -> None:
    """One connection is restored and its protocol raises, in the wake-up that breaks the others."""
    raised: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: raised.append(context))
    async with one_and_others(kind) as (backend, sas, protocols, clients):
        one, *others = protocols
        protocols[one].where = name
        if name == "latch_broken":
            protocols[one].error = ZeroDivisionError("on purpose")
        else:
            backend.news.append(lambda: backend.delete_sa(sas[one]))
            client = clients[one].transport
            client.write_eof() if name == "eof_received" else client.write(b"kept")
            await protocols[one].log.until("broken")
            protocols[one].error = ZeroDivisionError("on purpose")
            backend.rekey(sas[one])
        for peer in protocols if name == "latch_broken" else others:
            backend.delete_sa(sas[peer])
        await seen()
        for peer in others:
            assert status(protocols[peer]).state is BROKEN
            assert len(protocols[peer].log.of("broken")) == 1
            protocols[peer].transport.write(b"secret")
        await asyncio.sleep(0.02)
        assert all("data" not in clients[peer].log.kinds for peer in others)
        assert [type(context["exception"]) for context in raised] == [ZeroDivisionError]
        assert raised[0]["message"] == f"Fatal error: protocol.{name}() call failed."
        assert raised[0]["protocol"] is protocols[one]
        if name != "latch_broken":
            await protocols[one].log.until("lost")


async def test_what_cannot_be_reviewed_is_reported() -> None:
    class Failing(LateNews):
        failing = False

        def outlook(self, evidence: Any) -> Any:
            if self.failing and evidence.peer[-1] == 20:
                raise ZeroDivisionError("on purpose")
            return super().outlook(evidence)

    raised: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: raised.append(context))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "LateNews", Failing)
        async with one_and_others() as (backend, sas, protocols, _):
            backend.failing = True
            for sa in sas.values():
                backend.delete_sa(sa)
            await seen()
            broken = [status(protocol).state for protocol in protocols.values()].count(BROKEN)
            assert broken == len(protocols) - 1
            backend.failing = False
    assert {type(context["exception"]) for context in raised} == {ZeroDivisionError}


async def test_what_looking_ends_gets_nothing_more() -> None:
    class Leaving(Latched):
        def latch_broken(self, reason: LatchReason) -> None:
            super().latch_broken(reason)
            self.transport.abort()

    backend = LateNews()
    async with latched(backed(backend), kind=Leaving) as (protocol, client, sa):

        def news() -> None:
            new = backend.rekey(sa, aead=WEAK)
            protocol.transport._guard.look()
            backend.delete_sa(new)

        backend.news.append(news)
        client.transport.write(b"too late")
        await protocol.log.until("lost")
        assert "data" not in protocol.log.kinds


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_who_ends_the_program_ends_it_and_all_latches_break(new_loop: Any, error: Any) -> None:
    """As the loop's own callbacks do; and where it runs on, to clean up, nothing is forgotten."""
    stack = contextlib.AsyncExitStack()

    async def begin() -> Any:
        found = await stack.enter_async_context(one_and_others())
        backend, sas, protocols, clients = found
        one = next(iter(protocols))
        backend.news.append(lambda: backend.delete_sa(sas[one]))
        clients[one].transport.write(b"kept")
        await protocols[one].log.until("broken")
        protocols[one].transport._guard.keep("data_received", protocols[one].data_received, b" too")
        protocols[one].where, protocols[one].error = "data_received", error("on purpose")
        return found

    async def part_ways(backend: Any, sas: Any, protocols: Any, clients: Any) -> None:
        one, *others = protocols
        backend.rekey(sas[one])
        for peer in others:
            backend.delete_sa(sas[peer])
        await protocols[one].log.until("lost")

    async def end(backend: Any, sas: Any, protocols: Any, clients: Any) -> None:
        one, *others = protocols
        await protocols[one].log.bytes(8)
        assert [data for data, _ in protocols[one].log.of("data")] == [b"kept", b" too"]
        assert {status(protocols[peer]).state for peer in others} == {BROKEN}
        await stack.aclose()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        found = runner.run(begin())
        with pytest.raises(error):
            runner.run(part_ways(*found))
        runner.run(end(*found))


# -- a break pauses --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Latched, LatchedBuffered])
async def test_a_pause_holds_all_bytes(tls: Any, kind: Any) -> None:
    backend = backed()
    async with latched(backend, kind=kind, tls=tls) as (protocol, client, sa):
        transport = protocol.transport
        backend.delete_sa(sa)
        await protocol.log.until("broken")
        client.transport.write(b"question")
        transport.write(b"ans")
        transport.writelines([b"w", bytearray(b"e"), b"r"])
        assert transport.get_write_buffer_size() == 6
        assert not transport.is_reading()
        transport.pause_reading()
        transport.resume_reading()
        await asyncio.sleep(0.05)
        assert "data" not in protocol.log.kinds
        assert "data" not in client.log.kinds
        backend.rekey(sa)
        [(current, shown)] = await protocol.log.until("restored")
        assert current is transport.get_extra_info("ptoken")
        assert (shown.state, shown.reason, shown.breaks) == (ESTABLISHED, None, 1)
        assert await protocol.log.bytes(8) == b"question"
        assert await client.log.bytes(6) == b"answer"
        assert transport.get_write_buffer_size() == 0
        assert transport.is_reading()
        if kind is Latched:
            assert protocol.log.kinds == ["made", "broken", "pause", "restored", "resume", "data"]


async def test_who_paused_reading_himself_stays_paused() -> None:
    backend = backed()
    async with latched(backend) as (protocol, client, sa):
        transport = protocol.transport
        backend.delete_sa(sa)
        await protocol.log.until("broken")
        transport.pause_reading()
        client.transport.write(b"x")
        backend.rekey(sa)
        await protocol.log.until("restored")
        await asyncio.sleep(0.02)
        assert "data" not in protocol.log.kinds
        transport.resume_reading()
        assert await protocol.log.bytes(1) == b"x"


async def test_reading_that_was_paused_before() -> None:
    backend = backed()
    async with latched(backend) as (protocol, client, sa):
        protocol.transport.pause_reading()
        client.transport.write(b"x")
        backend.delete_sa(sa)
        await protocol.log.until("broken")
        protocol.transport.resume_reading()
        await asyncio.sleep(0.02)
        assert "data" not in protocol.log.kinds
        backend.rekey(sa)
        assert await protocol.log.bytes(1) == b"x"
        assert protocol.log.kinds[-1] == "data"


class LateNews(RecordingBackend):
    """Learns of things at the last moment: when it is asked to take in what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.news: list[Any] = []

    def drain(self) -> None:
        while self.news:
            self.news.pop()()
        super().drain()


@pytest.mark.parametrize("kind", [Latched, LatchedBuffered])
async def test_nothing_is_delivered_that_came_after_a_conflict(tls: Any, kind: Any) -> None:
    backend = LateNews()
    async with latched(backed(backend), kind=kind, tls=tls) as (protocol, client, sa):
        weak: list[Any] = []
        backend.news.append(lambda: weak.append(backend.rekey(sa, aead=WEAK)))
        client.transport.write(b"under the weak one")
        await protocol.log.until("broken")
        await asyncio.sleep(0.02)
        assert "data" not in protocol.log.kinds
        backend.delete_sa(weak[0])
        await protocol.log.until("lost")
        assert "data" not in protocol.log.kinds
        assert "restored" not in protocol.log.kinds


@pytest.mark.parametrize("waits", [None, "before", "meanwhile"])
async def test_what_may_have_come_under_another_sa_is_never_delivered(tls: Any, waits: Any) -> None:
    """Also not when that has gone; where nothing came, the connection goes on."""
    backend = backed()
    async with latched(backend, tls=tls) as (protocol, client, sa):
        if waits == "before":
            protocol.transport.pause_reading()
            client.transport.write(b"waits")
            await asyncio.sleep(0.02)
        weak = backend.rekey(sa, aead=WEAK)
        await protocol.log.until("broken")
        if waits == "meanwhile":
            client.transport.write(b"waits")
            await asyncio.sleep(0.02)
        backend.delete_sa(weak)
        if waits:
            await protocol.log.until("lost")
            assert not {"data", "restored"} & set(protocol.log.kinds)
        else:
            await protocol.log.until("restored")
            client.transport.write(b"goes on")
            assert await protocol.log.bytes(7) == b"goes on"


@pytest.mark.parametrize("open_", [True, False])
async def test_an_end_that_came_after_a_conflict_is_told_later(open_: bool) -> None:
    backend = LateNews()
    async with latched(backed(backend)) as (protocol, client, sa):
        protocol.keep_open = open_
        backend.news.append(lambda: backend.delete_sa(sa))
        client.transport.write_eof()
        await protocol.log.until("broken")
        await asyncio.sleep(0.02)
        assert "eof" not in protocol.log.kinds
        backend.rekey(sa)
        await protocol.log.until("eof")
        assert protocol.transport.is_closing() is not open_
        protocol.transport.write(b"answer")
        if open_:
            assert await client.log.bytes(6) == b"answer"


async def test_ends_are_told_as_they_come() -> None:
    class Short(ipsec_aio.Protocol):
        eof_received = None  # type: ignore[assignment]

        def __init__(self) -> None:
            self.log = Log()

        def connection_made(self, transport: Any, ptoken: Any) -> None:
            self.transport = transport
            self.log.note("made")

        def connection_lost(self, exc: Any) -> None:
            self.log.note("lost")

    for kind in (Latched, Short):
        async with latched(backed(), kind=kind) as (protocol, client, _):
            client.transport.write_eof()
            await protocol.log.until("lost")


async def test_a_second_break_while_things_are_delivered() -> None:
    backend = LateNews()

    class Breaking(Latched):
        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if len(self.log.of("data")) == 1:
                backend.flush_sas()
                backend.drain()
                self.transport._guard.look()

    async with latched(backed(backend), kind=Breaking) as (protocol, client, sa):
        backend.news.append(lambda: backend.delete_sa(sa))
        client.transport.write(b"one")
        await protocol.log.until("broken")
        protocol.transport._guard.keep("data_received", protocol.data_received, b"two")
        new = backend.rekey(sa)
        await protocol.log.until("broken", 2)
        assert [data for data, _ in protocol.log.of("data")] == [b"one"]
        backend.rekey(new)
        assert await protocol.log.bytes(6) == b"onetwo"


async def test_flow_control_is_told_in_pairs() -> None:
    """A full buffer and a break, in either order, are one pause for the protocol."""
    backend = backed()
    async with latched(backend) as (protocol, client, sa):
        transport = protocol.transport
        client.transport.pause_reading()
        transport.set_write_buffer_limits(high=1000, low=10)
        transport.write(bytes(30_000_000))
        await protocol.log.until("pause")
        for _ in range(2):
            new = backend.rekey(sa)
            backend.delete_sa(sa)
            await seen()
            backend.delete_sa(new)
            await seen()
            sa = backend.rekey(new)
            await seen()
        await protocol.log.until("restored", 2)
        assert "resume" not in protocol.log.kinds
        client.transport.resume_reading()
        await protocol.log.until("resume")
        assert protocol.log.kinds.count("pause") == 1


async def test_the_end_of_what_is_written_waits_too() -> None:
    backend = backed()
    async with latched(backend) as (protocol, client, sa):
        backend.delete_sa(sa)
        await protocol.log.until("broken")
        protocol.transport.write(b"last words")
        protocol.transport.write_eof()
        with pytest.raises(RuntimeError, match="write_eof"):
            protocol.transport.write(b"no")
        await asyncio.sleep(0.02)
        assert "eof" not in client.log.kinds
        backend.rekey(sa)
        await client.log.until("eof")
        assert await client.log.bytes(10) == b"last words"


async def test_an_end_of_writing_without_a_break() -> None:
    async with latched(backed()) as (protocol, client, _):
        protocol.transport.write(b"bye")
        protocol.transport.write_eof()
        await client.log.until("eof")
        assert await client.log.bytes(3) == b"bye"


@pytest.mark.parametrize("way", ["close", "abort"])
async def test_a_close_while_broken_sends_nothing(way: str) -> None:
    backend = backed()
    async with latched(backend) as (protocol, client, sa):
        backend.delete_sa(sa)
        await protocol.log.until("broken")
        protocol.transport.write(b"secret")
        getattr(protocol.transport, way)()
        await protocol.log.until("lost")
        assert status(protocol).state is CLOSED
        backend.rekey(sa)
        protocol.transport.write(b"more")
        await client.log.until("lost")
        assert "data" not in client.log.kinds
        assert "restored" not in protocol.log.kinds


async def test_a_close_of_its_own_is_ordinary() -> None:
    async with latched(backed()) as (protocol, client, _):
        protocol.transport.write(b"bye")
        protocol.transport.close()
        await client.log.until("lost")
        assert await client.log.bytes(3) == b"bye"
        await protocol.log.until("lost")
        assert status(protocol).state is CLOSED
        protocol.transport.write(b"too late")


async def test_it_may_be_closed_from_its_callbacks() -> None:
    class Closing(Latched):
        def latch_restored(self) -> None:
            super().latch_restored()
            self.transport.abort()

    backend = backed()
    async with latched(backend, kind=Closing) as (protocol, _, sa):
        backend.delete_sa(sa)
        await protocol.log.until("broken")
        protocol.transport.write(b"never")
        backend.rekey(sa)
        await protocol.log.until("lost")
        assert "resume" not in protocol.log.kinds

    class Leaving(Latched):
        def latch_broken(self, reason: LatchReason) -> None:
            super().latch_broken(reason)
            self.transport.close()

    async with latched(backed(), kind=Leaving) as (protocol, _, _):
        backend = protocol.transport._ipsec_connection.judge.backend
        backend.flush_sas()
        await protocol.log.until("lost")
        assert "pause" not in protocol.log.kinds


async def test_a_pause_is_bounded() -> None:
    backend = backed()
    latch = Latch(on_break="pause", timeout=0.05)
    async with latched(backend, latch) as (protocol, _, sa):
        backend.delete_sa(sa)
        await protocol.log.until("lost")
        assert status(protocol)[::3] == (CLOSED, LatchReason.TIMEOUT)
        assert protocol.log.kinds.count("broken") == 1
    latch = Latch(on_break="pause", timeout=60)
    async with latched(backed(backend), latch) as (protocol, _, _):
        sa = protocol.transport.get_extra_info("ptoken").sa
        backend.delete_sa(sa)
        await protocol.log.until("broken")
        backend.rekey(sa)
        await protocol.log.until("restored")


async def test_a_clock_that_calls_too_soon_ends_it_too(monkeypatch: Any) -> None:
    call_at = Judge.call_at
    monkeypatch.setattr(Judge, "call_at", lambda self, when, do: call_at(self, when - 0.01, do))
    backend = backed()
    async with latched(backend, Latch(on_break="pause", timeout=0.05)) as (protocol, _, sa):
        backend.delete_sa(sa)
        await protocol.log.until("lost")
        assert status(protocol).reason is LatchReason.TIMEOUT


async def test_lost_evidence_while_broken_ends_it_without_another_word() -> None:
    backend = backed()
    async with latched(backend) as (protocol, _, sa):
        backend.delete_sa(sa)
        await protocol.log.until("broken")
        backend.lose_stamp()
        await protocol.log.until("lost")
        assert protocol.log.kinds.count("broken") == 1
        assert status(protocol).reason is LatchReason.EVIDENCE


async def test_plain_protocols_are_held_too() -> None:
    backend = backed()
    async with latched(backend, kind=Plain) as (protocol, client, sa):
        backend.delete_sa(sa)
        await protocol.log.until("pause")
        client.transport.write(b"x")
        await asyncio.sleep(0.02)
        assert "data" not in protocol.log.kinds
        backend.rekey(sa)
        assert await protocol.log.bytes(1) == b"x"
        assert protocol.log.kinds == ["made", "pause", "resume", "data"]


async def test_asyncios_streams_are_held() -> None:
    backend = backed()
    (sa,) = backend._sas.values()
    accepted: asyncio.Queue[Any] = asyncio.Queue()

    async def serve(reader: Any, writer: Any) -> None:
        accepted.put_nowait(writer)
        with contextlib.suppress(ConnectionError):
            writer.write(await reader.readexactly(4))
            await writer.drain()
        writer.close()

    server = await ipsec_aio.start_server(serve, HOST, 0, backend=backend, latch=PAUSE)
    reader, writer = await asyncio.open_connection(HOST, port_of(server), local_addr=(PEER, 0))
    served = await accepted.get()
    backend.delete_sa(sa)
    await seen()
    assert served.get_extra_info("ipsec_latch").state is BROKEN
    writer.write(b"echo")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(served.drain(), 0.02)
    backend.rekey(sa)
    assert await reader.readexactly(4) == b"echo"
    writer.close()
    await writer.wait_closed()
    server.close()
    await served.wait_closed()


async def test_another_protocol_takes_over() -> None:
    backend = backed()
    second = Latched()
    async with latched(backend) as (protocol, client, sa):
        second.transport = protocol.transport
        protocol.transport.set_protocol(second)
        assert protocol.transport.get_protocol() is second
        backend.delete_sa(sa)
        await second.log.until("broken")
        client.transport.write(b"x")
        backend.rekey(sa)
        assert await second.log.bytes(1) == b"x"
        assert "broken" not in protocol.log.kinds


async def test_an_upgrade_to_tls_keeps_the_latch() -> None:
    backend = backed()
    inner = Latched()

    class Upgrading(Latched):
        def data_received(self, data: bytes) -> None:
            self.task = asyncio.ensure_future(self.upgrade())

        async def upgrade(self) -> None:
            self.transport.write(b"go")
            inner.transport = await ipsec_aio.start_tls(
                self.transport, inner, server_tls(), server_side=True
            )
            inner.log.note("made")

    first = Upgrading()
    (sa,) = backend._sas.values()
    async with serving(lambda: first, backend, latch=PAUSE) as server:
        loop = asyncio.get_running_loop()
        raw, plain = await loop.create_connection(
            Plain, HOST, port_of(server), local_addr=(PEER, 0)
        )
        raw.write(b"STARTTLS")
        await plain.log.bytes(2)
        upgraded = Plain()
        made = await loop.start_tls(raw, upgraded, client_tls(), server_hostname="localhost")
        assert made is not None
        await inner.log.until("made")
        assert status(inner).state is ESTABLISHED
        backend.delete_sa(sa)
        await inner.log.until("broken")
        made.write(b"question")
        inner.transport.write(b"answer")
        await asyncio.sleep(0.02)
        assert "data" not in inner.log.kinds
        backend.rekey(sa)
        assert await inner.log.bytes(8) == b"question"
        assert await upgraded.log.bytes(6) == b"answer"
        made.abort()
        await inner.log.until("lost")
        assert status(inner).state is CLOSED


async def test_files_are_not_sent_past_a_latch(tmp_path: Any) -> None:
    loop = asyncio.get_running_loop()
    path = tmp_path / "file"
    path.write_bytes(b"content")
    async with latched(backed()) as (protocol, _, _):
        with path.open("rb") as file, pytest.raises(NotImplementedError):
            await loop.sendfile(protocol.transport, file)


# -- what cannot be latched ------------------------------------------------------------------


async def test_clear_connections_are_refused() -> None:
    log = Log()
    async with (
        serving(lambda: Latched(log), RecordingBackend(), latch=True) as server,
        connected(port_of(server), source=PEER) as client,
    ):
        [(error,)] = await client.log.until("lost")
        assert isinstance(error, ConnectionResetError)
        assert server.ipsec_stats.refused_by == {"latch": 1}
        assert log.events == []


async def test_conflicts_at_birth_are_refused() -> None:
    backend = backed()
    backend.add_policy(src=PEER, dst=HOST)
    backend.add_sa(src=OTHER, dst=HOST, reqid=9)
    async with (
        serving(Latched, backend, latch=True) as server,
        connected(port_of(server), source=PEER) as client,
    ):
        await client.log.until("lost")
        assert server.ipsec_stats.refused_by == {"latch": 1}


async def test_a_backend_that_closes_meanwhile_refuses() -> None:
    backend = backed()

    class Closing(RecordingBackend):
        def outlook(self, evidence: Any) -> Any:
            self.check = backend.check
            return super().outlook(evidence)

    closing = backed(Closing())
    await backend.aclose()
    async with (
        serving(Latched, closing, latch=True) as server,
        connected(port_of(server), source=PEER) as client,
    ):
        await client.log.until("lost")
        assert server.ipsec_stats.refused_by == {"latch": 1}


@pytest.mark.parametrize("require", [None, Require(encrypted=True)])
async def test_a_connection_waits_for_its_sa(require: Any) -> None:
    backend = RecordingBackend()
    backend.hold_events()
    backed(backend)
    protocol = Latched()
    options = {"latch": True, "require": require, "deadline": 5.0}
    async with (
        serving(lambda: protocol, backend, **options) as server,
        connected(port_of(server), source=PEER) as client,
    ):
        client.transport.write(b"early")
        await accepted(backend)
        assert server.ipsec_stats.received == 0
        backend.release_events()
        assert await protocol.log.bytes(5) == b"early"
        assert server.ipsec_stats.received == 1
        assert server.ipsec_stats.refused_by == {}


async def test_the_argument_is_checked() -> None:
    for function in (ipsec_aio.create_server, ipsec_aio.create_connection):
        with pytest.raises(TypeError, match="latch"):
            await function(Plain, HOST, 1, backend=backed(), latch="pause")
    async with serving(Tokened, backed(), latch=False) as server:
        assert server.latch is None


# -- clients ---------------------------------------------------------------------------------


def aged(backend: RecordingBackend) -> RecordingBackend:
    """Let policies come of age."""
    later = time.monotonic() + 10.0
    backend.clock = backend.resolver.clock = lambda: later + time.monotonic()
    backend.drain()
    return backend


def client_backend() -> RecordingBackend:
    backend = RecordingBackend(trust_policy=True)
    backend.add_sa(src=HOST, dst=PEER, reqid=1)
    backend.add_sa(src=PEER, dst=HOST, reqid=1, replay_window=0)
    backend.add_policy(src=HOST, dst=PEER, reqid=1)
    backend.add_policy(src=PEER, dst=HOST, reqid=1, direction="out")
    return aged(backend)


async def test_a_client_is_latched_to_what_policies_demand() -> None:
    backend = client_backend()
    inward, outward = backend._sas.values()
    loop = asyncio.get_running_loop()
    far = Plain()
    server = await loop.create_server(lambda: far, HOST, 0)
    transport, protocol = await ipsec_aio.create_connection(
        Latched, HOST, port_of(server), local_addr=(PEER, 0), backend=backend, latch=PAUSE
    )
    assert transport.get_extra_info("ptoken").assurance is Assurance.POLICY
    assert status(protocol).state is ESTABLISHED
    weak = backend.rekey(outward, aead=WEAK)
    [(reason, *_)] = await protocol.log.until("broken")
    assert reason is LatchReason.QUALITY, "what is sent counts, too"
    transport.write(b"x")
    await asyncio.sleep(0.02)
    assert "data" not in far.log.kinds
    backend.delete_sa(weak)
    assert await far.log.bytes(1) == b"x"
    backend.delete_sa(inward)
    await protocol.log.until("broken", 2)
    transport.abort()
    await protocol.log.until("lost")
    server.close()


async def test_a_client_without_protection_gets_an_error() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Plain, HOST, 0)
    unheard = Latched()
    with pytest.raises(ipsec_aio.ProtectionError, match="latch") as caught:
        await ipsec_aio.create_connection(
            lambda: unheard, HOST, port_of(server), backend=RecordingBackend(), latch=True
        )
    assert caught.value.clause == "latch"
    await seen()
    assert unheard.log.events == []
    server.close()


async def test_a_client_is_held_to_an_earlier_peer() -> None:
    backend = client_backend()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Plain, HOST, 0)
    where = {"host": HOST, "port": port_of(server), "local_addr": (PEER, 0), "backend": backend}
    transport, protocol = await ipsec_aio.create_connection(Latched, **where, latch=True)
    earlier = status(protocol).parameters
    transport.abort()
    await protocol.log.until("lost")
    again = Latch(like=earlier)
    transport, protocol = await ipsec_aio.create_connection(Latched, **where, latch=again)
    transport.abort()
    await protocol.log.until("lost")
    inward = next(iter(backend._sas.values()))
    backend.rekey(inward, aead=WEAK)
    backend.delete_sa(inward)
    with pytest.raises(ipsec_aio.ProtectionError, match="quality"):
        await ipsec_aio.create_connection(Latched, **where, latch=again)
    server.close()


# -- identities ------------------------------------------------------------------------------


async def test_another_peer_behind_the_same_channel_breaks() -> None:
    backend = backed(peer="ann.example.org")
    async with latched(backend) as (protocol, _, sa):
        assert str(status(protocol).parameters.peer) == "ann.example.org"
        other = backend.rekey(sa, peer="eve.example.org")
        [(reason, *_)] = await protocol.log.until("broken")
        assert reason is LatchReason.PEER
        backend.delete_sa(other)
        await protocol.log.until("restored")


async def test_a_new_sa_is_read_from_when_it_is_known_whose_it_is() -> None:
    backend = backed(peer="ann.example.org")
    async with latched(backend) as (protocol, client, sa):
        new = backend.rekey(sa, identity_pending=True)
        await protocol.log.until("pause")
        client.transport.write(b"x")
        await asyncio.sleep(0.02)
        assert status(protocol).state is ESTABLISHED
        assert "data" not in protocol.log.kinds
        backend.identify(new, peer="ann.example.org")
        assert await protocol.log.bytes(1) == b"x"
        assert protocol.log.kinds == ["made", "pause", "resume", "data"]
        newer = backend.rekey(new, identity_pending=True)
        await protocol.log.until("pause", 2)
        backend.identify(newer, peer="eve.example.org")
        [(reason, *_)] = await protocol.log.until("broken")
        assert reason is LatchReason.PEER
        backend.delete_sa(newer)
        backend.rekey(new, identity_pending=True)
        await protocol.log.until("restored")
        assert protocol.log.kinds[-1] == "restored", "still held: another one is awaited"


class Impatient(RecordingBackend):
    """Says that identities are settled soon, and tells nobody when they are."""

    def outlook(self, evidence: Any) -> Any:
        return replace(super().outlook(evidence), settled_in=0.02)

    def _tick(self) -> None:
        pass


@pytest.mark.parametrize("kind", [RecordingBackend, Impatient])
async def test_who_is_never_named_is_not_the_peer(kind: Any) -> None:
    backend = backed(kind(), peer="ann.example.org")
    async with latched(backend, True) as (protocol, _, sa):
        backend.rekey(sa, identity_pending=True)
        await protocol.log.until("pause")
        ahead = time.monotonic
        backend.clock = backend.resolver.clock = lambda: ahead() + 10.0
        [(reason, *_)] = await protocol.log.until("broken")
        assert reason is LatchReason.PEER
        await protocol.log.until("lost")


async def test_a_peer_that_is_demanded_and_awaited_gets_nothing_yet() -> None:
    ann = ipsec_aio.IToken.named("ann.example.org")
    backend = RecordingBackend()
    sa = backend.add_sa(src=PEER, dst=HOST, reqid=1, identity_pending=True)

    class Greeting(Latched):
        def connection_made(self, transport: Any, ptoken: Any) -> None:
            super().connection_made(transport, ptoken)
            transport.write(b"hello ann")

    latch = Latch(on_break="pause", like=LatchParameters(peer=ann))
    async with latched(backend, latch, Greeting) as (protocol, client, _):
        await protocol.log.until("pause")
        await asyncio.sleep(0.02)
        assert "data" not in client.log.kinds
        backend.identify(sa, peer="ann.example.org")
        assert await client.log.bytes(9) == b"hello ann"
        assert protocol.log.kinds == ["made", "pause", "resume"]


@pytest.mark.parametrize("kind", [Latched, LatchedBuffered])
async def test_what_was_said_before_waits_for_the_latch(kind: Any) -> None:
    """On uvloop, where a piece is read before it is known what the connection came by."""
    backend = RecordingBackend()
    backend.hold_events()
    sa = backend.add_sa(src=PEER, dst=HOST, reqid=1, peer="ann.example.org")
    ann = LatchParameters(peer=ipsec_aio.IToken.named("ann.example.org"))
    protocol = kind()
    latch = Latch(on_break="pause", like=ann)
    async with (
        serving(lambda: protocol, backend, latch=latch, deadline=5.0) as server,
        connected(port_of(server), source=PEER) as client,
    ):
        data = bytes(range(200))
        client.transport.write(data)
        await accepted(backend)
        await seen()
        new = backend.rekey(sa, identity_pending=True)
        backend.release_events()
        await protocol.log.until("made")
        client.transport.write(b"more")
        await asyncio.sleep(0.02)
        assert "data" not in protocol.log.kinds
        backend.identify(new, peer="ann.example.org")
        assert await protocol.log.bytes(204) == data + b"more"


# -- listeners -------------------------------------------------------------------------------


async def test_a_listener_says_what_its_children_are_like() -> None:
    backend = backed()
    log = Log()
    latch = Latch(like=LatchParameters(mode=Mode.TUNNEL))
    async with (
        serving(lambda: Latched(log), backend, latch=latch) as server,
        connected(port_of(server), source=PEER) as client,
    ):
        assert server.latch.state is LatchState.LISTENER
        await client.log.until("lost")
        assert server.ipsec_stats.refused_by == {"latch": 1}
        assert log.events == []


async def test_children_outlive_their_listener() -> None:
    backend = backed()
    (sa,) = backend._sas.values()
    protocol = Latched()
    async with (
        serving(lambda: protocol, backend, latch=PAUSE) as server,
        connected(port_of(server), source=PEER) as client,
    ):
        await protocol.log.until("made")
        server.close()
        assert server.latch.state is CLOSED
        assert status(protocol).state is ESTABLISHED
        backend.delete_sa(sa)
        await protocol.log.until("broken")
        backend.rekey(sa)
        client.transport.write(b"x")
        assert await protocol.log.bytes(1) == b"x"


async def test_a_child_that_waited_past_the_close_is_latched_all_the_same() -> None:
    backend = RecordingBackend()
    backend.hold_events()
    backed(backend)
    protocol = Latched()
    async with (
        serving(lambda: protocol, backend, latch=PAUSE, deadline=5.0) as server,
        connected(port_of(server), source=PEER),
    ):
        await accepted(backend)
        server.close()
        backend.release_events()
        await protocol.log.until("made")
        assert status(protocol).state is ESTABLISHED


# -- the kernel ------------------------------------------------------------------------------


@pytest.fixture
def policies(monkeypatch: Any) -> Policies:
    return Policies(monkeypatch, real=False)


def kernel_backend(**changes: Any) -> KernelBackend:
    backend = KernelBackend(trust_policy=True)
    backend.restore_stamp()
    backed(backend, **changes)
    return backend


async def test_the_kernel_holds_it_both_ways(policies: Policies) -> None:
    backend = kernel_backend()
    async with latched(backend) as (protocol, _, sa):
        assert status(protocol).held_by == "kernel"
        for direction, source, destination in (
            (Direction.IN, sa.source, sa.destination),
            (Direction.OUT, sa.destination, sa.source),
        ):
            policy = policies.on(protocol.transport, direction)
            assert policy is not None
            assert policy.action is PolicyAction.ALLOW
            assert policy.selector.family == 2
            [template] = policy.templates
            assert (template.proto, template.mode, template.reqid) == (50, Mode.TRANSPORT, 1)
            assert (template.source, template.destination) == (source, destination)
        assert policies.calls == ["allow out", "allow in"]
        backend.add_sa(src=PEER, dst=HOST, reqid=2)
        await seen()
        assert status(protocol).state is ESTABLISHED, "the kernel drops what that one carries"


async def test_while_it_is_broken_the_kernel_lets_nothing_pass(policies: Policies) -> None:
    backend = kernel_backend()
    async with latched(backend) as (protocol, _, sa):
        weak = backend.rekey(sa, aead=WEAK)
        await protocol.log.until("broken")
        for direction in (Direction.IN, Direction.OUT):
            policy = policies.on(protocol.transport, direction)
            assert policy is not None
            assert policy.action is PolicyAction.BLOCK
        backend.delete_sa(weak)
        await protocol.log.until("restored")
        allowed = ["allow out", "allow in"]
        assert policies.calls == [*allowed, "block out", "block in", *allowed]


async def test_the_kernels_latch_stands_in_for_the_stamp(policies: Policies) -> None:
    backend = kernel_backend()
    async with latched(backend) as (protocol, client, _):
        token = protocol.transport.get_extra_info("ptoken")
        assert token.assurance is Assurance.EXACT
        backend.lose_stamp()
        await seen()
        client.transport.write(b"x")
        await protocol.log.bytes(1)
        assert protocol.transport.get_extra_info("ptoken") is token
        assert status(protocol).state is ESTABLISHED
        backend.set_opaque_interfaces(True)
        [(reason, *_)] = await protocol.log.until("broken")
        assert reason is LatchReason.EVIDENCE, "what comes by an interface passes its policy by"
        backend.set_opaque_interfaces(False)
        await protocol.log.until("restored")


async def test_the_kernels_latch_goes_with_a_peer_who_moves(policies: Policies) -> None:
    backend = kernel_backend(peer="ann.example.org")
    async with latched(backend) as (protocol, _, sa):
        backend.add_policy(src=PEER, dst=HOST, reqid=0)
        backend.add_policy(src=HOST, dst=PEER, reqid=2, direction="out")
        [(reason, *_)] = await protocol.log.until("broken")
        assert reason is LatchReason.POLICY
        backend.rekey(sa, reqid=2, peer="ann.example.org")
        backend.delete_sa(sa)
        await protocol.log.until("restored")
        [template] = policies.templates(protocol.transport)
        assert template.reqid == 2
        assert status(protocol).state is ESTABLISHED


@pytest.mark.parametrize("why", ["no reqid", "interface id", "mark", "namespace", "refused"])
async def test_else_user_space_holds_it(policies: Policies, why: str) -> None:
    changes: dict[str, Any] = {}
    if why == "interface id":
        changes["if_id"] = 7
    elif why == "mark":
        changes["mark"] = (5, 0xFF)
    elif why == "refused":
        policies.refuse = PermissionError(1, "on purpose")
    backend = kernel_backend(**changes)
    if why == "no reqid":
        backend.flush_sas()
        backend.flush_policies()
        backend.add_sa(src=PEER, dst=HOST)
        backend.add_policy(src=PEER, dst=HOST)
    elif why == "namespace":
        backend.cookie = None
    async with latched(backend, True) as (protocol, _, sa):
        assert status(protocol).held_by == "user"
        backend.delete_sa(sa)
        await protocol.log.until("lost")
        assert policies.calls == (["allow out"] if why == "refused" else [])


async def test_the_kernel_holds_an_outgoing_one_too(policies: Policies) -> None:
    """Its policy names the channel; while it is broken nothing passes, and nothing is lost."""
    backend = KernelBackend(trust_policy=True)
    backend.add_sa(src=HOST, dst=PEER, reqid=1)
    backend.add_sa(src=PEER, dst=HOST, reqid=1)
    backend.add_policy(src=HOST, dst=PEER, reqid=1)
    backend.add_policy(src=PEER, dst=HOST, reqid=1, direction="out")
    aged(backend)
    inward, outward = backend._sas.values()
    far = Plain()
    server = await asyncio.get_running_loop().create_server(lambda: far, HOST, 0)
    transport, protocol = await ipsec_aio.create_connection(
        Latched, HOST, port_of(server), local_addr=(PEER, 0), backend=backend, latch=PAUSE
    )
    assert status(protocol).held_by == "kernel"
    for direction, sa in ((Direction.IN, inward), (Direction.OUT, outward)):
        [template] = policies.templates(transport, direction)
        assert (template.source, template.destination) == (sa.source, sa.destination)
        assert template.reqid == 1
    backend.add_sa(src=HOST, dst=PEER, reqid=2, aead="rfc4543(gcm(aes))")
    await seen()
    assert status(protocol).state is ESTABLISHED, "the kernel drops what that one carries"
    weak = backend.rekey(outward, aead=WEAK)
    [(reason, *_)] = await protocol.log.until("broken")
    assert reason is LatchReason.QUALITY
    for direction in (Direction.IN, Direction.OUT):
        policy = policies.on(transport, direction)
        assert policy is not None
        assert policy.action is PolicyAction.BLOCK
    transport.write(b"x")
    await asyncio.sleep(0.02)
    assert "data" not in far.log.kinds
    backend.delete_sa(weak)
    assert await far.log.bytes(1) == b"x"
    assert policies.calls[-2:] == ["allow out", "allow in"]
    transport.abort()
    await protocol.log.until("lost")
    server.close()


async def test_a_latch_that_cannot_be_changed_any_more_stays(policies: Policies) -> None:
    backend = kernel_backend()
    async with latched(backend) as (protocol, _, sa):
        policies.refuse = PermissionError(1, "on purpose")
        backend.delete_sa(sa)
        await protocol.log.until("broken")
        backend.rekey(sa)
        await protocol.log.until("restored")
        assert policies.calls == ["allow out", "allow in", "block out", "allow out"]


async def test_a_requirements_policy_makes_room_for_the_latch(policies: Policies) -> None:
    backend = kernel_backend()
    options = {"require": Require(encrypted=True), "enforce": "kernel"}
    async with latched(backend, **options) as (protocol, _, _):
        assert status(protocol).held_by == "kernel"
        assert protocol.transport.get_extra_info("ipsec_enforced") == "kernel"
        calls = len(policies.calls)
        backend.add_policy(src=OTHER, dst=HOST, reqid=1)
        await asyncio.sleep(0.02)
        [template] = policies.templates(protocol.transport)
        assert template.source, "the latch's own"
        assert len(policies.calls) - calls <= 2, "the listener's alone"
