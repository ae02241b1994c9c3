"""NETLINK_XFRM sockets: what they tell, what they refuse, and that their buffer keeps nothing."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
from collections.abc import Callable, Iterator

import pytest
import xfrm_messages as m
from fake_netlink import FakeKernel, FakeSocket, Reply, done, error

from ipsec_aio.enums import PolicyAction
from ipsec_aio.errors import BackendDenied, BackendOverrun, BackendUnavailable, CodecError
from ipsec_aio.events import DefaultActions, Event, PolicyAdded, SAAdded
from ipsec_aio.flow import pack_address
from ipsec_aio.kernel.netlink import NetlinkSocket, XfrmDumps, XfrmEvents, XfrmRequests
from ipsec_aio.sa import SAKey
from ipsec_aio.wire import netlink as wire
from ipsec_aio.wire import xfrm

Unprivileged = Callable[[Callable[[], object]], BaseException | None]
NEWSA = m.message(m.NEWSA, m.sa_info() + m.GCM)
ALLOWED = DefaultActions(PolicyAction.ALLOW, PolicyAction.ALLOW, PolicyAction.ALLOW)


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, stdout=subprocess.DEVNULL)


def ip_batch(lines: str) -> None:
    subprocess.run(["ip", "-batch", "-"], input=lines.encode(), check=True)


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    kernel = FakeKernel()
    yield kernel
    assert all(s.closed for s in kernel.opened)


@pytest.fixture
def told() -> list[Event]:
    return []


@pytest.fixture
def events(kernel: FakeKernel, told: list[Event]) -> Iterator[XfrmEvents]:
    events = XfrmEvents(told.append, factory=kernel.socket)
    yield events
    events.close()


def contents(channel: object) -> bytes:
    buffer = channel._channel._buffer  # type: ignore[attr-defined]
    assert isinstance(buffer, bytearray)
    return bytes(buffer)


# With this kernel


@pytest.mark.usefixtures("netns")
async def test_events_and_dumps_of_this_kernel() -> None:
    told: list[Event] = []
    events = XfrmEvents(told.append)
    dumps = XfrmDumps()
    try:
        events.drain()
        assert told == []
        for number in range(3):
            ip(f"xfrm policy add src 10.0.0.{number} dst 10.9.0.1 dir in")
        ip("xfrm state allocspi src 10.0.0.1 dst 10.0.0.2 proto esp min 0x300 max 0x300")
        events.drain()
        dumped: list[Event] = []
        await dumps.read(xfrm.dump_policies, dumped.append)
        assert sorted(map(repr, dumped)) == sorted(map(repr, told))
        assert len(dumped) == 3
        dumped.clear()
        await dumps.read(xfrm.dump_sas, dumped.append)
        (larval,) = dumped
        assert isinstance(larval, SAAdded)
        assert (larval.sa.spi, larval.sa.larval) == (0x300, True)
    finally:
        events.close()
        dumps.close()


@pytest.mark.usefixtures("netns")
async def test_a_dump_of_many_datagrams() -> None:
    batch = "".join(
        f"xfrm policy add src 10.{n >> 8}.{n & 255}.1 dst 10.255.0.1 dir in tmpl proto esp mode"
        " transport\n"
        for n in range(1000)
    )
    ip_batch(batch)
    dumps = XfrmDumps()
    dumped: list[Event] = []
    await dumps.read(xfrm.dump_policies, dumped.append)
    dumps.close()
    policies = {event.policy.key for event in dumped if isinstance(event, PolicyAdded)}
    assert len(policies) == 1000


@pytest.mark.usefixtures("netns")
def test_lookups_of_this_kernel() -> None:
    requests = XfrmRequests()
    key = SAKey(pack_address("10.0.0.2"), 50, 0x300)
    assert requests.sa(key) is None
    ip("xfrm state allocspi src 10.0.0.1 dst 10.0.0.2 proto esp min 0x300 max 0x300")
    found = requests.sa(key)
    assert found is not None
    assert found.key == key
    assert requests.defaults() == ALLOWED
    ip("xfrm policy setdefault in block")
    assert requests.defaults().inbound is PolicyAction.BLOCK
    requests.close()


@pytest.mark.usefixtures("netns")
def test_a_full_event_queue_is_an_overrun() -> None:
    told: list[Event] = []
    events = XfrmEvents(told.append, queue_bytes=1)
    batch = "".join(f"xfrm policy add src 10.0.0.{n} dst 10.9.0.1 dir in\n" for n in range(200))
    ip_batch(batch)
    with pytest.raises(BackendOverrun, match="faster than they were read") as caught:
        events.drain()
    assert caught.value.errno == errno.ENOBUFS
    events.close()


@pytest.mark.usefixtures("netns")
def test_what_other_processes_send_is_not_looked_at() -> None:
    told: list[Event] = []
    events = XfrmEvents(told.append)
    port = events._channel._socket.getsockname()[0]
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, xfrm.NETLINK_XFRM) as hostile:
        for bytes_ in (NEWSA, b"\xff" * 100, b"x"):
            hostile.sendto(bytes_, (port, 0))
    events.drain()
    assert told == []
    events.close()


@pytest.mark.usefixtures("netns")
def test_without_privilege_it_says_what_to_do(unprivileged: Unprivileged) -> None:
    raised = unprivileged(lambda: XfrmEvents(lambda event: None))
    assert isinstance(raised, BackendDenied)
    assert raised.errno == errno.EPERM
    for word in ("CAP_NET_ADMIN", "AmbientCapabilities", "setcap", "root"):
        assert word in str(raised)


@pytest.mark.usefixtures("netns")
def test_a_smaller_queue_without_privilege(unprivileged: Unprivileged) -> None:
    sizes: list[int] = []

    def open_one() -> None:
        opened = NetlinkSocket(0, (1,), queue_bytes=1 << 16)
        sizes.append(opened._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))
        opened.close()

    assert unprivileged(open_one) is None
    assert sizes[0] >= 1 << 16


@pytest.mark.usefixtures("netns")
def test_dumps_and_lookups_without_privilege_are_denied(unprivileged: Unprivileged) -> None:
    requests = XfrmRequests()
    raised = unprivileged(requests.defaults)
    assert isinstance(raised, BackendDenied)
    raised = unprivileged(lambda: requests.sa(SAKey(bytes(4), 50, 1)))
    assert isinstance(raised, BackendDenied)
    requests.close()


# With a kernel that does what it is told


@pytest.mark.parametrize("code", [errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.ENOENT])
def test_a_kernel_without_xfrm(kernel: FakeKernel, code: int) -> None:
    kernel.refuse[6] = OSError(code, os.strerror(code))
    with pytest.raises(BackendUnavailable, match="no NETLINK_XFRM") as caught:
        XfrmRequests(factory=kernel.socket)
    assert caught.value.errno == code


def test_another_refusal_is_told_as_it_is(kernel: FakeKernel) -> None:
    kernel.refuse[6] = OSError(errno.EMFILE, "Too many open files")
    with pytest.raises(BackendUnavailable, match="Too many open files"):
        XfrmDumps(factory=kernel.socket)


def test_a_socket_that_cannot_be_bound_is_closed(kernel: FakeKernel) -> None:
    class Unbound(FakeSocket):
        def bind(self, address: tuple[int, int]) -> None:
            raise PermissionError(errno.EACCES, "no")

    unbound = Unbound(kernel, 6)
    with pytest.raises(BackendDenied):
        XfrmRequests(factory=lambda *_: unbound)  # type: ignore[arg-type]
    assert unbound.closed


def test_several_messages_in_a_datagram(
    kernel: FakeKernel, events: XfrmEvents, told: list[Event]
) -> None:
    kernel.emit(NEWSA + m.message(1) + m.message(m.FLUSHSA, b"\0"), NEWSA)
    events.drain()
    assert len(told) == 3


def test_the_buffer_is_overwritten(
    kernel: FakeKernel, events: XfrmEvents, told: list[Event]
) -> None:
    kernel.emit(NEWSA)
    events.drain()
    assert len(told) == 1
    assert not any(contents(events))


@pytest.mark.parametrize(
    ("hostile", "raised"),
    [
        (NEWSA + b"\xff", CodecError),
        (NEWSA[:-1], CodecError),
        (NEWSA.replace(b"rfc4106", b"\xff\xfe\xfd4106"), CodecError),
        (NEWSA + m.message(4), BackendOverrun),
        (NEWSA + bytes(70000), BackendOverrun),
        (NEWSA + m.message(0x99, m.KEY), CodecError),
    ],
)
def test_the_buffer_is_overwritten_when_decoding_fails(
    kernel: FakeKernel, events: XfrmEvents, hostile: bytes, raised: type[Exception]
) -> None:
    kernel.emit(hostile)
    with pytest.raises(raised) as caught:
        events.drain()
    assert "KEY" not in str(caught.value)
    assert not any(contents(events))


@pytest.mark.parametrize("failure", [KeyError, BackendOverrun, BlockingIOError])
def test_the_buffer_is_overwritten_when_the_callback_fails(
    kernel: FakeKernel, failure: type[Exception]
) -> None:
    def take(event: Event) -> None:
        raise failure

    events = XfrmEvents(take, factory=kernel.socket)
    kernel.emit(NEWSA)
    with pytest.raises((failure, BackendUnavailable)):
        events.drain()
    assert not any(contents(events))
    events.close()


def test_an_error_of_the_socket_is_explained(kernel: FakeKernel, events: XfrmEvents) -> None:
    kernel.emit(OSError(errno.EIO, "Input/output error"))
    with pytest.raises(BackendUnavailable, match="Input/output error"):
        events.drain()


def test_closed_twice(kernel: FakeKernel) -> None:
    events = XfrmEvents(lambda event: None, factory=kernel.socket)
    assert events.fileno() >= 0
    events.close()
    events.close()
    assert events.fileno() == -1
    with pytest.raises(BackendUnavailable):
        events.drain()


def answering(kernel: FakeKernel, *replies: Callable[[int], Reply]) -> None:
    kernel.answer = lambda protocol, kind, sequence, payload: [r(sequence) for r in replies]


async def test_a_dump_takes_only_its_own_answers(kernel: FakeKernel, told: list[Event]) -> None:
    answering(
        kernel,
        lambda sequence: m.message(m.NEWSA, m.sa_info(spi=1), sequence=sequence + 7),
        lambda sequence: m.message(m.NEWSA, m.sa_info(spi=2), sequence=sequence),
        lambda sequence: done(sequence) + m.message(m.NEWSA, m.sa_info(spi=3), sequence=sequence),
    )
    dumps = XfrmDumps(factory=kernel.socket)
    await dumps.read(xfrm.dump_sas, told.append)
    dumps.close()
    assert [event.sa.spi for event in told if isinstance(event, SAAdded)] == [2]


async def test_an_interrupted_dump_is_an_overrun(kernel: FakeKernel) -> None:
    answering(kernel, lambda sequence: done(sequence, flags=2 | wire.NLM_F_DUMP_INTR))
    dumps = XfrmDumps(factory=kernel.socket)
    with pytest.raises(BackendOverrun, match="changed while"):
        await dumps.read(xfrm.dump_sas, lambda event: None)
    dumps.close()


async def test_a_dump_without_an_end_is_an_overrun(kernel: FakeKernel) -> None:
    answering(kernel, lambda sequence: m.message(m.NEWSA, m.sa_info(), sequence=sequence))
    dumps = XfrmDumps(factory=kernel.socket)
    with pytest.raises(BackendOverrun, match="before its end"):
        await dumps.read(xfrm.dump_sas, lambda event: None)
    dumps.close()


@pytest.mark.parametrize("reply", [error, done])
async def test_a_refused_dump(kernel: FakeKernel, reply: Callable[..., bytes]) -> None:
    if reply is error:
        answering(kernel, lambda sequence: error(errno.EPERM, sequence=sequence))
    else:
        answering(kernel, lambda sequence: done(sequence, code=errno.EPERM))
    dumps = XfrmDumps(factory=kernel.socket)
    with pytest.raises(BackendDenied):
        await dumps.read(xfrm.dump_sas, lambda event: None)
    dumps.close()


def test_lookups_take_only_their_own_answers(kernel: FakeKernel) -> None:
    requests = XfrmRequests(factory=kernel.socket)
    key = SAKey(m.B, 50, 1)
    answering(
        kernel,
        lambda sequence: m.message(m.NEWSA, m.sa_info(spi=9), sequence=sequence - 1),
        lambda sequence: error(0, sequence=sequence),
        lambda sequence: m.message(m.NEWSA, m.sa_info(spi=1), sequence=sequence),
    )
    found = requests.sa(key)
    assert found is not None
    assert found.spi == 1
    answering(kernel)
    assert requests.sa(key) is None
    answering(kernel, lambda sequence: m.message(m.FLUSHSA, b"\0", sequence=sequence))
    assert requests.sa(key) is None
    with pytest.raises(ValueError, match="4 or 16 bytes"):
        requests.sa(SAKey(b"", 50, 1))
    requests.close()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_kernels_without_default_actions_allow(kernel: FakeKernel, code: int) -> None:
    requests = XfrmRequests(factory=kernel.socket)
    answering(kernel, lambda sequence: error(code, sequence=sequence))
    assert requests.defaults() == ALLOWED
    answering(kernel, lambda sequence: m.message(m.FLUSHSA, b"\0", sequence=sequence))
    assert requests.defaults() == ALLOWED
    answering(kernel, lambda sequence: error(errno.ENOMEM, sequence=sequence))
    with pytest.raises(BackendUnavailable):
        requests.defaults()
    requests.close()
