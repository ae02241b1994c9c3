"""A batch tells what recvmsg tells, of real sockets; and it stands back where it cannot."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipsec_aio.kernel import sockopts
from ipsec_aio.net import batch
from ipsec_aio.net.batch import SLOTS, Batch, address, batch_for

FAMILIES = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


def made(family: int = socket.AF_INET, payload: int = 65536, control: int = batch.CONTROL) -> Batch:
    found = batch_for(family, payload, control)
    assert found is not None
    return found


def bound(family: int, *options: tuple[int, int]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.bind((FAMILIES[family], 0))
    sock.setblocking(False)
    for level, option in options:
        sock.setsockopt(level, option, 1)
    return sock


OPTIONS: dict[int, list[tuple[int, int]]] = {
    socket.AF_INET: [
        (socket.SOL_SOCKET, sockopts.SO_RCVMARK),
        (socket.IPPROTO_IP, sockopts.IP_PKTINFO),
        (socket.IPPROTO_IP, 13),  # IP_RECVTOS
    ],
    socket.AF_INET6: [
        (socket.SOL_SOCKET, sockopts.SO_RCVMARK),
        (socket.IPPROTO_IPV6, sockopts.IPV6_RECVPKTINFO),
        (socket.IPPROTO_IPV6, 66),  # IPV6_RECVTCLASS
    ],
}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(list(FAMILIES)),
    chosen=st.sets(st.integers(0, 2)),
    sizes=st.lists(
        st.one_of(st.integers(0, 200), st.sampled_from([1472, 9000, 65507])),
        min_size=1,
        max_size=80,
    ),
    expected=st.sampled_from([0, 24, 40, 64, 500]),
    limit=st.sampled_from([16, 65536]),
    control=st.sampled_from([24, batch.CONTROL]),
)
@pytest.mark.filterwarnings("ignore:received malformed:RuntimeWarning")
def test_it_tells_what_recvmsg_tells(
    family: int, chosen: set[int], sizes: list[int], expected: int, limit: int, control: int
) -> None:
    options = [OPTIONS[family][index] for index in chosen]
    batches = made(family, limit, control)
    with (
        bound(family, *options) as plain,
        bound(family, *options) as ours,
        bound(family) as sender,
    ):
        for sock in (plain, ours):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        start = 0
        while start < len(sizes):
            # As many as a default receive buffer takes.
            some = sizes[start : start + (2 if max(sizes) > 9000 else 10)]
            start += len(some)
            for size in some:
                data = os.urandom(size)
                sender.sendto(data, plain.getsockname())
                sender.sendto(data, ours.getsockname())
            payloads, evidence, odd = batches.receive(ours.fileno(), expected)
            assert len(payloads) == len(evidence) == len(some)
            for index, data in enumerate(payloads):
                theirs, told, flags, addr = plain.recvmsg(limit, control)
                assert data == theirs
                beside = odd[index].evidence if index in odd else evidence[index]
                assert (odd[index].flags if index in odd else 0) == flags
                where, ancillary = address(family, beside)
                assert where == addr
                if not flags & socket.MSG_CTRUNC:
                    assert ancillary == told
                    length = len(beside) - batch.NAME_SIZES[family]
                    assert (length != expected or bool(flags)) == (index in odd)


def test_equal_evidence_is_equal_bytes_whoever_used_the_region_before() -> None:
    """The kernel leaves padding as it was: another socket's packet info must not shine through."""
    batches = made()
    mark, packet_info = OPTIONS[socket.AF_INET][:2]
    with (
        bound(socket.AF_INET, mark) as one,
        bound(socket.AF_INET, packet_info) as other,
        bound(socket.AF_INET) as sender,
    ):
        seen: set[bytes] = set()
        for _ in range(3):
            sender.sendto(b"x", one.getsockname())
            seen.update(batches.receive(one.fileno(), 24)[1])
            sender.sendto(b"x", other.getsockname())
            batches.receive(other.fileno(), 32)
    assert len(seen) == 1


def test_what_is_shorter_than_expected_inherits_nothing() -> None:
    batches = made()
    mark = OPTIONS[socket.AF_INET][0]
    with bound(socket.AF_INET, mark) as sock, bound(socket.AF_INET) as sender:
        for _ in range(SLOTS):
            sender.sendto(b"x", sock.getsockname())
        payloads, evidence, odd = batches.receive(sock.fileno(), 24)
        assert len(payloads) == SLOTS
        assert not odd
        assert all(len(address(socket.AF_INET, beside)[1]) == 1 for beside in evidence)
        sock.setsockopt(*mark, 0)
        for _ in range(SLOTS):
            sender.sendto(b"x", sock.getsockname())
        payloads, evidence, odd = batches.receive(sock.fileno(), 24)
        assert len(odd) == SLOTS
        for index, beside in enumerate(evidence):
            assert address(socket.AF_INET, beside)[1] == []
            assert odd[index].length == 0
            assert odd[index].evidence == beside[: batch.NAME_SIZES[socket.AF_INET]]


def test_link_local_scopes_and_flow_labels_are_kept() -> None:
    beside = struct.pack(
        "=H2s4s16sI4x",
        socket.AF_INET6,
        (514).to_bytes(2, "big"),
        (0xABCDE).to_bytes(4, "big"),
        socket.inet_pton(socket.AF_INET6, "fe80::1"),
        7,
    )
    assert address(socket.AF_INET6, beside) == (("fe80::1", 514, 0xABCDE, 7), [])


def test_full_batches_of_one_size_and_of_others() -> None:
    batches = made()
    with bound(socket.AF_INET) as sock, bound(socket.AF_INET) as sender:
        for size in (3, 3, 3, 5, 5, 3, 3, 0, 0, 0, 3):
            for last in (size, size, 7):
                sent = [bytes([index]) * size for index in range(SLOTS - 1)] + [b"x" * last]
                for data in sent:
                    sender.sendto(data, sock.getsockname())
                assert list(batches.receive(sock.fileno(), 0)[0]) == sent
        sender.sendto(b"one", sock.getsockname())
        assert list(batches.receive(sock.fileno(), 0)[0]) == [b"one"]


def test_errors_are_the_sockets_own() -> None:
    batches = made()
    with bound(socket.AF_INET) as sock:
        with pytest.raises(BlockingIOError):
            batches.receive(sock.fileno(), 0)
        with bound(socket.AF_INET) as gone:
            sock.connect(gone.getsockname())
        sock.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError) as caught:
            batches.receive(sock.fileno(), 0)
        assert caught.value.args == (errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


def test_a_region_is_of_one_thread() -> None:
    mine = made()
    assert made() is mine
    assert made(payload=100) is not mine
    theirs: list[Batch] = []
    thread = threading.Thread(target=lambda: theirs.append(made()))
    thread.start()
    thread.join()
    assert theirs[0] is not mine
    assert theirs[0].thread != mine.thread == threading.get_ident()


def test_a_child_process_does_not_receive_into_its_parent() -> None:
    batches = made()
    with bound(socket.AF_INET) as sock, bound(socket.AF_INET) as sender:
        sender.sendto(b"parent", sock.getsockname())
        real = batches._call
        told: list[list[bytes]] = []

        def call(*arguments: Any) -> int:
            count = real(*arguments)
            child = os.fork()
            if not child:
                try:
                    batches._call = real
                    sender.sendto(b"childs", sock.getsockname())
                    told.append(batches.receive(sock.fileno(), 0)[0])
                finally:
                    os._exit(0 if told == [[b"childs"]] else 1)
            assert os.waitpid(child, 0)[1] == 0
            return count

        batches._call = call
        try:
            assert batches.receive(sock.fileno(), 0)[0] == [b"parent"]
        finally:
            batches._call = real


@pytest.fixture
def unknown() -> Iterator[None]:
    """The platform is judged anew, and again after the test."""
    batch._recvmmsg.cache_clear()
    batch._threads.regions.clear()
    yield
    batch._recvmmsg.cache_clear()
    batch._threads.regions.clear()


class Library:
    """A C library."""

    def __init__(self, *calls: Callable[..., int]) -> None:
        if calls:
            (self.recvmmsg,) = calls


def no_system_call(*_: Any) -> int:
    ctypes.set_errno(errno.ENOSYS)
    return -1


@pytest.mark.usefixtures("unknown")
@pytest.mark.parametrize("library", [Library(), Library(no_system_call), Library(lambda *_: 3)])
def test_it_stands_back_where_the_call_or_its_layout_is_missing(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert made()
    batch._recvmmsg.cache_clear()
    batch._threads.regions.clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: library)
    assert batch_for(socket.AF_INET, 65536) is None


@pytest.mark.usefixtures("unknown")
def test_the_trial_uses_no_blocking_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[float | None] = []

    class Socket(socket.socket):
        def send(self, *arguments: Any) -> int:
            sent.append(self.gettimeout())
            return super().send(*arguments)

    def socketpair(*kind: int) -> tuple[Socket, Socket]:
        near, far = real(*kind)
        return Socket(fileno=near.detach()), Socket(fileno=far.detach())

    real = socket.socketpair
    monkeypatch.setattr(socket, "socketpair", socketpair)
    assert batch_for(socket.AF_INET, 65536) is not None
    assert set(sent) == {0}


@pytest.mark.usefixtures("unknown")
def test_it_stands_back_on_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch.sys, "platform", "darwin")  # type: ignore[attr-defined]
    assert batch_for(socket.AF_INET, 65536) is None


def test_other_families_have_none() -> None:
    assert batch_for(socket.AF_UNIX, 65536) is None
