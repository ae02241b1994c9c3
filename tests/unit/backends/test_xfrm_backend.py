"""The xfrm backend: on a kernel in memory, and on this machine's own in fresh namespaces."""

from __future__ import annotations

import asyncio
import errno
import gc
import io
import logging
import os
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import replace

import pytest
import xfrm_messages as m
from fake_netlink import FakeKernel, Reply, error, link
from xfrm_bench import FakeBench, synced

from ipsec_aio.backends.xfrm import XfrmBackend
from ipsec_aio.enums import Assurance, PolicyAction
from ipsec_aio.errors import (
    BackendDenied,
    BackendError,
    BackendOverrun,
    BackendUnavailable,
    CodecError,
)
from ipsec_aio.evidence import IPPROTO_TCP, IPPROTO_UDP, Evidence
from ipsec_aio.flow import Mark, pack_address
from ipsec_aio.sa import SAKey
from ipsec_aio.testing import BackendConformance, Bench
from ipsec_aio.tokens import PToken
from ipsec_aio.wire.netlink import attribute

Unprivileged = Callable[[Callable[[], object]], BaseException | None]
KEY = SAKey(m.B, 50, 0x1001)
LOST = OSError(errno.ENOBUFS, "No buffer space available")
SELECTOR = m.selector(family=2, source_prefix=32, destination_prefix=32)
MARKED = m.policy_info(SELECTOR, priority=1) + m.mark(5, 0xFF)


def gcm(**info: int) -> bytes:
    return m.sa_info(**info) + m.GCM  # type: ignore[arg-type]


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    kernel = FakeKernel()
    kernel.local.add(m.B)
    yield kernel
    assert all(s.closed for s in kernel.opened)


@pytest.fixture
async def backend(kernel: FakeKernel) -> AsyncIterator[XfrmBackend]:
    backend = XfrmBackend(stamp="off", socket_factory=kernel.socket)
    kernel.sas.append(gcm(reqid=7))
    kernel.policies.append(m.policy_info() + attribute(5, m.template(reqid=7)))
    await backend.start()
    yield backend
    await backend.aclose()


def evidence(mark: int | None = None, generation: int = 0) -> Evidence:
    """Of a datagram that waited in no queue."""
    return Evidence(IPPROTO_UDP, m.B, 5000, m.A, 40000, mark, generation, after=1 << 30)


def stamp(spi: int) -> int:
    return int.from_bytes(spi.to_bytes(4, "big"), sys.byteorder)


class TestConformance(BackendConformance):
    """With the stamp of this machine's kernel, and all the rest in memory."""

    @pytest.fixture(params=[False, True], ids=["", "trust_policy"])
    async def bench(self, request: pytest.FixtureRequest, netns: None) -> AsyncIterator[Bench]:
        kernel = FakeKernel()
        backend = XfrmBackend(
            stamp="install", trust_policy=request.param, socket_factory=kernel.socket
        )
        await backend.start()
        yield FakeBench(backend, kernel)
        await backend.aclose()


# Reading


async def test_what_is_there_is_read(backend: XfrmBackend) -> None:
    assert backend.mirror.synced
    assert [sa.reqid for sa in backend.mirror.sas()] == [7]
    assert len(list(backend.mirror.spd)) == 1
    assert backend.mirror.defaults.inbound is PolicyAction.ALLOW
    assert not backend.resolver.opaque_interfaces
    assert backend.netns_cookie is not None


async def test_events_are_followed_by_draining(kernel: FakeKernel, backend: XfrmBackend) -> None:
    epoch = backend.epoch
    kernel.emit(m.message(m.NEWSA, gcm(spi=9)))
    assert backend.mirror.get(KEY._replace(spi=9)) is None
    backend.drain()
    assert backend.mirror.get(KEY._replace(spi=9)) is not None
    kernel.emit(m.message(m.DELSA, m.sa_deletion(gcm(spi=9))))
    backend.drain()
    assert backend.mirror.get(KEY._replace(spi=9)) is None
    assert backend.epoch != epoch


async def test_events_are_followed_by_the_loop(kernel: FakeKernel, backend: XfrmBackend) -> None:
    changed = asyncio.Event()
    unsubscribe = backend.subscribe(changed.set)
    kernel.emit(m.message(m.FLUSHSA, b"\0"))
    await changed.wait()
    assert not list(backend.mirror.sas())
    unsubscribe()


async def test_events_during_the_dump_are_played_on_it(kernel: FakeKernel) -> None:
    usual = kernel.answer
    kernel.sas.append(gcm())

    def answer(protocol: int, kind: int, sequence: int, payload: bytes) -> list[Reply]:
        replies = usual(protocol, kind, sequence, payload)
        if kind == m.GETPOLICY:
            kernel.emit(m.message(m.DELSA, m.sa_deletion(gcm())), m.message(m.NEWSA, gcm(spi=5)))
        return replies

    kernel.answer = answer
    backend = XfrmBackend(stamp="off", socket_factory=kernel.socket)
    await backend.start()
    assert [sa.spi for sa in backend.mirror.sas()] == [5]
    await backend.aclose()


@pytest.mark.parametrize(
    "ask", [XfrmBackend.drain, lambda backend: backend.lookup_missing(KEY)], ids=["news", "an SA"]
)
async def test_news_are_nobodys_who_asks_for_them(
    kernel: FakeKernel,
    backend: XfrmBackend,
    ask: Callable[[XfrmBackend], object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What they start and log is not of the datagram whose wake-up has brought them."""
    asking: ContextVar[str] = ContextVar("asking", default="nobody")
    seen: list[str] = []

    def see(record: logging.LogRecord) -> bool:
        seen.append(f"{asking.get()} logs {record.levelname}")
        return True

    backend.subscribe(lambda: seen.append(f"{asking.get()} is told"))
    caplog.handler.addFilter(see)
    with caplog.at_level(logging.INFO):
        asking.set("a datagram")
        kernel.emit(m.message(m.NEWSA, gcm(spi=9)), LOST)
        ask(backend)
        assert not backend.mirror.synced
        await synced(backend)
        await asyncio.sleep(0)
    caplog.handler.removeFilter(see)
    assert set(seen) == {"nobody is told", "nobody logs WARNING", "nobody logs INFO"}


async def test_expiry(kernel: FakeKernel, backend: XfrmBackend) -> None:
    before = backend.mirror.get(KEY)
    kernel.emit(m.message(m.EXPIRE, m.sa_info() + bytes(8)))
    backend.drain()
    assert backend.mirror.get(KEY) is before
    kernel.emit(m.message(m.EXPIRE, m.sa_info() + b"\1" + bytes(7)))
    backend.drain()
    assert backend.mirror.get(KEY) is None


async def test_an_update_is_what_the_kernel_made_of_it(
    kernel: FakeKernel, backend: XfrmBackend
) -> None:
    kernel.emit(m.message(m.UPDSA, m.sa_info(reqid=99)))
    backend.drain()
    found = backend.mirror.get(KEY)
    assert found is not None
    assert (found.reqid, found.encrypts) == (7, True)


async def test_an_update_may_change_the_interface_id(
    kernel: FakeKernel, backend: XfrmBackend
) -> None:
    kernel.sas[:] = [gcm(reqid=7) + m.if_id(3)]
    kernel.emit(m.message(m.UPDSA, gcm(reqid=7) + m.if_id(3)))
    backend.drain()
    assert [sa.if_id for sa in backend.mirror.sas()] == [3]


async def test_an_update_of_what_is_gone_since(kernel: FakeKernel, backend: XfrmBackend) -> None:
    kernel.sas.clear()
    kernel.emit(m.message(m.UPDSA, gcm(reqid=99)), m.message(m.DELSA, m.sa_deletion(gcm())))
    backend.drain()
    assert backend.mirror.get(KEY) is None


async def test_a_missing_sa_is_asked_for(kernel: FakeKernel, backend: XfrmBackend) -> None:
    key = KEY._replace(spi=0x2002)
    assert backend.lookup_missing(key)
    assert backend.mirror.get(key) is None
    kernel.sas.append(gcm(spi=0x2002))
    assert backend.lookup_missing(key)
    assert backend.mirror.get(key) is not None


async def test_a_missing_sa_is_asked_for_by_all_that_names_it(
    kernel: FakeKernel, backend: XfrmBackend
) -> None:
    """Another protocol's, and one with a mark that the question does not bear, are not found."""
    kernel.sas += [gcm(spi=0x2002), gcm(spi=0x2003) + m.mark(5, 0xFF)]
    marked = KEY._replace(spi=0x2003, mark=Mark(5, 0xFF))
    for other in (KEY._replace(spi=0x2002, proto=51), KEY._replace(spi=0x2003)):
        assert backend.lookup_missing(other)
        assert len(backend.mirror) == 1
    for there in (KEY._replace(spi=0x2002), marked):
        assert backend.lookup_missing(there)
        assert backend.mirror.get(there) is not None


async def test_asking_takes_in_what_was_told_before(
    kernel: FakeKernel, backend: XfrmBackend
) -> None:
    kernel.emit(m.message(m.NEWSA, gcm(spi=0x3003)))
    assert backend.lookup_missing(KEY._replace(spi=0x2002))
    assert backend.mirror.get(KEY._replace(spi=0x3003)) is not None


async def test_another_thread_takes_nothing(kernel: FakeKernel, backend: XfrmBackend) -> None:
    kernel.emit(m.message(m.FLUSHSA, b"\0"))
    thread = threading.Thread(target=backend.drain)
    thread.start()
    thread.join()
    assert list(backend.mirror.sas())
    backend.drain()
    assert not list(backend.mirror.sas())


async def test_asking_may_find_that_events_were_lost(
    kernel: FakeKernel, backend: XfrmBackend
) -> None:
    kernel.emit(LOST)
    assert not backend.lookup_missing(KEY)
    assert not backend.mirror.synced
    await synced(backend)
    assert backend.lookup_missing(KEY)


async def test_a_loss_that_asking_finds_counts_at_once(
    kernel: FakeKernel, backend: XfrmBackend
) -> None:
    """What else came with that datagram is judged in the same turn of the loop."""
    backend.set_generation(1)
    assert backend.resolve(evidence(stamp(0x1001), 1)).protected
    kernel.emit(LOST)
    assert backend.resolve(evidence(stamp(9), 1)).assurance is Assurance.UNKNOWN
    assert backend.resolve(evidence(stamp(0x1001), 1)).assurance is Assurance.UNKNOWN
    await synced(backend)
    assert backend.resolve(evidence(stamp(0x1001), 1)).protected


async def test_what_a_long_dump_reads_is_no_older_than_that(kernel: FakeKernel) -> None:
    kernel.sas.extend(gcm(spi=number) for number in range(1, 4))
    times = iter(range(100, 1000))
    backend = XfrmBackend(stamp="off", socket_factory=kernel.socket)
    backend.clock = lambda: float(next(times))
    await backend.start()
    added = [record.added for record in backend.mirror.sad]
    assert len(set(added)) == 3
    await backend.aclose()


async def test_interfaces_make_the_stamp_opaque(kernel: FakeKernel, backend: XfrmBackend) -> None:
    epoch = backend.epoch
    kernel.emit(m.message(16, link(3, "xfrm")), protocol=0)
    backend.drain()
    assert backend.resolver.opaque_interfaces
    assert backend.epoch != epoch
    during = backend.policies
    kernel.emit(m.message(17, link(3, "xfrm")), protocol=0)
    backend.drain()
    assert not backend.resolver.opaque_interfaces
    backend.set_generation(1)
    clear = evidence(mark=0, generation=1)
    queued = replace(clear, after=during)
    assert backend.resolve(queued).assurance is Assurance.UNKNOWN, "it may have come through it"
    assert backend.resolve(replace(clear, after=backend.policies)).assurance is Assurance.NONE


async def test_an_interface_that_came_and_went_between_two_looks(
    kernel: FakeKernel, backend: XfrmBackend
) -> None:
    backend.set_generation(1)
    before, epoch = backend.policies, backend.epoch
    for kind in (16, 17):
        kernel.emit(m.message(kind, link(3, "xfrm")), protocol=0)
    backend.drain()
    assert backend.epoch != epoch
    clear = evidence(mark=0, generation=1)
    assert backend.resolve(replace(clear, after=before)).assurance is Assurance.UNKNOWN
    assert backend.resolve(replace(clear, after=backend.policies)).assurance is Assurance.NONE


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
async def test_addresses_change_the_epoch(
    kernel: FakeKernel, backend: XfrmBackend, family: int
) -> None:
    assert backend.resolver.is_own(m.B)
    assert not backend.resolver.is_own(m.A)
    epoch = backend.epoch
    before = backend.policies
    kernel.emit(m.message(20, bytes([family]) + bytes(7)), protocol=0)
    backend.drain()
    assert backend.epoch != epoch
    assert backend.policies == before


async def test_an_address_that_went_may_have_sent_what_is_queued(
    kernel: FakeKernel, backend: XfrmBackend
) -> None:
    kernel.local.add(m.A)
    before, epoch = backend.policies, backend.epoch
    assert "itself" in repr(backend.resolve(replace(evidence(), after=before)))
    kernel.local.discard(m.A)
    kernel.emit(m.message(21, bytes([socket.AF_INET]) + bytes(7)), protocol=0)
    backend.drain()
    assert backend.epoch != epoch
    queued = backend.resolve(replace(evidence(), after=before))
    assert "addresses were what they are" in repr(queued)
    now = replace(evidence(), after=backend.policies)
    assert backend.resolve(now).assurance is Assurance.POLICY
    backend.drain()
    assert backend.policies == now.after


async def test_what_was_queued_during_a_loss_is_in_doubt(
    kernel: FakeKernel, backend: XfrmBackend
) -> None:
    backend.set_generation(1)
    before = backend.policies
    kernel.emit(LOST)
    backend.drain()
    await synced(backend)
    for clear in (evidence(mark=0, generation=1), evidence()):
        assert backend.resolve(replace(clear, after=before)).assurance is Assurance.UNKNOWN
        now = backend.resolve(replace(clear, after=backend.policies))
        assert now.assurance is (Assurance.NONE if clear.generation else Assurance.POLICY)


# Losing


@pytest.mark.parametrize(
    "loss",
    [
        LOST,
        b"\xff" * 40,
        m.message(0x99),
        m.message(m.NEWSA, m.sa_info(mode=9)),
        m.message(4),
        bytes(70000),
        OSError(errno.EIO, "Input/output error"),
        m.message(
            m.MIGRATE,
            m.policy_id()
            + attribute(
                17,
                b"".join(a.ljust(16, b"\0") for a in (m.B, m.A, m.A, m.B))
                + bytes([50, 0, 0, 0])
                + (7).to_bytes(4, "little")
                + bytes([2, 0, 2, 0]),
            ),
        ),
    ],
    ids=["full", "garbage", "type", "mode", "overrun", "truncated", "error", "migrate"],
)
async def test_after_a_loss_all_is_unknown_until_read_again(
    kernel: FakeKernel,
    backend: XfrmBackend,
    loss: Reply,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = kernel.listening
    epoch = backend.epoch
    kernel.sas[:] = [gcm(spi=0x4004)]
    kernel.emit(loss)
    backend.drain()
    assert not backend.mirror.synced
    assert backend.epoch != epoch
    token = backend.resolve(evidence())
    assert (token.assurance, token.protected) == (Assurance.UNKNOWN, False)
    assert not backend.lookup_missing(KEY)
    backend.drain()
    await synced(backend)
    assert [sa.spi for sa in backend.mirror.sas()] == [0x4004]
    assert not set(map(id, kernel.listening)) & set(map(id, before))
    assert all(s.closed for s in before)
    assert "not certain" in caplog.text


async def test_a_link_loss_is_a_loss(kernel: FakeKernel, backend: XfrmBackend) -> None:
    kernel.emit(LOST, protocol=0)
    backend.drain()
    assert not backend.mirror.synced
    assert backend.resolver.opaque_interfaces
    await synced(backend)
    assert not backend.resolver.opaque_interfaces


async def test_it_tries_until_it_succeeds_and_logs_once(
    kernel: FakeKernel, backend: XfrmBackend, caplog: pytest.LogCaptureFixture
) -> None:
    usual = kernel.answer
    failures: Iterator[list[Reply]] = iter(
        [
            [LOST],
            [error(errno.EPERM, sequence=1)],
            [m.message(m.NEWSA, b"", sequence=1)],
            [],
        ]
    )

    def answer(protocol: int, kind: int, sequence: int, payload: bytes) -> list[Reply]:
        if kind == m.GETSA and not payload and (failure := next(failures, None)) is not None:
            return failure
        return usual(protocol, kind, sequence, payload)

    kernel.answer = answer
    caplog.set_level(logging.INFO)
    kernel.emit(LOST)
    backend.drain()
    await synced(backend)
    assert next(failures, None) is None
    await asyncio.sleep(0)
    assert [r.levelname for r in caplog.records if r.name == "ipsec_aio"] == ["WARNING", "INFO"]


async def test_a_loss_while_reading_is_noticed(kernel: FakeKernel) -> None:
    usual = kernel.answer
    losses = 2

    def answer(protocol: int, kind: int, sequence: int, payload: bytes) -> list[Reply]:
        nonlocal losses
        if kind == m.GETPOLICY and losses:
            losses -= 1
            kernel.emit(LOST)
        return usual(protocol, kind, sequence, payload)

    kernel.answer = answer
    backend = XfrmBackend(stamp="off", socket_factory=kernel.socket)
    await backend.start()
    assert losses == 0
    assert backend.mirror.synced
    await backend.aclose()


async def test_a_start_that_never_reads_a_whole_table(kernel: FakeKernel) -> None:
    kernel.answer = lambda protocol, kind, sequence, payload: []
    backend = XfrmBackend(stamp="off", socket_factory=kernel.socket)
    with pytest.raises(BackendOverrun):
        await backend.start()
    assert backend.closed


async def test_two_losses_are_one(kernel: FakeKernel, backend: XfrmBackend) -> None:
    kernel.emit(LOST)
    assert not backend.lookup_missing(KEY)
    kernel.emit(LOST)
    backend.drain()
    await asyncio.sleep(0)
    await synced(backend)
    assert len(kernel.listening) == 2


async def test_closed_while_reading_again(kernel: FakeKernel, backend: XfrmBackend) -> None:
    kernel.answer = lambda protocol, kind, sequence, payload: []
    kernel.emit(LOST)
    backend.drain()
    await asyncio.sleep(0)
    await backend.aclose()
    assert all(s.closed for s in kernel.opened)


@pytest.fixture
def collector() -> Iterator[Callable[[], bool]]:
    """Whether the garbage collector runs, which is as before afterwards."""
    before = gc.isenabled()
    yield gc.isenabled
    (gc.enable if before else gc.disable)()


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(
    ("reply", "opens"), [(None, True), (m.message(m.NEWSA, b"", sequence=1), False), (LOST, False)]
)
async def test_the_collector_rests_while_tables_are_read(
    kernel: FakeKernel,
    collector: Callable[[], bool],
    enabled: bool,
    reply: Reply | None,
    opens: bool,
) -> None:
    (gc.enable if enabled else gc.disable)()
    usual, seen = kernel.answer, []

    def answer(protocol: int, kind: int, sequence: int, payload: bytes) -> list[Reply]:
        if protocol == 6 and kind in (m.GETSA, m.GETPOLICY):
            seen.append(collector())
            if reply is not None:
                return [reply]
        return usual(protocol, kind, sequence, payload)

    kernel.answer = answer
    backend = XfrmBackend(stamp="off", socket_factory=kernel.socket)
    with suppress(CodecError, BackendOverrun):
        await backend.start()
    assert collector() is enabled
    assert backend.mirror.synced is opens
    assert seen
    assert not any(seen)
    await backend.aclose()
    assert collector() is enabled


async def test_the_collector_runs_again_when_reading_is_cancelled(
    kernel: FakeKernel, collector: Callable[[], bool]
) -> None:
    gc.enable()
    kernel.sas = [gcm(spi=spi) for spi in range(1, 20)]
    backend = XfrmBackend(stamp="off", socket_factory=kernel.socket)
    reading = asyncio.create_task(backend.start())
    while collector():  # noqa: ASYNC110
        await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert collector()
    assert not backend.mirror.synced
    assert all(s.closed for s in kernel.opened)


async def test_the_collector_runs_again_when_closed_while_reading_again(
    kernel: FakeKernel, backend: XfrmBackend, collector: Callable[[], bool]
) -> None:
    gc.enable()
    kernel.sas = [gcm(spi=spi) for spi in range(1, 20)]
    kernel.emit(LOST)
    backend.drain()
    while collector():  # noqa: ASYNC110
        await asyncio.sleep(0)
    await backend.aclose()
    assert collector()


async def test_what_was_read_is_old_at_once(
    kernel: FakeKernel, collector: Callable[[], bool]
) -> None:
    gc.enable()
    kernel.sas = [gcm(spi=spi) for spi in range(1, 20)]
    backend = XfrmBackend(stamp="off", socket_factory=kernel.socket)
    await backend.start()
    old = set(map(id, gc.get_objects(generation=2)))
    assert {id(sa) for sa in backend.mirror.sas()} <= old
    assert gc.get_freeze_count() == 0
    await backend.aclose()


async def test_what_the_program_froze_stays_frozen(
    kernel: FakeKernel, collector: Callable[[], bool]
) -> None:
    gc.enable()
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        backend = XfrmBackend(stamp="off", socket_factory=kernel.socket)
        await backend.start()
        assert 0 < gc.get_freeze_count() <= count
        await backend.aclose()
    finally:
        gc.unfreeze()


async def test_a_thread_that_went_to_another_namespace(
    kernel: FakeKernel, backend: XfrmBackend, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("netns")
    with pytest.raises(BackendUnavailable, match="another network namespace"):
        backend._check_namespace()


# Opening and closing


async def test_a_kernel_without_xfrm(kernel: FakeKernel) -> None:
    kernel.refuse[6] = OSError(errno.EPROTONOSUPPORT, "Protocol not supported")
    backend = XfrmBackend(stamp="off", socket_factory=kernel.socket)
    with pytest.raises(BackendUnavailable, match="no NETLINK_XFRM"):
        await backend.start()
    assert backend.closed


async def test_bytes_that_cannot_be_decoded_at_start(kernel: FakeKernel) -> None:
    kernel.sas.append(m.sa_info(mode=9))
    backend = XfrmBackend(stamp="off", socket_factory=kernel.socket)
    with pytest.raises(CodecError):
        await backend.start()


@pytest.mark.usefixtures("netns")
def test_without_privilege(unprivileged: Unprivileged) -> None:
    raised = unprivileged(lambda: asyncio.run(XfrmBackend().start()))
    assert isinstance(raised, BackendDenied)
    assert "CAP_NET_ADMIN" in str(raised)


async def test_before_start_and_after_close(kernel: FakeKernel) -> None:
    backend = XfrmBackend(stamp="off", socket_factory=kernel.socket)
    with pytest.raises(BackendUnavailable, match="not started"):
        backend.resolve(evidence())
    backend.drain()
    assert backend.netns_cookie is None
    await backend.start()
    with pytest.raises(BackendUnavailable, match="started once"):
        await backend.start()
    assert backend.mirror.synced
    token = backend.resolve(evidence())
    registration = await backend.register(IPPROTO_UDP, 5000)
    await backend.aclose()
    await backend.aclose()
    backend.drain()
    assert registration.generation == 0
    registration.close()
    assert token.assurance is Assurance.NONE
    with pytest.raises(BackendUnavailable, match="closed"):
        backend.resolve(evidence())
    with pytest.raises(BackendUnavailable, match="closed"):
        await backend.register(IPPROTO_UDP, 5000)
    with pytest.raises(BackendUnavailable, match="started once"):
        await backend.start()


async def test_never_started(kernel: FakeKernel) -> None:
    backend = XfrmBackend(stamp="off", socket_factory=kernel.socket)
    await backend.aclose()
    assert backend.closed


async def test_on_another_loop(backend: XfrmBackend) -> None:
    raised: list[BaseException] = []

    async def elsewhere() -> None:
        for attempt in (backend.register(IPPROTO_UDP, 5000), backend.aclose()):
            try:
                await attempt
            except BackendUnavailable as caught:
                raised.append(caught)

    thread = threading.Thread(target=lambda: asyncio.run(elsewhere()))
    thread.start()
    thread.join()
    assert len(raised) == 2
    assert not backend.closed


def test_its_loop_was_closed(kernel: FakeKernel) -> None:
    backend = XfrmBackend(stamp="off", socket_factory=kernel.socket)
    asyncio.run(backend.start())
    asyncio.run(backend.aclose())
    assert backend.closed


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


async def test_in_a_forked_child(kernel: FakeKernel, backend: XfrmBackend) -> None:
    kernel.emit(m.message(m.FLUSHSA, b"\0"))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            backend.drain()
            try:
                backend.resolve(evidence())
            except BackendUnavailable:
                closing = backend.aclose()
                try:
                    closing.send(None)
                except StopIteration:
                    code = 0 if all(s.closed for s in kernel.opened) else 2
        finally:
            os._exit(code)
    assert exit_code(child) == 0
    changed = asyncio.Event()
    unsubscribe = backend.subscribe(changed.set)
    await changed.wait()  # the child took neither the event nor the loop's interest in it
    unsubscribe()
    assert not list(backend.mirror.sas())


async def test_closed_in_a_forked_child(kernel: FakeKernel, backend: XfrmBackend) -> None:
    assert backend._poll is not None
    watched = backend._poll.fileno()
    backend.resolver._forks -= 1  # what a fork comes to
    kernel.emit(m.message(m.FLUSHSA, b"\0"))
    backend.drain()
    assert list(backend.mirror.sas())
    await backend.aclose()
    assert backend.closed
    assert all(s.closed for s in kernel.opened)
    with suppress(OSError):  # asyncio lets go, uvloop let go by itself
        asyncio.get_running_loop().remove_reader(watched)


async def test_what_is_read_later_in_the_same_turn_is_judged_by_the_news(
    kernel: FakeKernel, backend: XfrmBackend
) -> None:
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    heard: list[str] = []

    def read() -> None:
        heard.append(two.recv(10).decode())
        done.set_result(None)

    unsubscribe = backend.subscribe(lambda: heard.append("news"))
    one, two = socket.socketpair()
    with one, two:
        loop.add_reader(two, read)
        kernel.emit(m.message(m.FLUSHSA, b"\0"))
        one.send(b"data")
        await done
        loop.remove_reader(two)
    unsubscribe()
    assert heard == ["news", "data"]


async def test_registrations_without_a_stamp(backend: XfrmBackend) -> None:
    registration = await backend.register(IPPROTO_TCP, 5000)
    assert registration.generation == 0
    assert registration.reads_marks
    assert registration.keeps_fragments
    registration.close()
    registration.close()


# With this machine's kernel


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


@pytest.mark.usefixtures("netns")
async def test_policies_of_this_kernel() -> None:
    backend = XfrmBackend(stamp="off")
    await backend.start()
    before = backend.policies
    ip(
        "xfrm policy add src 192.0.2.1 dst 192.0.2.2 proto udp dir in"
        " tmpl proto esp mode transport reqid 7"
    )
    backend.drain()
    queued = replace(evidence(), after=before)
    assert backend.resolve(evidence()).assurance is Assurance.POLICY
    assert backend.resolve(queued).assurance is Assurance.UNKNOWN
    ip("xfrm policy flush")
    backend.drain()
    assert not list(backend.mirror.spd)
    assert backend.resolve(evidence()).assurance is Assurance.NONE
    ip("xfrm policy setdefault in block")
    backend.drain()
    assert backend.mirror.defaults.inbound is PolicyAction.BLOCK
    await backend.aclose()


@pytest.mark.usefixtures("netns")
async def test_a_full_event_queue_of_this_kernel() -> None:
    backend = XfrmBackend(stamp="off")
    await backend.start()
    sockets = backend._sockets
    assert sockets is not None
    sockets.events._channel._socket.setsockopt(1, 8, 1)
    lines = "".join(f"xfrm policy add src 10.0.0.{n} dst 10.9.0.1 dir in\n" for n in range(200))
    batch(lines)
    backend.drain()
    assert not backend.mirror.synced
    assert backend.resolve(evidence()).assurance is Assurance.UNKNOWN
    await synced(backend)
    assert len(list(backend.mirror.spd)) == 200
    await backend.aclose()


def batch(lines: str) -> None:
    subprocess.run(["ip", "-batch", "-"], input=lines.encode(), check=True)


@pytest.mark.usefixtures("netns")
async def test_the_stamps_generation_reaches_tokens(kernel: FakeKernel) -> None:
    backend = XfrmBackend(stamp="install", socket_factory=kernel.socket)
    await backend.start()
    registration = await backend.register(IPPROTO_UDP, 5000)
    assert registration.generation
    assert not registration.keeps_fragments
    stamped = evidence(mark=0, generation=registration.generation)
    assert backend.resolve(stamped).assurance is Assurance.NONE
    registration.close()
    assert registration.generation == 0
    await backend.aclose()


@pytest.mark.usefixtures("netns")
@pytest.mark.parametrize("user", ["policy", "state", "set mark"])
async def test_the_stamp_goes_when_others_need_marks(kernel: FakeKernel, user: str) -> None:
    backend = XfrmBackend(stamp="install", socket_factory=kernel.socket)
    await backend.start()
    registration = await backend.register(IPPROTO_UDP, 5000)
    generation = registration.generation
    assert generation
    kernel.emit(m.message(m.NEWSA, gcm(spi=1) + m.u32(29, 4)[:0]))
    kernel.emit(
        {
            "policy": m.message(m.NEWPOLICY, MARKED),
            "state": m.message(m.NEWSA, gcm() + m.mark(5, 0xFF)),
            "set mark": m.message(m.NEWSA, gcm() + m.u32(29, 5)),
        }[user]
    )
    backend.drain()
    assert registration.generation == 0
    stamped = evidence(mark=0, generation=generation)
    assert backend.resolve(stamped).assurance is Assurance.UNKNOWN
    kernel.emit(m.message(m.FLUSHSA, b"\0"), m.message(m.FLUSHPOLICY))
    backend.drain()
    assert registration.generation not in (0, generation)
    registration.close()
    await backend.aclose()


@pytest.mark.usefixtures("netns")
async def test_the_stamp_goes_also_where_asking_for_an_sa_read_of_the_need(
    kernel: FakeKernel, netns: None
) -> None:
    backend = XfrmBackend(stamp="install", socket_factory=kernel.socket)
    await backend.start()
    registration = await backend.register(IPPROTO_UDP, 5000)
    backend.drain()
    assert registration.generation
    kernel.emit(m.message(m.NEWPOLICY, MARKED))
    backend.resolve(evidence(stamp(9), registration.generation))
    backend.drain()
    assert not registration.generation
    registration.close()
    await backend.aclose()


@pytest.mark.usefixtures("netns")
async def test_tcp_is_not_stamped_when_routing_looks_at_marks(kernel: FakeKernel) -> None:
    async with XfrmBackend(stamp="install", socket_factory=kernel.socket) as backend:
        await backend.start()
        tcp = await backend.register(IPPROTO_TCP, 5000)
        udp = await backend.register(IPPROTO_UDP, 5000)
        assert tcp.generation
        ip("rule add fwmark 0x4000 lookup 100")
        backend.drain()
        assert tcp.generation == 0
        assert udp.generation
        with pytest.raises(BackendError, match="0x4000"):
            await backend.register(IPPROTO_TCP, 5001)
        tcp.close()
        udp.close()


@pytest.mark.usefixtures("netns")
async def test_what_sas_to_other_hosts_mark_is_of_no_concern(kernel: FakeKernel) -> None:
    backend = XfrmBackend(stamp="install", socket_factory=kernel.socket)
    await backend.start()
    registration = await backend.register(IPPROTO_UDP, 5000)
    outbound = m.sa_info(m.B, m.A, spi=3) + m.GCM + m.u32(29, 5)
    kernel.emit(m.message(m.NEWSA, outbound))
    backend.drain()
    assert registration.generation
    # Nor does it hide what comes the other way.
    kernel.emit(m.message(m.NEWSA, gcm() + m.u32(29, 5)))
    backend.drain()
    assert not registration.generation
    registration.close()
    await backend.aclose()


@pytest.mark.usefixtures("netns")
async def test_an_address_may_make_an_sa_inbound(kernel: FakeKernel) -> None:
    backend = XfrmBackend(stamp="install", socket_factory=kernel.socket)
    await backend.start()
    registration = await backend.register(IPPROTO_UDP, 5000)
    kernel.emit(m.message(m.NEWSA, m.sa_info(m.B, m.A, spi=3) + m.GCM + m.u32(29, 5)))
    backend.drain()
    assert registration.generation
    kernel.local.add(m.A)
    kernel.emit(m.message(20, bytes([socket.AF_INET]) + bytes(7)), protocol=0)
    backend.drain()
    assert not registration.generation
    registration.close()
    await backend.aclose()


@pytest.mark.usefixtures("netns")
async def test_a_stamp_that_is_demanded_and_missing(kernel: FakeKernel) -> None:
    backend = XfrmBackend(stamp="require", socket_factory=kernel.socket)
    with pytest.raises(BackendUnavailable):
        await backend.start()
    assert backend.closed


# Keys


def holders(pattern: bytes, *, besides: set[int]) -> list[str]:
    """Every reachable text or buffer that has the pattern in it."""
    gc.collect()
    found: list[str] = []
    seen: set[int] = set(besides)
    todo: list[object] = list(gc.get_objects())
    seen.add(id(todo))
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, bytes | bytearray | memoryview):
            with suppress(ValueError):  # a view that was released
                if pattern in bytes(thing):
                    found.append(repr(type(thing)))
        elif isinstance(thing, str):
            if pattern.decode() in thing or pattern.hex() in thing:
                found.append(thing[:50])
        else:
            todo.extend(gc.get_referents(thing))
    return found


async def test_no_key_byte_outlives_the_receive_buffer(
    kernel: FakeKernel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    pattern = b"S3cr3t-" + os.urandom(4).hex().encode()
    key = bytearray(pattern + b"-padded-up-")
    aead = b"rfc4106(gcm(aes))".ljust(64, b"\0") + (160).to_bytes(4, "little") * 2

    def keyed(spi: int, mode: int = 0) -> bytes:
        return m.sa_info(spi=spi, mode=mode) + attribute(18, aead + bytes(key[:20]))

    kernel.sas = [keyed(1)]
    backend = XfrmBackend(stamp="off", socket_factory=kernel.socket)
    await backend.start()
    kernel.emit(m.message(m.NEWSA, keyed(2)))
    backend.drain()
    kernel.sas.append(keyed(3))
    backend.lookup_missing(KEY._replace(spi=3))
    assert len(list(backend.mirror.sas())) == 3
    kernel.emit(m.message(m.NEWSA, keyed(4, mode=9)))
    output = io.StringIO()
    try:
        sockets = backend._sockets
        assert sockets is not None
        sockets.events.drain()
    except CodecError as caught:
        failure: BaseException = caught
        traceback.print_exception(caught, file=output)
    kernel.emit(m.message(m.NEWSA, keyed(5)[:-4]))
    backend.drain()
    await synced(backend)
    token: PToken = backend.resolve(evidence())
    print(token, list(backend.mirror.sas()), repr(failure), file=output)
    kernel.sas.clear()
    for sock in kernel.opened:
        sock.waiting.clear()
    del keyed
    written = output.getvalue() + caplog.text
    mine = {id(pattern), id(key)}
    found = holders(pattern[:11], besides=mine)
    assert pattern.decode() not in written
    assert found == []
    # The search finds what is there.
    kept = [bytes(key)]
    assert holders(pattern[:11], besides=mine) != []
    kept.clear()
    await backend.aclose()


def test_addresses_of_the_tests() -> None:
    assert pack_address("192.0.2.1") == m.A


class TestThreads:
    """Tokens may be read in any thread, whatever the loop's does meanwhile."""

    ADDED = tuple(m.message(m.NEWSA, gcm(spi=0x77) + m.if_id(n + 1)) for n in range(50))
    GONE = tuple(m.message(m.DELSA, m.sa_id(spi=0x77) + m.if_id(n + 1)) for n in range(len(ADDED)))

    def happen(self, backend: XfrmBackend, kernel: FakeKernel) -> list[PToken]:
        """Have SAs come and go, asked for and told of; return tokens that rest on them."""
        kernel.emit(*self.ADDED)
        backend.drain()
        tokens = [backend.resolve(evidence(stamp(spi), 1)) for spi in (0x77, 0x99)]
        kernel.emit(*self.GONE)
        # What is missing is asked for, and takes in what is waiting.
        tokens.append(backend.resolve(evidence(stamp(0x98), 1)))
        backend._tick()
        return tokens

    async def test_the_mirror_changes_under_the_lock_alone(
        self, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ipsec_aio.mirror.TOMBSTONE_SECONDS", 0.0)
        seen: dict[str, bool] = {}
        backend = XfrmBackend(stamp="off", socket_factory=kernel.socket)
        owned = backend.resolver.lock._is_owned  # type: ignore[attr-defined]

        def watch(target: object, name: str) -> None:
            plain = getattr(target, name)

            def watched(*arguments: object, **named: object) -> object:
                seen[name] = seen.get(name, True) and owned()
                return plain(*arguments, **named)

            monkeypatch.setattr(target, name, watched)

        for name in ("apply", "advance", "bump", "begin_resync", "finish_resync"):
            watch(backend.mirror, name)
        for name in ("settle_all", "next_deadline"):
            watch(backend.resolver, name)
        watch(backend, "_close_sockets")
        await backend.start()
        backend.set_generation(1)
        backend.set_opaque_interfaces(True)
        backend.set_opaque_interfaces(False)
        end = backend.subscribe(lambda: None)
        self.happen(backend, kernel)
        kernel.emit(LOST)
        kernel.refuse[6] = OSError(errno.EMFILE, "for once")
        backend.drain()
        await asyncio.sleep(0)
        kernel.refuse.clear()
        await synced(backend)
        end()
        await backend.aclose()
        assert seen == dict.fromkeys(seen, True)
        assert len(seen) == 8

    async def test_they_do_not_disturb_each_other(
        self, backend: XfrmBackend, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ipsec_aio.mirror.TOMBSTONE_SECONDS", 0.0)
        backend.set_generation(1)
        end = backend.subscribe(lambda: None)
        tokens: list[PToken] = []
        failures: list[BaseException] = []
        done = threading.Event()

        def read() -> None:
            while not (done.is_set() or failures):
                try:
                    for token in list(tokens):
                        assert token.sas is not None
                        assert not (token.protected and token.pending)
                except BaseException as error:
                    failures.append(error)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(60):
                tokens[:] = self.happen(backend, kernel)
        finally:
            sys.setswitchinterval(interval)
            done.set()
            for thread in threads:
                thread.join()
        end()
        assert not failures
