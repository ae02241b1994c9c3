"""A requirement stands as long as its connection: what is no longer met is held, then refused."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from datagram_tools import until
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
from ipsec_aio import Assurance, Latch, ProtectionError, Require
from ipsec_aio.kernel.sockopts import is_readable
from ipsec_aio.net import enforce, streams, terms

PEER, OTHER = "127.0.0.20", "127.0.0.21"
ENCRYPTED = Require(encrypted=True)
MOON = Require(encrypted=True, peer="moon.example.org")
WHOLE = Require(encrypted=True, mode="transport")
ENFORCED: dict[str, Any] = {"require": WHOLE, "enforce": "kernel"}
PAUSE = Latch(on_break="pause")
FAR = 60.0
"""A deadline that no test waits for."""


class Told(Tokened):
    """Notes what it is told of its protection."""

    def protection_changed(self, old: Any, new: Any) -> None:
        self.log.note("changed", new.assurance)


class ToldBuffered(Buffered):
    protection_changed = Told.protection_changed


class Aging(RecordingBackend):
    """Trusts its policies, without a stamp. Its clock can be put forward."""

    def __init__(self, *, trust_policy: bool = True) -> None:
        super().__init__(trust_policy=trust_policy)
        self.ahead = 10.0
        self.clock = self.resolver.clock = lambda: time.monotonic() + self.ahead

    def age(self) -> None:
        """Let policies come of age."""
        self.ahead += 1.0
        self.drain()


def protecting(backend: Any = None, **changes: Any) -> Any:
    """A backend by which all between us and our peer is protected, as it infers."""
    backend = backend or Aging()
    backend.lose_stamp()
    backend.add_sa(src=PEER, dst=HOST, reqid=1, **changes)
    backend.add_policy(src=PEER, dst=HOST, reqid=1)
    backend.add_policy(src=HOST, dst=PEER, reqid=1, direction="out")
    if isinstance(backend, Aging):
        backend.age()
    return backend


def stamped() -> RecordingBackend:
    backend = RecordingBackend()
    backend.add_sa(src=PEER, dst=HOST, reqid=1)
    return backend


@pytest.fixture(params=["accepted", "outgoing"])
def side(request: Any) -> str:
    return str(request.param)


@contextlib.asynccontextmanager
async def standing(
    side: str, backend: Any, kind: Any = Told, tls: bool = False, **options: Any
) -> AsyncIterator[tuple[Any, Any, Any]]:
    """A connection that meets its requirement: our protocol, the peer's, and our server if any."""
    options = {"require": ENCRYPTED, "deadline": FAR, **options}
    theirs: dict[str, Any] = {}
    if tls:
        mine = {"ssl": server_tls()}, {"ssl": client_tls(), "server_hostname": "localhost"}
        ours, theirs = mine if side == "accepted" else mine[::-1]
        options |= ours
    protocol = kind()
    if side == "accepted":
        async with (
            serving(lambda: protocol, backend, **options) as server,
            connected(port_of(server), source=PEER, **theirs) as client,
        ):
            await protocol.log.until("made")
            try:
                yield protocol, client, server
            finally:
                protocol.transport.abort()
                await protocol.log.until("lost")
        return
    loop = asyncio.get_running_loop()
    far = Plain()
    listening = await loop.create_server(lambda: far, PEER, 0, **theirs)
    await ipsec_aio.create_connection(
        lambda: protocol,
        PEER,
        port_of(listening),
        local_addr=(HOST, 0),
        backend=backend,
        **options,
    )
    await far.log.until("made")
    try:
        yield protocol, far, None
    finally:
        protocol.transport.abort()
        await protocol.log.until("lost")
        await far.log.until("lost")
        listening.close()


async def seen() -> None:
    """Let what the backend was told go round."""
    for _ in range(3):
        await asyncio.sleep(0)


async def refused(protocol: Any, peer: Any, clause: str = "encrypted") -> None:
    """Wait until a connection was refused, and see that both ends know it."""
    [(error,)] = await protocol.log.until("lost")
    assert isinstance(error, ProtectionError)
    assert error.clause == clause
    [(end,)] = await peer.log.until("lost")
    assert end is None or isinstance(end, ConnectionResetError)
    assert "eof" not in protocol.log.kinds


# -- what is lost ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Told, ToldBuffered, Plain])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_without_its_stamp_nothing_more_is_delivered(
    kind: Any, tls: bool, caplog: Any
) -> None:
    backend = stamped()
    async with standing("accepted", backend, kind, tls) as (protocol, client, server):
        client.transport.write(b"a")
        assert await protocol.log.bytes(1) == b"a"
        backend.lose_stamp()
        await seen()
        client.transport.write(b"perhaps in clear")
        await refused(protocol, client)
        assert await protocol.log.bytes(1) == b"a"
        told = [(Assurance.UNKNOWN,)] if kind is not Plain else []
        assert protocol.log.of("changed") == told
        assert protocol.log.kinds[-1] == "lost"
        stats = server.ipsec_stats
        assert (stats.received, stats.protected, stats.refused) == (1, 1, 1)
        assert stats.refused_by == {"encrypted": 1}
    [record] = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "the stamp was lost" in record.getMessage()


async def test_many_refusals_are_one_line_in_the_log(caplog: Any) -> None:
    backend = stamped()
    async with contextlib.AsyncExitStack() as stack:
        found = [await stack.enter_async_context(standing("accepted", backend)) for _ in range(3)]
        servers = {id(server) for _, _, server in found}
        backend.lose_stamp()
        for protocol, client, _ in found:
            await refused(protocol, client)
    assert len(caplog.records) == len(servers)
    caplog.clear()
    backend = protecting()
    async with contextlib.AsyncExitStack() as stack:
        found = [await stack.enter_async_context(standing("outgoing", backend)) for _ in range(3)]
        backend.flush_policies()
        for protocol, client, _ in found:
            await refused(protocol, client)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("what", ["policies", "all", "backend", "interfaces"])
async def test_what_is_not_demanded_any_more_ends_it_at_once(side: str, what: str) -> None:
    backend = protecting()
    async with standing(side, backend) as (protocol, peer, server):
        if what == "all":
            backend.flush_sas()
        if what in ("policies", "all"):
            backend.flush_policies()
        elif what == "backend":
            await backend.aclose()
        else:
            backend.set_opaque_interfaces(True)
        await seen()
        peer.transport.write(b"perhaps in clear")
        await refused(protocol, peer)
        assert "data" not in protocol.log.kinds
        assert protocol.log.kinds[:2] == ["made", "changed"]
        if server is not None:
            assert server.ipsec_stats.refused_by == {"encrypted": 1}


async def test_without_a_requirement_it_goes_on(side: str) -> None:
    backend = protecting()
    async with standing(side, backend, require=None) as (protocol, peer, _):
        backend.flush_policies()
        await seen()
        peer.transport.write(b"x")
        assert await protocol.log.bytes(1) == b"x"
        assert protocol.log.of("changed") == [(Assurance.UNKNOWN,)]


async def test_what_is_still_met_goes_on(side: str) -> None:
    backend = protecting()
    async with standing(side, backend) as (protocol, peer, _):
        old = protocol.transport.get_extra_info("ptoken")
        (sa,) = backend._sas.values()
        backend.rekey(sa, aead=ipsec_aio.sa.Algorithm("rfc4106(gcm(aes))", 288, 128))
        backend.delete_sa(sa)
        backend.ahead += 20
        backend.drain()
        await seen()
        assert protocol.transport.get_extra_info("ptoken") is not old
        peer.transport.write(b"x")
        assert await protocol.log.bytes(1) == b"x"


async def test_a_reader_is_told_why(side: str) -> None:
    """It is not the end of the stream."""
    backend = protecting()
    loop = asyncio.get_running_loop()
    accepted: asyncio.Queue[Any] = asyncio.Queue()
    options = {"backend": backend, "require": ENCRYPTED}
    if side == "accepted":
        server: Any = await ipsec_aio.start_server(
            lambda *ends: accepted.put_nowait(ends), HOST, 0, **options
        )
        far, _ = await loop.create_connection(Plain, HOST, port_of(server), local_addr=(PEER, 0))
        reader, writer = await accepted.get()
    else:
        server = await loop.create_server(Plain, PEER, 0)
        reader, writer = await ipsec_aio.open_connection(
            PEER, port_of(server), local_addr=(HOST, 0), **options
        )
        far = None
    backend.flush_policies()
    with pytest.raises(ProtectionError, match="encrypted"):
        await reader.read()
    writer.close()
    if far is not None:
        far.abort()
    server.close()


async def test_who_closes_when_told_is_not_refused() -> None:
    class Leaving(Told):
        def protection_changed(self, old: Any, new: Any) -> None:
            super().protection_changed(old, new)
            self.transport.abort()

    backend = stamped()
    async with standing("accepted", backend, Leaving) as (protocol, _, server):
        backend.lose_stamp()
        assert await protocol.log.until("lost") == [(None,)]
        assert server.ipsec_stats.refused == 0


async def test_who_raises_when_told_is_refused_all_the_same() -> None:
    class Raising(Told):
        def protection_changed(self, old: Any, new: Any) -> None:
            raise ZeroDivisionError("on purpose")

    raised: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: raised.append(context))
    backend = stamped()
    async with standing("accepted", backend, Raising) as (protocol, client, _):
        backend.lose_stamp()
        await refused(protocol, client)
    assert len(raised) == 1


# -- what cannot be told for now -------------------------------------------------------------


@pytest.mark.parametrize("kind", [Told, ToldBuffered, Plain])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_while_tables_are_read_again_nothing_is_read(
    policies: Policies, side: str, kind: Any, tls: bool
) -> None:
    backend = protecting(KernelBackend())
    async with standing(side, backend, kind, tls, **ENFORCED) as (protocol, peer, server):
        first = protocol.transport.get_extra_info("ptoken")
        backend.lose_events()
        await seen()
        assert not protocol.transport.is_reading()
        peer.transport.write(b"meanwhile")
        protocol.transport.write(b"answer")
        assert await peer.log.bytes(6) == b"answer"
        backend.recover()
        assert await protocol.log.bytes(9) == b"meanwhile"
        assert protocol.transport.is_reading()
        assert protocol.transport.get_extra_info("ptoken") is first
        peer.transport.write(b"more")
        assert await protocol.log.bytes(13) == b"meanwhilemore"
        if server is not None:
            assert server.ipsec_stats.refused == 0


async def test_a_stamp_stands_while_tables_are_read_again() -> None:
    backend = stamped()
    async with standing("accepted", backend) as (protocol, client, _):
        backend.lose_events()
        await seen()
        client.transport.write(b"x")
        assert await protocol.log.bytes(1) == b"x"
        assert "changed" not in protocol.log.kinds


async def test_what_the_tables_tell_then_counts(side: str) -> None:
    backend = protecting()
    async with standing(side, backend) as (protocol, peer, _):
        backend.lose_events()
        await seen()
        backend.flush_policies()
        peer.transport.write(b"perhaps in clear")
        backend.recover()
        await refused(protocol, peer)
        assert "data" not in protocol.log.kinds


async def test_the_deadline_ends_it(side: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(terms, "SETTLING", 0.01)
    backend = protecting()
    async with standing(side, backend, deadline=0.01) as (protocol, peer, server):
        backend.lose_events()
        await seen()
        peer.transport.write(b"unheard")
        await refused(protocol, peer)
        assert "data" not in protocol.log.kinds
        if server is not None:
            assert server.ipsec_stats.refused_by == {"encrypted": 1}


async def test_news_at_the_last_moment_count(policies: Policies, side: str) -> None:
    backend = protecting(KernelBackend())
    async with standing(side, backend, **ENFORCED) as (protocol, peer, _):
        backend.lose_events()
        await seen()
        connection = protocol.transport._ipsec_connection
        peer.transport.write(b"x")
        backend.recover()
        connection.hold._expire()
        assert await protocol.log.bytes(1) == b"x"


async def test_what_came_meanwhile_is_judged_by_no_policy(side: str) -> None:
    """Where policies alone are asked, what lies in the queue may have come while there was none."""
    for meanwhile in (b"", b"perhaps in clear"):
        backend = protecting()
        async with standing(side, backend, deadline=0.2) as (protocol, peer, _):
            backend.lose_events()
            await seen()
            if meanwhile:
                peer.transport.write(meanwhile)
                await until(lambda p=protocol: is_readable(p.transport.get_extra_info("socket")))
            backend.recover()
            if meanwhile:
                await refused(protocol, peer)
                assert "data" not in protocol.log.kinds
            else:
                await until(protocol.transport.is_reading)
                peer.transport.write(b"x")
                assert await protocol.log.bytes(1) == b"x"


async def test_a_deadline_of_none_waits_for_nobody(side: str) -> None:
    backend = protecting()
    async with standing(side, backend, deadline=0) as (protocol, peer, _):
        backend.lose_events()
        await refused(protocol, peer)


@pytest.mark.parametrize("name", ["moon.example.org", "sun.example.org"])
async def test_whose_a_new_sa_is_is_awaited(side: str, name: str) -> None:
    backend = protecting(peer="moon.example.org")
    (sa,) = backend._sas.values()
    async with standing(side, backend, require=MOON) as (protocol, peer, _):
        new = backend.rekey(sa, identity_pending=True)
        await seen()
        peer.transport.write(b"whose")
        await asyncio.sleep(0.02)
        assert "data" not in protocol.log.kinds
        backend.identify(new, peer=name)
        if name == "moon.example.org":
            assert await protocol.log.bytes(5) == b"whose"
        else:
            await asyncio.sleep(0.02)
            assert "data" not in protocol.log.kinds, "by either, so it cannot be told"
            backend.delete_sa(sa)
            backend.ahead += 20
            backend.drain()
            await refused(protocol, peer, "peer")
            assert "data" not in protocol.log.kinds


@pytest.mark.parametrize("when", ["before", "meanwhile"])
async def test_who_paused_reading_himself_stays_paused(
    policies: Policies, side: str, when: str
) -> None:
    backend = protecting(KernelBackend())
    async with standing(side, backend, **ENFORCED) as (protocol, peer, _):
        transport = protocol.transport
        if when == "before":
            transport.pause_reading()
        backend.lose_events()
        await seen()
        transport.resume_reading()
        transport.pause_reading()
        peer.transport.write(b"x")
        backend.recover()
        await asyncio.sleep(0.02)
        assert "data" not in protocol.log.kinds
        assert not transport.is_reading()
        transport.resume_reading()
        assert await protocol.log.bytes(1) == b"x"


async def test_who_resumes_meanwhile_reads_when_that_is_over(policies: Policies, side: str) -> None:
    backend = protecting(KernelBackend())
    async with standing(side, backend, **ENFORCED) as (protocol, peer, _):
        transport = protocol.transport
        transport.pause_reading()
        backend.lose_events()
        await seen()
        backend.drain()
        transport.resume_reading()
        peer.transport.write(b"x")
        await asyncio.sleep(0.02)
        assert "data" not in protocol.log.kinds
        backend.recover()
        assert await protocol.log.bytes(1) == b"x"
        transport.pause_reading()
        assert not transport.is_reading()


async def test_what_was_read_before_the_handover_waits_too(policies: Policies) -> None:
    """On uvloop, where a piece is kept that was read before it was known who the peer is."""

    class Pausing(Told):
        def connection_made(self, transport: Any, ptoken: Any) -> None:
            super().connection_made(transport, ptoken)
            transport.pause_reading()

    backend = protecting(KernelBackend(), identity_pending=True)
    (sa,) = backend._sas.values()
    protocol = Pausing()
    waits = Log()
    holds_one = streams._Accepting.holds_one

    def noted(self: Any) -> bool:
        waits.note("held")
        return holds_one(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams._Accepting, "holds_one", noted)
        async with (
            serving(
                lambda: protocol,
                backend,
                require=MOON & WHOLE,
                enforce="kernel",
                deadline=FAR,
            ) as server,
            connected(port_of(server), source=PEER) as client,
        ):
            await waits.until("held")
            client.transport.write(b"early")
            await asyncio.sleep(0.02)
            backend.identify(sa, peer="moon.example.org")
            await protocol.log.until("made")
            backend.lose_events()
            await seen()
            protocol.transport.resume_reading()
            await asyncio.sleep(0.02)
            assert "data" not in protocol.log.kinds
            backend.recover()
            assert await protocol.log.bytes(5) == b"early"


async def test_one_that_is_closed_while_it_is_held(side: str) -> None:
    backend = protecting()
    async with standing(side, backend, deadline=0.02) as (protocol, _, server):
        backend.lose_events()
        await seen()
        protocol.transport.close()
        await protocol.log.until("lost")
        await asyncio.sleep(0.04)
        if server is not None:
            assert server.ipsec_stats.refused == 0


@pytest.mark.parametrize("when", ["during", "after"])
async def test_an_upgrade_to_tls_is_held_too(
    policies: Policies, when: str, monkeypatch: Any
) -> None:
    backend = protecting(KernelBackend())
    inner = Told()
    dress = streams.dress

    def late(transport: Any, connection: Any) -> Any:
        """Dress the new transport right after the connection was held."""
        backend.lose_events()
        connection.review()
        return dress(transport, connection)

    class Upgrading(Told):
        def data_received(self, data: bytes) -> None:
            self.task = asyncio.ensure_future(self.upgrade())

        async def upgrade(self) -> None:
            self.transport.write(b"go")
            with pytest.MonkeyPatch.context() as patch:
                if when == "after":
                    patch.setattr(streams, "dress", late)
                inner.transport = await ipsec_aio.start_tls(
                    self.transport, inner, server_tls(), server_side=True
                )
            inner.log.note("made")

    async with standing("accepted", backend, Upgrading, **ENFORCED) as (first, client, _):
        loop = asyncio.get_running_loop()
        client.transport.write(b"STARTTLS")
        await client.log.bytes(2)
        upgrading = asyncio.ensure_future(
            loop.start_tls(client.transport, client, client_tls(), server_hostname="localhost")
        )
        if when == "during":
            backend.lose_events()
            await asyncio.sleep(0.02)
            assert not upgrading.done(), "the handshake is not read either"
        else:
            made = await upgrading
            await inner.log.until("made")
            made.write(b"secret")
            await asyncio.sleep(0.02)
            assert "data" not in inner.log.kinds
        backend.recover()
        if when == "during":
            made = await upgrading
            made.write(b"secret")
        assert await inner.log.bytes(6) == b"secret"
        backend.set_opaque_interfaces(True)
        [(error,)] = await inner.log.until("lost")
        assert isinstance(error, ProtectionError)
        first.log.note("lost")
        made.abort()


# -- latches ---------------------------------------------------------------------------------


class Latched(Told):
    def latch_broken(self, reason: Any) -> None:
        self.log.note("broken", reason)

    def latch_restored(self) -> None:
        self.log.note("restored", self.transport.get_extra_info("ptoken").assurance)


async def test_under_a_latch_its_own_ends_count(side: str) -> None:
    backend = protecting()
    async with standing(side, backend, Latched, latch=PAUSE) as (protocol, peer, _):
        backend.flush_policies()
        await protocol.log.until("broken")
        await protocol.log.until("changed")
        backend.add_policy(src=PEER, dst=HOST, reqid=1)
        backend.add_policy(src=HOST, dst=PEER, reqid=1, direction="out")
        await protocol.log.until("restored")
        peer.transport.write(b"mean")
        assert await protocol.log.bytes(4) == b"mean"
        assert "lost" not in protocol.log.kinds


async def test_what_certainly_falls_short_ends_a_latched_one_too(side: str) -> None:
    backend = protecting()
    policy = next(p for p in backend._policies.values() if p.direction == 0)
    named = Require(policy_name=f"{policy.selector} priority 0")
    async with standing(side, backend, Latched, latch=PAUSE, require=named) as found:
        protocol, peer, _ = found
        backend.add_policy(src=PEER, dst=HOST, reqid=1, src_port=0, proto="tcp")
        backend.delete_policy(policy)
        await seen()
        await refused(protocol, peer, "policy_name")
        assert "broken" not in protocol.log.kinds


async def test_what_falls_short_when_a_latch_is_restored_gets_nothing() -> None:
    """What was kept is not delivered first."""
    backend = protecting()
    policy = next(p for p in backend._policies.values() if p.direction == 0)
    named = Require(policy_name=f"{policy.selector} priority 0")
    async with standing("accepted", backend, Latched, latch=PAUSE, require=named) as found:
        protocol, peer, _ = found
        (sa,) = backend._sas.values()
        backend.delete_sa(sa)
        await protocol.log.until("broken")
        protocol.transport._guard.keep("data_received", protocol.data_received, b"kept")
        protocol.transport.write(b"secret")
        backend.add_policy(src=PEER, dst=HOST, reqid=1, proto="tcp")
        backend.delete_policy(policy)
        backend.age()
        await seen()
        assert "lost" not in protocol.log.kinds
        backend.rekey(sa)
        await refused(protocol, peer, "policy_name")
        assert "data" not in protocol.log.kinds
        assert "data" not in peer.log.kinds


# -- the kernel's policies -------------------------------------------------------------------


@pytest.fixture
def policies(monkeypatch: Any) -> Policies:
    monkeypatch.setattr(enforce, "REFRESH", 0.0)
    return Policies(monkeypatch, real=False)


async def test_the_listeners_policy_stands_in_for_the_stamp(policies: Policies) -> None:
    backend = protecting(KernelBackend())
    backend.restore_stamp()
    options = {"require": WHOLE, "enforce": "kernel"}
    async with standing("accepted", backend, **options) as (protocol, client, _):
        token = protocol.transport.get_extra_info("ptoken")
        assert token.assurance is Assurance.EXACT
        backend.lose_stamp()
        await seen()
        client.transport.write(b"x")
        assert await protocol.log.bytes(1) == b"x"
        assert protocol.transport.get_extra_info("ptoken") is token
        backend.set_opaque_interfaces(True)
        await refused(protocol, client)


async def test_another_policy_does_not_stand_in_for_it(policies: Policies) -> None:
    backend = protecting(KernelBackend())
    backend.restore_stamp()
    options = {"require": ENCRYPTED, "enforce": "kernel"}
    async with standing("accepted", backend, **options) as (protocol, client, _):
        backend.lose_stamp()
        await seen()
        backend.flush_policies()
        backend.add_policy(src=PEER, dst=HOST, mode="tunnel")
        await refused(protocol, client)


async def test_while_the_kernel_lets_nothing_in_there_is_time(policies: Policies) -> None:
    backend = protecting(KernelBackend())
    (sa,) = backend._sas.values()
    options = {"require": WHOLE, "enforce": "kernel", "deadline": 0.01}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terms, "SETTLING", 0.01)
        async with standing("outgoing", backend, **options) as (protocol, peer, _):
            backend.delete_sa(sa)
            backend.clock = backend.resolver.clock = lambda: time.monotonic() + 20
            backend.drain()
            await seen()
            peer.transport.write(b"x")
            await asyncio.sleep(0.1)
            assert protocol.log.kinds == ["made", "changed"]
            backend.rekey(sa)
            assert await protocol.log.bytes(1) == b"x"
            backend.lose_events()
            await seen()
            peer.transport.write(b"y")
            await asyncio.sleep(0.1)
            backend.recover()
            assert await protocol.log.bytes(2) == b"xy"
            backend.set_opaque_interfaces(True)
            await refused(protocol, peer)


async def test_an_sa_of_somebody_unknown_ends_it_all_the_same(policies: Policies) -> None:
    backend = protecting(KernelBackend(), peer="moon.example.org")
    (sa,) = backend._sas.values()
    options = {"require": MOON, "enforce": "kernel", "deadline": 0.01}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(terms, "SETTLING", 0.01)
        async with standing("outgoing", backend, **options) as (protocol, peer, _):
            backend.rekey(sa, peer=None)
            await seen()
            peer.transport.write(b"whose")
            await refused(protocol, peer, "peer")
            assert "data" not in protocol.log.kinds
