"""Many datagrams with one system call, and what came beside each as one piece of bytes.

Rules:

* recvmmsg(2) is called through ctypes, into one mapped region of headers, control messages and
  payloads. :func:`batch_for` returns None where the call or its layout is missing; then recvmsg
  does the work.
* The control area is zeroed before each call: the kernel writes no padding, and a datagram without
  a message must not inherit that of the one before it in its slot.
* What came beside a datagram is ``sockaddr ‖ control messages``, byte by byte: equal evidence is
  equal bytes. The length is one for all of a call, and the caller's guess; a datagram that it does
  not fit, or that was truncated, is :class:`Odd`, and its evidence is cut to its own length.
* The endpoints of a thread share its regions, and no two threads one: a false token would come of
  that. Nothing is left in a region when a call returns.
* What all slots need is close together, so that it stays in the processor's caches: payloads begin
  in one small piece for each, and what is longer goes on in another one far away.
* What the kernel wrote into the headers is taken apart only where it differs from the last time.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from ipsec_aio.wire.cmsg import ControlMessage, split

__all__ = [
    "CONTROL",
    "NAME_SIZES",
    "NEAR",
    "SLOTS",
    "Batch",
    "Odd",
    "Taken",
    "address",
    "batch_for",
]

SLOTS = 64
"""Datagrams per call."""
CONTROL = 160
"""Bytes for the control messages of one datagram: all that are asked for take 120."""
NEAR = 2048
"""Bytes of a payload that are kept close to those of others."""
NAME_SIZES: Mapping[int, int] = {socket.AF_INET: 8, socket.AF_INET6: 32}
"""Where control messages begin in what came beside a datagram: after the sockaddr, aligned, without
the padding of sockaddr_in.
"""

# struct iovec and struct mmsghdr of 64-bit Linux: bits/types/struct_iovec.h, bits/socket.h.
_IOVEC = struct.Struct("=QQ")
_HEADER = struct.Struct("=QI4xQQQQi4xI4x")
# msg_controllen, msg_flags, msg_len.
_TOLD = "40xQi4xI4x"
_DONTWAIT = int(socket.MSG_DONTWAIT)
_SIN = struct.Struct("=H2s4s")
_SIN6 = struct.Struct("=H2s4s16sI")


class Odd:
    """A datagram with ``length`` bytes of control messages, unexpectedly, or a truncated one.

    ``flags`` are recvmsg's.
    """

    __slots__ = ("evidence", "flags", "length")

    def __init__(self, evidence: bytes, length: int, flags: int) -> None:
        self.evidence = evidence
        self.length = length
        self.flags = flags


_NOTHING: Mapping[int, Odd] = {}

Taken = tuple[Sequence[bytes], tuple[bytes, ...], Mapping[int, Odd]]
"""Payloads, what came beside each, and by their index those to which that does not apply."""


class Batch:
    """A region for one family's sockets, for the thread that made it: ``thread``.

    ``payload`` and ``control`` are how many bytes of each are taken of a datagram.
    """

    def __init__(self, call: Callable[..., int], family: int, payload: int, control: int) -> None:
        self.thread = threading.get_ident()
        self._call = call
        name = NAME_SIZES[family]
        self._name = name
        self._slot = slot = name + _aligned(control, 8)
        near = min(payload, NEAR)
        far = payload - near
        # Equal offsets of payloads in pages would meet in a few lines of the caches.
        self._stride = stride = _aligned(near, 64) + 64
        area = _HEADER.size * SLOTS
        end = area + slot * SLOTS
        vectors = _aligned(end, 64)
        payloads = vectors + 2 * _IOVEC.size * SLOTS
        rests = _aligned(payloads + stride * SLOTS, mmap.PAGESIZE)
        # Private: a forked child must not receive into its parent's region.
        self._region = region = mmap.mmap(
            -1, rests + far * SLOTS, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        base = ctypes.addressof(ctypes.c_char.from_buffer(region))
        self._starts = tuple(range(payloads, payloads + stride * SLOTS, stride))
        self._rests = tuple(rests + far * index for index in range(SLOTS))
        for index, start in enumerate(self._starts):
            vector, beside = vectors + 2 * _IOVEC.size * index, area + slot * index
            _IOVEC.pack_into(region, vector, base + start, near)
            _IOVEC.pack_into(region, vector + _IOVEC.size, base + self._rests[index], far)
            _HEADER.pack_into(
                region,
                _HEADER.size * index,
                base + beside,
                name,
                base + vector,
                2,
                base + beside + name,
                control,
                0,
                0,
            )
        self._near = near
        self._beside_at = area
        self._address = ctypes.c_void_p(base)
        self._fresh = region[:end]
        self._reset = slice(0, end)
        self._headers = slice(0, area)
        # The headers of the last call, and what they say.
        self._told = b""
        self._count = 0
        self._sizes: tuple[int, ...] = ()
        self._lengths: tuple[int, ...] = ()
        self._flags: tuple[int, ...] = ()
        # The length of all control messages; -1 where one is different, or has flags.
        self._plain = -1
        # What cuts all payloads at once; worth its while where the headers recur.
        self._cut: struct.Struct | None = None
        self._uncut = False
        self._cuts: dict[tuple[int, int], struct.Struct] = {}

    def receive(self, fd: int, expected: int) -> Taken:
        """Take what is there, up to SLOTS datagrams, each with ``expected`` bytes of control
        messages as far as the caller can guess.

        Raises the OSError that the socket's own methods would, BlockingIOError where nothing is
        there. An error behind some datagrams is raised by the next call; so less than that
        datagrams do not say that the queue was empty.
        """
        region = self._region
        region[self._reset] = self._fresh
        count = self._call(fd, self._address, SLOTS, _DONTWAIT, None)
        if count < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        beside = self._cuts.get((count, expected))
        if beside is None:
            beside = self._struct(count, expected)
        told = region[self._headers]
        if told != self._told or count != self._count:
            self._read(told, count)
        elif self._uncut:
            self._cut, self._uncut = self._cutter(), False
        cut = self._cut
        payloads: Sequence[bytes] = (
            self._slices() if cut is None else cut.unpack_from(region, self._starts[0])
        )
        evidence = beside.unpack_from(region, self._beside_at)
        if self._plain == expected:
            return payloads, evidence, _NOTHING
        return payloads, evidence, self._odd(expected)

    def _read(self, told: bytes, count: int) -> None:
        """Take apart what the kernel has written into the headers."""
        self._told, self._count = told, count
        numbers = struct.unpack_from("=" + _TOLD * count, told)
        self._lengths, self._flags, self._sizes = numbers[::3], numbers[1::3], numbers[2::3]
        length = self._lengths[0]
        plain = self._lengths == (length,) * count and not any(self._flags)
        self._plain = length if plain else -1
        self._cut = None
        self._uncut = max(self._sizes) <= self._near

    def _cutter(self) -> struct.Struct:
        stride = self._stride
        return struct.Struct(
            "".join(f"{size}s{stride - size}x" for size in self._sizes[:-1]) + f"{self._sizes[-1]}s"
        )

    def _slices(self) -> list[bytes]:
        region, near = self._region, self._near
        if max(self._sizes) <= near:
            return [
                region[start : start + size]
                for start, size in zip(self._starts, self._sizes, strict=False)
            ]
        return [
            region[start : start + min(size, near)] + region[rest : rest + max(size - near, 0)]
            for start, rest, size in zip(self._starts, self._rests, self._sizes, strict=False)
        ]

    def _struct(self, count: int, expected: int) -> struct.Struct:
        wanted = min(self._name + expected, self._slot)
        made = struct.Struct(f"{wanted}s{self._slot - wanted}x" * count)
        self._cuts[count, expected] = made
        return made

    def _odd(self, expected: int) -> Mapping[int, Odd]:
        odd: dict[int, Odd] = {}
        for index, (length, flag) in enumerate(zip(self._lengths, self._flags, strict=True)):
            if length != expected or flag:
                start = self._beside_at + self._slot * index
                odd[index] = Odd(self._region[start : start + self._name + length], length, flag)
        return odd


def address(family: int, evidence: bytes) -> tuple[Any, list[ControlMessage]]:
    """Return the sender's address and the control messages, as ``socket.recvmsg`` does."""
    messages = split(evidence[NAME_SIZES[family] :])
    if family == socket.AF_INET:
        _, port, host = _SIN.unpack_from(evidence)
        return (socket.inet_ntop(family, host), int.from_bytes(port, "big")), messages
    _, port, flow, host, scope = _SIN6.unpack_from(evidence)
    return (
        socket.inet_ntop(family, host),
        int.from_bytes(port, "big"),
        int.from_bytes(flow, "big"),
        scope,
    ), messages


def batch_for(family: int, payload: int, control: int = CONTROL) -> Batch | None:
    """Return the running thread's region for sockets of a family; None where there can be none."""
    if family not in NAME_SIZES:
        return None
    regions = _threads.regions
    key = family, payload, control
    batch = regions.get(key)
    if batch is None:
        call = _recvmmsg()
        if call is None:
            return None
        batch = regions[key] = Batch(call, family, payload, control)
    return batch


class _Threads(threading.local):
    def __init__(self) -> None:
        self.regions: dict[tuple[int, int, int], Batch] = {}


_threads = _Threads()


@cache
def _recvmmsg() -> Callable[..., int] | None:
    """The C library's function, if it does what this module takes for granted."""
    if sys.platform != "linux" or struct.calcsize("P") != 8:
        return None
    try:
        call: Callable[..., int] = ctypes.CDLL(None, use_errno=True).recvmmsg
    except (OSError, AttributeError):
        return None
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with near, far:
        # This runs on a loop, where tools report what is sent on blocking sockets.
        far.setblocking(False)
        sent = [b"one", b"", b"three"]
        for data in sent:
            far.send(data)
        try:
            taken = Batch(call, socket.AF_INET, 64, 64).receive(near.fileno(), 0)
        except OSError:
            return None
    return call if (taken[0], taken[2]) == (sent, {}) else None


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to
