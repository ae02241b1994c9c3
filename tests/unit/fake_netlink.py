"""A kernel's netlink side in memory, for what a real one does only by luck or where it has ESP.

``FakeKernel().socket`` stands in for ``socket.socket``. It answers requests as the kernel does,
from ``sas``, ``policies`` and ``links``, and can be told to refuse, to lie and to lose.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable
from typing import cast

import xfrm_messages as m

from ipsec_aio.wire.netlink import attribute, attributes

NETLINK_ROUTE, NETLINK_XFRM = 0, 6
Reply = bytes | OSError
KERNEL = (0, 0)


def error(code: int, *, sequence: int = 0) -> bytes:
    return m.message(2, struct.pack("=i", -code) + bytes(16), sequence=sequence)


def done(sequence: int, *, code: int = 0, flags: int = 2) -> bytes:
    return m.message(3, struct.pack("=i", -code), sequence=sequence, flags=flags)


def link(ifindex: int, kind: str = "", *, message: int = 16, family: int = 0) -> bytes:
    payload = struct.pack("=BxHiII", family, 1, ifindex, 0, 0)
    if kind:
        payload += attribute(18, attribute(1, kind.encode() + b"\0"))
    return payload


def route(kind: int) -> bytes:
    return struct.pack("=8BI", 2, 32, 0, 0, 254, 2, 0, kind, 0)


# XFRMNLGRP_*
XFRM_GROUPS = {
    **dict.fromkeys((m.NEWSA, m.DELSA, m.UPDSA, m.FLUSHSA), 3),
    **dict.fromkeys((m.NEWPOLICY, m.DELPOLICY, m.UPDPOLICY, m.FLUSHPOLICY, m.GETDEFAULT), 4),
    **dict.fromkeys((m.EXPIRE, m.POLEXPIRE), 2),
    m.ACQUIRE: 1,
    m.NEWAE: 5,
    m.REPORT: 6,
    m.MIGRATE: 7,
    m.MAPPING: 8,
}
# RTNLGRP_*, by address family where there is one for each.
LINK = {socket.AF_UNSPEC: 1, socket.AF_BRIDGE: 1}
ADDRESS = {socket.AF_INET: 5, socket.AF_INET6: 9}
RULE = {socket.AF_INET: 8, socket.AF_INET6: 19}
ROUTE_GROUPS = {16: LINK, 17: LINK, 20: ADDRESS, 21: ADDRESS, 32: RULE, 33: RULE}


def group_of(datagram: Reply, protocol: int) -> int | None:
    """Return the group that the kernel sends it to; None for what is no message of any."""
    if isinstance(datagram, OSError) or len(datagram) <= 16:
        return None
    (kind,) = struct.unpack_from("=H", datagram, 4)
    if protocol == NETLINK_XFRM:
        return XFRM_GROUPS.get(kind)
    return ROUTE_GROUPS[kind][datagram[16]]


def answers(info: bytes, wanted: bytes) -> bool:
    """Whether a GETSA finds this SA: by address, SPI, family, protocol and mark, not by if_id."""
    value, mask = mark_of(wanted[24:])
    theirs, their_mask = mark_of(info[224:])
    return (
        info[56:76] == wanted[:20]
        and info[212:214] == wanted[20:22]
        and info[76] == wanted[22]
        and value & mask & their_mask == theirs
    )


def mark_of(told: bytes) -> tuple[int, int]:
    for number, start, end in attributes(told, 0, len(told)):
        if number == 21:
            return struct.unpack("=II", told[start:end])
    return 0, 0


class FakeKernel:
    """``answer(protocol, kind, request)`` may be replaced; it gives datagrams or an error."""

    def __init__(self) -> None:
        self.sas: list[bytes] = []
        self.policies: list[bytes] = []
        self.links: list[bytes] = []
        self.local: set[bytes] = set()
        self.opened: list[FakeSocket] = []
        self.asked: list[int] = []
        self.refuse: dict[int, OSError] = {}
        self.answer: Callable[[int, int, int, bytes], list[Reply]] = self.usual_answer

    def socket(self, family: int, kind: int, protocol: int) -> socket.socket:
        assert (family, kind) == (socket.AF_NETLINK, socket.SOCK_RAW)
        if protocol in self.refuse:
            raise self.refuse[protocol]
        made = FakeSocket(self, protocol)
        self.opened.append(made)
        return cast("socket.socket", made)

    @property
    def listening(self) -> list[FakeSocket]:
        return [s for s in self.opened if s.groups and not s.closed]

    def emit(self, *datagrams: Reply, protocol: int = NETLINK_XFRM) -> None:
        """Tell those who are in the group of each datagram's first message; errors tell all."""
        for datagram in datagrams:
            group = group_of(datagram, protocol)
            for sock in self.listening:
                if sock.protocol == protocol and (group is None or group in sock.groups):
                    sock.queue(datagram)

    def usual_answer(self, protocol: int, kind: int, sequence: int, payload: bytes) -> list[Reply]:
        self.asked.append(kind)
        if protocol == NETLINK_ROUTE:
            if kind == 18:
                return self.dump(16, self.links, sequence)
            local = payload[16 : 16 + payload[1] // 8] in self.local
            return [m.message(24, route(2 if local else 1), sequence=sequence)]
        if kind == m.GETSA and not payload:
            return self.dump(m.NEWSA, self.sas, sequence)
        if kind == m.GETPOLICY:
            return self.dump(m.NEWPOLICY, self.policies, sequence)
        if kind == m.GETSA:
            for info in self.sas:
                if answers(info, payload):
                    return [m.message(m.NEWSA, info, sequence=sequence)]
            return [error(errno.ESRCH, sequence=sequence)]
        return [m.message(m.GETDEFAULT, bytes([2, 2, 2, 0]), sequence=sequence)]

    def dump(self, kind: int, records: list[bytes], sequence: int) -> list[Reply]:
        found: list[Reply] = [m.message(kind, r, sequence=sequence, flags=2) for r in records]
        return [*found, done(sequence)]


class FakeSocket:
    """Datagrams come through a real descriptor, so that loops see them."""

    def __init__(self, kernel: FakeKernel, protocol: int) -> None:
        self.kernel = kernel
        self.protocol = protocol
        self.groups: list[int] = []
        self.closed = False
        self.waiting: list[Reply] = []
        self.sender = KERNEL
        self.flags = 0
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._ours.setblocking(False)
        self._theirs.setblocking(False)

    def setblocking(self, flag: bool) -> None:
        assert not flag

    def bind(self, address: tuple[int, int]) -> None:
        assert address == KERNEL

    def setsockopt(self, level: int, option: int, value: int) -> None:
        if (level, option) == (270, 1):
            self.groups.append(value)

    def fileno(self) -> int:
        return self._ours.fileno()

    def send(self, data: bytes) -> int:
        self._ours.send(b"")  # raises once closed
        self._theirs.recv(1)
        size, kind, flags, sequence, _ = struct.unpack_from("=IHHII", data)
        assert size == len(data)
        assert flags & 1
        self.queue(*self.kernel.answer(self.protocol, kind, sequence, data[16:]))
        return len(data)

    def queue(self, *replies: Reply) -> None:
        for reply in replies:
            self.waiting.append(reply)
            self._theirs.send(b"!")

    def recvmsg_into(
        self, buffers: list[memoryview]
    ) -> tuple[int, list[object], int, tuple[int, int]]:
        self._ours.recv(1)
        reply = self.waiting.pop(0)
        if isinstance(reply, OSError):
            raise reply
        size = min(len(reply), len(buffers[0]))
        buffers[0][:size] = reply[:size]
        flags = self.flags | (socket.MSG_TRUNC if size < len(reply) else 0)
        return size, [], flags, self.sender

    def close(self) -> None:
        self.closed = True
        self._ours.close()
        self._theirs.close()
