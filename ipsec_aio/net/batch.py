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

__all__ = ["CONTROL", "NAME_SIZES", "SLOTS", "Batch", "Odd", "Taken", "address", "batch_for"]

SLOTS = 64
"""Datagrams per call."""
CONTROL = 224
"""Bytes for the control messages of one datagram."""
NAME_SIZES: Mapping[int, int] = {socket.AF_INET: 16, socket.AF_INET6: 32}
"""Where control messages begin in what came beside a datagram: after the aligned sockaddr."""

# struct iovec and struct mmsghdr of 64-bit Linux: bits/types/struct_iovec.h, bits/socket.h.
_IOVEC = struct.Struct("=QQ")
_HEADER = struct.Struct("=QI4xQQQQi4xI4x")
# msg_controllen, msg_flags, msg_len.
_TOLD = "40xQi4xI4x"
_DONTWAIT = int(socket.MSG_DONTWAIT)
_SIN = struct.Struct("=H2s4s8x")
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
        # Equal offsets of payloads in pages would meet in a few lines of the caches.
        stride = _aligned(payload, 64) + 1280
        headers = _IOVEC.size * SLOTS
        slots = headers + _HEADER.size * SLOTS
        end = slots + slot * SLOTS
        payloads = _aligned(end, mmap.PAGESIZE)
        # Private: a forked child must not receive into its parent's region.
        self._region = region = mmap.mmap(
            -1, payloads + stride * SLOTS, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        base = ctypes.addressof(ctypes.c_char.from_buffer(region))
        self._starts = tuple(range(payloads, payloads + stride * SLOTS, stride))
        for index, start in enumerate(self._starts):
            iovec, beside = _IOVEC.size * index, slots + slot * index
            _IOVEC.pack_into(region, iovec, base + start, payload)
            _HEADER.pack_into(
                region,
                headers + _HEADER.size * index,
                base + beside,
                name,
                base + iovec,
                1,
                base + beside + name,
                control,
                0,
                0,
            )
        self._headers = headers
        self._slots = slots
        self._headers_at = ctypes.c_void_p(base + headers)
        self._fresh = region[headers:end]
        self._reset = slice(headers, end)
        self._told = [struct.Struct("=" + _TOLD * count) for count in range(SLOTS + 1)]
        # The size that the last batch began with, and the last one that was cut in one go.
        self._size = -1
        self._cuts = -1, struct.Struct("")
        self._beside: dict[tuple[int, int], struct.Struct] = {}

    def receive(self, fd: int, expected: int) -> Taken:
        """Take what is there, up to SLOTS datagrams, each with ``expected`` bytes of control
        messages as far as the caller can guess.

        Raises the OSError that the socket's own methods would, BlockingIOError where nothing is
        there. An error behind some datagrams is raised by the next call; so less than SLOTS
        datagrams do not say that the queue was empty.
        """
        region = self._region
        region[self._reset] = self._fresh
        count = self._call(fd, self._headers_at, SLOTS, _DONTWAIT, None)
        if count < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        beside = self._beside.get((count, expected))
        if beside is None:
            beside = self._struct(count, expected)
        starts = self._starts
        told = self._told[count].unpack_from(region, self._headers)
        evidence = beside.unpack_from(region, self._slots)
        sizes = told[2::3]
        size = sizes[0]
        payloads: Sequence[bytes]
        if size == self._size and sizes == (size,) * SLOTS:
            payloads = self._cut(size).unpack_from(region, starts[0])
        else:
            self._size = size
            payloads = [
                region[start : start + size] for start, size in zip(starts, sizes, strict=False)
            ]
        lengths, flags = told[::3], told[1::3]
        if lengths == (expected,) * count and not any(flags):
            return payloads, evidence, _NOTHING
        return payloads, evidence, self._odd(lengths, flags, expected)

    def _cut(self, size: int) -> struct.Struct:
        """What cuts a full batch's payloads of one size; worth its while when the size recurs."""
        if size != self._cuts[0]:
            gap = self._starts[1] - self._starts[0] - size
            self._cuts = size, struct.Struct(f"{size}s{gap}x" * (SLOTS - 1) + f"{size}s")
        return self._cuts[1]

    def _struct(self, count: int, expected: int) -> struct.Struct:
        wanted = min(self._name + expected, self._slot)
        made = struct.Struct(f"{wanted}s{self._slot - wanted}x" * count)
        self._beside[count, expected] = made
        return made

    def _odd(
        self, lengths: tuple[int, ...], flags: tuple[int, ...], expected: int
    ) -> Mapping[int, Odd]:
        odd: dict[int, Odd] = {}
        for index, (length, flag) in enumerate(zip(lengths, flags, strict=True)):
            if length != expected or flag:
                start = self._slots + self._slot * index
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
