"""Datagrams whose peer is not known yet: held, in order, and delivered to nobody else's token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from datagram_tools import HERE, Plain, Tokened, close, until

import ipsec_aio
from ipsec_aio import MemoryBackend, Require, create_datagram_endpoint
from ipsec_aio.hold import PEER_LIMIT

pytestmark = pytest.mark.usefixtures("way")

MOON = Require(encrypted=True, peer="moon.example.org")
FAR = 60.0
"""A deadline that no test waits for."""


class Bench:
    """A server on 127.0.0.1 that wants moon, and clients by address."""

    def __init__(self, backend: MemoryBackend) -> None:
        self.backend = backend
        self.transport: Any = None
        self.protocol: Any = None
        self.clients: dict[str, Any] = {}
        self.sent = 0

    async def send(self, *payloads: bytes, source: str = "127.0.0.2") -> None:
        """Send, and wait until the server has taken it in."""
        if source not in self.clients:
            there = self.transport.get_extra_info("sockname")
            self.clients[source], _ = await create_datagram_endpoint(
                Tokened, (source, 0), there, backend=self.backend
            )
        for data in payloads:
            self.clients[source].sendto(data)
        self.sent += len(payloads)
        await until(lambda: self.transport.ipsec_stats.received == self.sent)

    @property
    def got(self) -> list[bytes]:
        return [event[0] for event in self.protocol.log.of("data")]

    @property
    def stats(self) -> Any:
        return self.transport.ipsec_stats


@asynccontextmanager
async def bench(
    require: Require | None = MOON, deadline: float = FAR, server: Any = Tokened
) -> AsyncIterator[Bench]:
    made = Bench(MemoryBackend())
    made.transport, made.protocol = await create_datagram_endpoint(
        server, HERE, backend=made.backend, require=require, deadline=deadline
    )
    try:
        yield made
    finally:
        for transport in (made.transport, *made.clients.values()):
            if not transport.is_closing():
                await close(transport)


def peer(backend: MemoryBackend, source: str = "127.0.0.2", **fields: Any) -> Any:
    fields = fields or {"identity_pending": True}
    return backend.add_sa(src=source, dst="127.0.0.1", **fields)


async def test_what_waits_for_an_identity_is_delivered_when_it_is_the_right_one() -> None:
    async with bench() as b:
        sa = peer(b.backend)
        await b.send(b"one", b"two")
        assert b.got == []
        assert (b.stats.held, b.stats.refused) == (2, 0)
        b.backend.identify(sa, peer="moon.example.org")
        await b.protocol.log.until("data", 2)
        await b.send(b"three")
        told = b.protocol.log.of("data")
        assert [event[0] for event in told] == [b"one", b"two", b"three"]
        assert {event[1] for event in told} == {b.clients["127.0.0.2"].get_extra_info("sockname")}
        # All of them carry the channel's own token.
        assert len({event[2] for event in told}) == 1
        assert str(told[0][2].peer) == "moon.example.org"
        assert (b.stats.held, b.stats.dropped, b.stats.protected) == (2, 0, 3)


async def test_and_refused_when_it_is_not() -> None:
    async with bench() as b:
        sa = peer(b.backend)
        await b.send(b"one", b"two")
        b.backend.identify(sa, peer="mallory.example.org")
        ((_, error), _) = await b.protocol.log.until("refused", 2)
        assert error.clause == "peer"
        assert "mallory" in error.reason
        assert b.got == []
        assert b.stats.refused_by == {"peer": 2}
        assert b.stats.dropped == 0


async def test_a_token_whose_channel_is_known_is_delivered_as_that_channel() -> None:
    async with bench() as b:
        first = peer(b.backend, peer="moon.example.org")
        await b.send(b"one")
        second = b.backend.rekey(first, identity_pending=True)
        await b.send(b"two")
        assert b.got == [b"one"]
        b.backend.identify(second, peer="moon.example.org")
        one, two = await b.protocol.log.until("data", 2)
        assert one[2] is two[2]


async def test_plain_protocols_wait_too() -> None:
    async with bench(server=Plain) as b:
        sa = peer(b.backend)
        await b.send(b"one")
        assert b.got == []
        b.backend.identify(sa, peer="moon.example.org")
        assert (await b.protocol.log.until("data"))[0][0] == b"one"


async def test_without_a_requirement_nothing_waits() -> None:
    async with bench(require=None) as b:
        peer(b.backend)
        await b.send(b"one")
        assert b.got == [b"one"]
        assert b.protocol.log.of("data")[0][2].pending


async def test_nor_where_the_identity_does_not_matter() -> None:
    async with bench(require=Require(encrypted=True)) as b:
        peer(b.backend)
        await b.send(b"one")
        assert b.got == [b"one"]


async def test_what_is_refused_anyway_does_not_wait() -> None:
    """It is clear, or not encrypted: no identity would help."""
    async with bench() as b:
        peer(b.backend, encryption="ecb(cipher_null)", authentication="hmac(sha256)")
        await b.send(b"null")
        await b.send(b"clear", source="127.0.0.3")
        assert b.stats.held == 0
        assert b.stats.refused_by == {"encrypted": 2}


async def test_nothing_overtakes_what_waits() -> None:
    async with bench() as b:
        old = peer(b.backend, peer="moon.example.org")
        new = b.backend.rekey(old, identity_pending=True)
        await b.send(b"one")
        newest = b.backend.rekey(old)
        await b.send(b"two")
        assert b.stats.held == 2
        assert b.got == []
        b.backend.identify(new, peer="moon.example.org")
        await b.protocol.log.until("data", 2)
        assert b.got == [b"one", b"two"]
        # With nothing before them, they do not wait.
        await b.send(b"three")
        assert b.stats.held == 2
        assert b.got == [b"one", b"two", b"three"]
        assert newest


async def test_what_waited_behind_another_goes_on_when_that_is_refused() -> None:
    async with bench() as b:
        old = peer(b.backend, peer="moon.example.org")
        new = b.backend.rekey(old, identity_pending=True)
        await b.send(b"one")
        b.backend.rekey(old)
        await b.send(b"two")
        b.backend.identify(new, peer="mallory.example.org")
        await b.protocol.log.until("data")
        assert b.got == [b"two"]
        assert b.stats.refused_by == {"peer": 1}


async def test_other_hosts_do_not_wait() -> None:
    async with bench() as b:
        peer(b.backend)
        peer(b.backend, "127.0.0.3", peer="moon.example.org")
        await b.send(b"waits")
        await b.send(b"does not", source="127.0.0.3")
        assert b.got == [b"does not"]


async def test_an_sa_may_be_late_too() -> None:
    async with bench(require=Require(encrypted=True)) as b:
        b.backend.hold_events()
        peer(b.backend, peer="moon.example.org")
        await b.send(b"one")
        assert (b.got, b.stats.held) == ([], 1)
        b.backend.release_events()
        ((_, _, token),) = await b.protocol.log.until("data")
        assert token.protected
        await b.send(b"two")
        assert b.protocol.log.of("data")[1][2] is token


async def test_it_does_not_wait_for_ever() -> None:
    async with bench(deadline=0.05) as b:
        sa = peer(b.backend)
        await b.send(b"one")
        ((_, error),) = await b.protocol.log.until("refused")
        assert error.clause == "peer"
        assert b.got == []
        assert (b.stats.held, b.stats.dropped, b.stats.refused) == (1, 1, 1)
        b.backend.identify(sa, peer="moon.example.org")
        await b.send(b"two")
        assert b.got == [b"two"]


async def test_each_has_its_own_deadline() -> None:
    async with bench(deadline=0.05) as b:
        sa = peer(b.backend)
        await b.send(b"one")
        await b.protocol.log.until("refused")
        await b.send(b"two")
        assert b.stats.held == 2
        b.backend.identify(sa, peer="moon.example.org")
        await b.protocol.log.until("data")
        assert b.got == [b"two"]


async def test_with_no_time_nothing_is_held() -> None:
    async with bench(deadline=0) as b:
        peer(b.backend)
        await b.send(b"one")
        assert (b.stats.held, b.stats.dropped, b.stats.refused) == (0, 1, 1)


async def test_there_is_no_room_without_end() -> None:
    async with bench() as b:
        sa = peer(b.backend)
        for number in range(PEER_LIMIT):
            await b.send(b"%d" % number)
        newest = b.backend.rekey(sa, peer="moon.example.org")
        await b.send(b"over")
        b.backend.delete_sa(newest)
        await b.send(b"over")
        assert (b.stats.held, b.stats.dropped) == (PEER_LIMIT, 2)
        assert b.stats.refused_by == {"deadline": 1, "peer": 1}
        b.backend.identify(sa, peer="moon.example.org")
        await b.protocol.log.until("data", PEER_LIMIT)
        assert b.got == [b"%d" % number for number in range(PEER_LIMIT)]


async def test_who_pauses_reading_gets_nothing() -> None:
    async with bench() as b:
        sa = peer(b.backend)
        await b.send(b"one", b"two")
        b.transport.pause_reading()
        b.backend.identify(sa, peer="moon.example.org")
        for _ in range(5):
            await asyncio.sleep(0)
        assert b.got == []
        b.transport.resume_reading()
        await b.protocol.log.until("data", 2)
        assert b.got == [b"one", b"two"]


async def test_deadlines_pass_while_reading_is_paused() -> None:
    async with bench(deadline=0.02) as b:
        peer(b.backend)
        await b.send(b"one")
        b.transport.pause_reading()
        await asyncio.sleep(0.1)
        assert b.stats.refused == 0
        b.transport.resume_reading()
        await b.protocol.log.until("refused")
        assert b.stats.dropped == 1


class Pausing(Tokened):
    """Takes one at a time."""

    def datagram_received(self, data: bytes, addr: Any, ptoken: Any) -> None:
        super().datagram_received(data, addr, ptoken)
        self.transport.pause_reading()


async def test_a_callback_may_pause_amid_what_was_held() -> None:
    async with bench(server=Pausing) as b:
        sa = peer(b.backend)
        await b.send(b"one", b"two", b"three")
        b.backend.identify(sa, peer="moon.example.org")
        for count in (1, 2, 3):
            await b.protocol.log.until("data", count)
            assert len(b.got) == count
            b.transport.resume_reading()
        assert b.got == [b"one", b"two", b"three"]


class Closing(Tokened):
    """Has had enough after one."""

    def datagram_received(self, data: bytes, addr: Any, ptoken: Any) -> None:
        super().datagram_received(data, addr, ptoken)
        self.transport.close()


async def test_a_callback_may_close_amid_what_was_held() -> None:
    async with bench(server=Closing) as b:
        sa = peer(b.backend)
        await b.send(b"one", b"two", b"three")
        b.backend.identify(sa, peer="moon.example.org")
        await b.protocol.log.until("lost")
        assert b.got == [b"one"]
        assert b.stats.dropped == 2


class Failing(Tokened):
    def datagram_received(self, data: bytes, addr: Any, ptoken: Any) -> None:
        super().datagram_received(data, addr, ptoken)
        raise LookupError(data)


async def test_a_callback_that_fails_costs_its_own_datagram_only() -> None:
    failures: list[Any] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: failures.append(context["exception"]))
    async with bench(server=Failing) as b:
        sa = peer(b.backend)
        await b.send(b"one", b"two")
        b.backend.identify(sa, peer="moon.example.org")
        await b.protocol.log.until("data", 2)
        assert [str(error) for error in failures] == ["b'one'", "b'two'"]


@pytest.mark.parametrize("way_out", ["close", "abort"])
async def test_what_waits_is_dropped_at_the_end(way_out: str) -> None:
    async with bench() as b:
        sa = peer(b.backend)
        await b.send(b"one", b"two")
        getattr(b.transport, way_out)()
        assert b.stats.dropped == 2
        await b.protocol.log.until("lost")
        b.backend.identify(sa, peer="moon.example.org")
        for _ in range(5):
            await asyncio.sleep(0)
        assert b.got == []
        assert b.protocol.log.kinds[-1] == "lost"


async def test_the_end_of_the_backend_ends_the_waiting() -> None:
    async with bench() as b:
        peer(b.backend)
        await b.send(b"one")
        await b.backend.aclose()
        await b.protocol.log.until("refused")
        assert b.got == []
        assert b.stats.refused_by == {"peer": 1}


async def test_a_resync_ends_the_waiting() -> None:
    async with bench() as b:
        sa = peer(b.backend)
        await b.send(b"one")
        b.backend.lose_events()
        b.backend.identify(sa, peer="moon.example.org")
        b.backend.recover()
        await b.protocol.log.until("refused")
        assert b.got == []
        await b.send(b"two")
        assert b.got == [b"two"]


async def test_the_token_in_a_held_datagrams_callback_is_current() -> None:
    seen: list[Any] = []

    class Asking(Tokened):
        def datagram_received(self, data: bytes, addr: Any, ptoken: Any) -> None:
            super().datagram_received(data, addr, ptoken)
            seen.append(ipsec_aio.current_ptoken())

    async with bench(server=Asking) as b:
        sa = peer(b.backend)
        await b.send(b"one")
        b.backend.identify(sa, peer="moon.example.org")
        ((_, _, token),) = await b.protocol.log.until("data")
        assert seen == [token]
