"""Batches look like single datagrams to everybody: each story is told by both, and compared."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from datagram_tools import HERE, Tokened, Witnessing, close, until
from test_datagram_evidence import SPI, marked

from ipsec_aio import Assurance, PToken, Require, create_datagram_endpoint, current_ptoken
from ipsec_aio.evidence import Evidence
from ipsec_aio.kernel import sockopts
from ipsec_aio.net import batch, datagram, witness

Told = list[tuple[Any, ...]]

V4 = (socket.AF_INET, "127.0.0.1", "127.0.0.1")
ANY4 = (socket.AF_INET, "0.0.0.0", "127.0.0.1")
V6 = (socket.AF_INET6, "::1", "::1")
ANY6 = (socket.AF_INET6, "::", "::1")
MAPPED = (socket.AF_INET6, "::", "::ffff:127.0.0.1")


class Batches:
    """How many datagrams each call brought."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        batch.batch_for(socket.AF_INET, batch.CONTROL)  # the first one tries whether it works
        real = batch.Batch.receive

        def receive(this: batch.Batch, fd: int, expected: int) -> Any:
            taken = real(this, fd, expected)
            self.sizes.append(len(taken[0]))
            return taken

        monkeypatch.setattr(batch.Batch, "receive", receive)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    return Batches(monkeypatch)


class Noting(Tokened):
    """Writes down all that can be seen from inside a callback."""

    def datagram_received(self, data: bytes, addr: Any, ptoken: Any) -> None:
        assert current_ptoken() is ptoken
        stats = self.transport.ipsec_stats
        counts = stats.received, stats.protected, stats.unknown, stats.refused
        self.log.note("data", data, addr, ptoken, counts)


def backend() -> Witnessing:
    made = Witnessing()
    for address in ("127.0.0.1", "::1"):
        made.add_sa(src=address, dst=address, spi=SPI)
        made.add_sa(src=address, dst=address, spi=0xFFEEDDCC)
    return made


def receiver(family: int, host: str) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    if not os.geteuid():
        sock.setsockopt(socket.SOL_SOCKET, sockopts.SO_RCVBUFFORCE, 64 << 20)
    sock.bind((host, 0))
    return sock


async def both(
    story: Callable[[], Awaitable[Told]], monkeypatch: pytest.MonkeyPatch, batches: Batches
) -> Told:
    """Play a story with recvmsg and in batches; return what both tell alike."""
    with monkeypatch.context() as patch:
        patch.setattr(datagram, "batch_for", lambda *_: None)
        plain = await story()
    assert not batches.sizes
    with monkeypatch.context() as patch:
        patch.setattr(datagram, "SPARSE", 0)
        batched = await story()
    assert max(batches.sizes) > 1, "nothing was received in a batch"
    assert [comparable(event) for event in batched] == [comparable(event) for event in plain]
    return batched


def comparable(event: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tokens of a channel are one object; unknown ones are of no channel, and how long one
    has waited by now is not what is compared.
    """
    return tuple(
        part.audit_string.partition(" assurance=UNKNOWN")[:2]
        if isinstance(part, PToken) and part.assurance is Assurance.UNKNOWN
        else part
        for part in event
    )


def set_mark(sock: socket.socket, spi: int) -> None:
    sock.setsockopt(socket.SOL_SOCKET, sockopts.SO_MARK, spi.to_bytes(4, "big"))


@pytest.mark.parametrize("where", [V4, ANY4, V6, ANY6, MAPPED], ids=str)
@pytest.mark.parametrize("require", [None, Require(encrypted=True)], ids=str)
async def test_sizes_and_marks(
    where: tuple[int, str, str],
    require: Require | None,
    monkeypatch: pytest.MonkeyPatch,
    batches: Batches,
) -> None:
    family, host, target = where
    facts = backend()
    sizes = [0, 1, 63, 64, 1200, 1472, 1473, 4096, 9000, 32768, 65507]
    spis = [SPI, 0, 0xFFEEDDCC, 0x12345678, SPI, SPI, 0]
    with marked(SPI, family) as sock:

        async def story() -> Told:
            own = receiver(family, host)
            transport, protocol = await create_datagram_endpoint(
                Noting, sock=own, backend=facts, require=require, deadline=0
            )
            for index in range(150):
                set_mark(sock, spis[index % len(spis)])
                size = sizes[index % len(sizes)]
                sock.sendto(bytes([index]) * size, (target, own.getsockname()[1]))
            await until(lambda: transport.ipsec_stats.received == 150)
            stats = transport.ipsec_stats
            told = [*protocol.log.of("data"), (stats,)]
            await close(transport)
            return told

        told = await both(story, monkeypatch, batches)
    assert len(told) == (151 if require is None else told[-1][0].protected + 1)
    assert 0 < told[-1][0].protected < 150
    assert {len(data) for data, *_ in told[:-1]} == set(sizes)


async def test_a_thousand_peers(monkeypatch: pytest.MonkeyPatch, batches: Batches) -> None:
    facts = Witnessing()
    peers = [f"127.0.{index // 250}.{index % 250 + 1}" for index in range(1000)]
    for index, peer in enumerate(peers):
        if index % 3:
            facts.add_sa(src=peer, dst="127.0.0.1", spi=SPI + index)
    socks: list[socket.socket] = []
    for index, peer in enumerate(peers):
        socks.append(marked(SPI + index))
        socks[-1].bind((peer, 0))

    async def story() -> Told:
        own = receiver(*V4[:2])
        transport, protocol = await create_datagram_endpoint(Noting, sock=own, backend=facts)
        for turn in range(2):
            for sock in socks:
                sock.sendto(b"%d" % turn, own.getsockname())
        told = [*await protocol.log.until("data", 2000)]
        await close(transport)
        return told

    told = await both(story, monkeypatch, batches)
    assert [addr for _, addr, *_ in told] == [sock.getsockname() for sock in socks] * 2
    assert [token.protected for _, _, token, _ in told] == [bool(i % 3) for i in range(1000)] * 2
    assert len({token for _, _, token, _ in told}) == 1000
    for sock in socks:
        sock.close()


@pytest.mark.parametrize("name", ["_IP_BUFFER", "_CONTROL_BUFFER"])
async def test_truncation(name: str, monkeypatch: pytest.MonkeyPatch, batches: Batches) -> None:
    monkeypatch.setattr(datagram, name, 32)
    facts = backend()
    with marked(SPI) as sock:

        async def story() -> Told:
            own = receiver(*ANY4[:2])
            transport, protocol = await create_datagram_endpoint(Noting, sock=own, backend=facts)
            for index in range(100):
                sock.sendto(bytes([index]) * index, ("127.0.0.1", own.getsockname()[1]))
            told = [*await protocol.log.until("data", 100)]
            await close(transport)
            return told

        told = await both(story, monkeypatch, batches)
    # Mark and packet info need more than that: every datagram has lost some of its evidence.
    cut = [name == "_CONTROL_BUFFER" or index > 32 for index in range(100)]
    assert ["truncated" in token.audit_string for _, _, token, _ in told] == cut


@pytest.mark.parametrize("at", [0, 20, 63, 64, 99])
@pytest.mark.parametrize("what", ["close", "abort", "pause", "bounce", "protocol", "raise"])
async def test_what_a_callback_may_do(
    what: str, at: int, monkeypatch: pytest.MonkeyPatch, batches: Batches
) -> None:
    facts = backend()

    class Second(Noting):
        pass

    class Acting(Noting):
        def datagram_received(self, data: bytes, addr: Any, ptoken: Any) -> None:
            super().datagram_received(data, addr, ptoken)
            if data != b"%d" % at:
                return
            if what in ("close", "abort"):
                getattr(self.transport, what)()
            elif what in ("pause", "bounce"):
                self.transport.pause_reading()
                if what == "bounce":
                    self.transport.resume_reading()
                else:
                    asyncio.get_running_loop().call_later(0.001, self.go_on)
            elif what == "protocol":
                second = Second()
                second.transport, second.log = self.transport, self.log
                self.log.note("other")
                self.transport.set_protocol(second)
            else:
                raise ZeroDivisionError

        def go_on(self) -> None:
            self.log.note("go on")
            self.transport.resume_reading()

    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    with marked(SPI) as sock:

        async def story() -> Told:
            own = receiver(*V4[:2])
            transport, protocol = await create_datagram_endpoint(Acting, sock=own, backend=facts)
            for index in range(100):
                sock.sendto(b"%d" % index, own.getsockname())
            if what in ("close", "abort"):
                await protocol.log.until("lost")
            else:
                await protocol.log.until("data", 100)
                await protocol.log.until("go on", what == "pause")
                await close(transport)
            protocol.log.events.append(("stats", transport.ipsec_stats))
            return list(protocol.log.events[1:])

        told = await both(story, monkeypatch, batches)
    received = at + 1 if what in ("close", "abort") else 100
    assert told[-1][1].received == told[-1][1].protected == received
    assert [event[0] for event in told].count("data") == received


async def test_an_error_comes_before_what_is_queued(
    monkeypatch: pytest.MonkeyPatch, batches: Batches
) -> None:
    """The kernel tells a socket's error first."""
    facts = backend()
    with marked(SPI) as sock:

        async def story() -> Told:
            own = receiver(*V4[:2])
            sock.bind(HERE) if not sock.getsockname()[1] else None
            own.connect(sock.getsockname())
            transport, protocol = await create_datagram_endpoint(Noting, sock=own, backend=facts)
            for index in range(10):
                sock.sendto(b"%d" % index, own.getsockname())
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody:
                nobody.bind(HERE)
                gone = nobody.getsockname()
            # Another destination for one datagram: nobody is there, and ICMP says so.
            own.connect(gone)
            own.send(b"anybody?")
            own.connect(sock.getsockname())
            for index in range(10, 20):
                sock.sendto(b"%d" % index, own.getsockname())
            await protocol.log.until("data", 20)
            told = [
                (kind, type(rest[0]) if kind == "error" else rest)
                for kind, *rest in protocol.log.events[1:]
            ]
            await close(transport)
            return told

        told = await both(story, monkeypatch, batches)
    assert told[0] == ("error", ConnectionRefusedError)
    assert len(told) == 21


async def test_an_error_behind_datagrams_comes_after_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(datagram, "SPARSE", 0)
    failures = [ConnectionRefusedError(), InterruptedError(), BlockingIOError()]
    real = batch.Batch.receive

    def receive(this: batch.Batch, fd: int, expected: int) -> Any:
        if received and failures:
            raise failures.pop(0)
        received.append(real(this, fd, expected))
        return received[-1]

    received: list[Any] = []
    monkeypatch.setattr(batch.Batch, "receive", receive)
    with marked(SPI) as sock:
        own = receiver(*V4[:2])
        transport, protocol = await create_datagram_endpoint(Noting, sock=own, backend=backend())
        for index in range(100):
            sock.sendto(b"%d" % index, own.getsockname())
        await protocol.log.until("data", 100)
    kinds = [event[0] for event in protocol.log.events]
    assert kinds == ["made", *["data"] * 64, "error", *["data"] * 36]
    assert not failures
    await close(transport)


async def test_a_marks_absence_is_seen_in_a_slot_that_had_one(
    monkeypatch: pytest.MonkeyPatch, batches: Batches
) -> None:
    monkeypatch.setattr(datagram, "SPARSE", 0)
    with marked(SPI) as sock:
        own = receiver(*V4[:2])
        transport, protocol = await create_datagram_endpoint(Noting, sock=own, backend=backend())
        for value in (1, 0, 1):
            own.setsockopt(socket.SOL_SOCKET, sockopts.SO_RCVMARK, value)
            before = len(protocol.log.of("data"))
            for _ in range(10):
                sock.sendto(b"x", own.getsockname())
            await protocol.log.until("data", before + 10)
    protected = [token.protected for _, _, token, _ in protocol.log.of("data")]
    assert protected == [*[True] * 10, *[False] * 10, *[True] * 10]
    assert batches.sizes == [10, 10, 10]
    await close(transport)


async def test_batches_where_much_arrives_only(batches: Batches) -> None:
    """Where nothing but single datagrams comes, it is looked for more ever more rarely."""
    with marked(SPI) as sock:
        own = receiver(*V4[:2])
        transport, protocol = await create_datagram_endpoint(Noting, sock=own, backend=backend())
        come = 0

        async def send(count: int, *, together: bool) -> None:
            nonlocal come
            for _ in range(count):
                sock.sendto(b"x", own.getsockname())
                come += 1
                if not together:
                    await protocol.log.until("data", come)
            await protocol.log.until("data", come)

        await send(100, together=False)
        assert batches.sizes == [1] * 4  # the 1st, 10th, 27th and 60th
        await send(200, together=True)
        assert max(batches.sizes) == batch.SLOTS
        assert len(batches.sizes) <= 4 + 1 + 200 // batch.SLOTS
        del batches.sizes[:]
        await send(2 + datagram.SPARSE, together=False)
        assert batches.sizes == [1, 1]
    await close(transport)


async def test_a_stamp_that_changes_is_seen_by_batches(
    monkeypatch: pytest.MonkeyPatch, batches: Batches
) -> None:
    """What may be older than the stamp is in doubt until the queue was seen empty."""
    monkeypatch.setattr(datagram, "SPARSE", 0)
    facts = backend()
    with marked(SPI) as sock:
        own = receiver(*V4[:2])
        transport, protocol = await create_datagram_endpoint(Noting, sock=own, backend=facts)
        for _ in range(100):
            sock.sendto(b"x", own.getsockname())
        facts.stamps[0].generation = 8
        facts.set_generation(8)
        await protocol.log.until("data", 100)
        assert not any(token.protected for _, _, token, _ in protocol.log.of("data"))
        for _ in range(100):
            sock.sendto(b"x", own.getsockname())
        await protocol.log.until("data", 200)
    assert all(token.protected for _, _, token, _ in protocol.log.of("data")[100:])
    assert batches.sizes == [64, 36, 64, 36]
    await close(transport)


@pytest.mark.parametrize("require", [None, Require(encrypted=True)], ids=str)
async def test_spoofed_sources_push_out_no_protected_peer(
    require: Require | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(witness, "CACHE_LIMIT", 50)
    monkeypatch.setattr(datagram, "SPARSE", 0)
    facts = backend()
    own = receiver(*V4[:2])
    transport, protocol = await create_datagram_endpoint(
        Tokened, sock=own, backend=facts, require=require
    )
    with marked(SPI) as sock, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unknown:
        unknown.setsockopt(socket.SOL_SOCKET, sockopts.SO_MARK, b"\x99\x99\x99\x99")
        for turn in range(200):
            sock.sendto(b"x", own.getsockname())
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as spoofed:
                if turn % 2:
                    spoofed.setsockopt(socket.SOL_SOCKET, sockopts.SO_MARK, b"\x99\x99\x99\x99")
                spoofed.bind((f"127.1.1.{turn + 1}", 0))
                spoofed.sendto(b"y", own.getsockname())
            if turn % 10 == 9:
                await until(lambda turn=turn: transport.ipsec_stats.received == 2 * turn + 2)
        here = sock.getsockname()[1]
    kept = transport._witness
    assert len(kept._protected) == 1
    assert len(kept._clear) <= 50
    assert len(kept._others) <= 50
    asked = [e for e in facts.evidence if e.peer_port == here and e.spi == SPI]
    assert len(asked) == 1
    assert transport.ipsec_stats.protected == 200
    await close(transport)
    assert protocol.log.of("lost")


async def test_protected_peers_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witness, "PROTECTED_LIMIT", 20)
    monkeypatch.setattr(datagram, "SPARSE", 0)
    own = receiver(*V4[:2])
    transport, protocol = await create_datagram_endpoint(Tokened, sock=own, backend=backend())
    for count in range(1, 101):
        with marked(SPI) as sock:
            sock.sendto(b"x", own.getsockname())
        await protocol.log.until("data", count)
        assert len(transport._witness._protected) <= 20
    assert transport.ipsec_stats.protected == 100
    await close(transport)


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
async def test_the_end_of_the_program_in_a_batch_loses_nothing(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datagram, "SPARSE", 0)
    first = [b"first"] * known

    class Interrupted(Tokened):
        def datagram_received(self, data: bytes, addr: Any, ptoken: Any) -> None:
            super().datagram_received(data, addr, ptoken)
            if data == b"3":
                raise KeyboardInterrupt

    def run(loop: asyncio.AbstractEventLoop) -> None:
        own = receiver(*V4[:2])
        endpoint = create_datagram_endpoint(Interrupted, sock=own, backend=backend())
        transport, protocol = loop.run_until_complete(endpoint)
        numbered = [b"%d" % index for index in range(10)]
        with marked(SPI) as sock:
            for data in first:
                sock.sendto(data, own.getsockname())
            loop.run_until_complete(protocol.log.until("data", len(first)))
            for data in numbered:
                sock.sendto(data, own.getsockname())
        count = len(first) + 10
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(protocol.log.until("data", count))
        loop.run_until_complete(protocol.log.until("data", count))
        assert [data for data, *_ in protocol.log.of("data")] == first + numbered
        assert transport.ipsec_stats.protected == count
        loop.run_until_complete(close(transport))
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    loop_class = type(asyncio.get_running_loop())
    await asyncio.to_thread(run, loop_class())


@pytest.mark.parametrize("sparse", [3, 2], ids=["singly", "in a batch"])
async def test_a_stranger_is_judged_in_nobodys_name(
    sparse: int, monkeypatch: pytest.MonkeyPatch, batches: Batches
) -> None:
    """What is asked and told while a new peer is judged is not of the peer before."""
    monkeypatch.setattr(datagram, "SPARSE", sparse)
    seen: list[PToken | None] = []

    class Asked(Witnessing):
        def resolve(self, evidence: Evidence) -> PToken:
            seen.append(current_ptoken())
            return super().resolve(evidence)

    facts = Asked()
    facts.add_sa(src="127.0.0.1", dst="127.0.0.1", spi=SPI)
    own = receiver(*V4[:2])
    transport, protocol = await create_datagram_endpoint(Noting, sock=own, backend=facts)
    with marked(SPI) as known, marked(SPI) as stranger:
        # A batch, one by which the peer is known singly, and one more.
        for count in range(1, 4):
            known.sendto(b"x", own.getsockname())
            await protocol.log.until("data", count)
        assert batches.sizes == [1]
        del seen[:]
        stranger.sendto(b"y", own.getsockname())
        await protocol.log.until("data", 4)
    assert batches.sizes == [1] * (4 - sparse)
    assert seen == [None]
    await close(transport)


async def test_an_error_is_nobodys() -> None:
    seen: list[PToken | None] = []

    class Told(Tokened):
        def error_received(self, exc: OSError) -> None:
            seen.append(current_ptoken())
            super().error_received(exc)

    peer = receiver(*V4[:2])
    transport, protocol = await create_datagram_endpoint(
        Told, remote_addr=peer.getsockname(), backend=backend()
    )
    for count in range(1, 4):
        peer.sendto(b"x", transport.get_extra_info("sockname"))
        await protocol.log.until("data", count)
    peer.close()
    transport.sendto(b"y")
    await protocol.log.until("error")
    assert seen == [None]
    await close(transport)


async def test_a_loop_that_moves_to_another_thread_takes_that_threads_region() -> None:
    def one() -> None:
        loop = loop_class()
        own = receiver(*V4[:2])
        endpoint = create_datagram_endpoint(Tokened, sock=own, backend=backend())
        transport, protocol = loop.run_until_complete(endpoint)
        first = transport._batch

        def other() -> None:
            with marked(SPI) as sock:
                for _ in range(10):
                    sock.sendto(b"x", own.getsockname())
            loop.run_until_complete(protocol.log.until("data", 10))
            threads.append(transport._batch.thread)
            assert threads[-1] == threading.get_ident()
            assert transport._batch is not first
            loop.run_until_complete(close(transport))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        loop.close()

    threads: list[int] = []
    loop_class = type(asyncio.get_running_loop())
    await asyncio.to_thread(one)
    assert len(threads) == 1


async def test_the_platform_of_these_tests_has_batches() -> None:
    transport, _ = await create_datagram_endpoint(Tokened, HERE, backend=backend())
    assert (transport._batch is not None) == sys.platform.startswith("linux")
    await close(transport)
