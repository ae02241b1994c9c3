"""Control messages of received datagrams, read into a value.

Rules:

* Nothing raises: what has not the form that the kernel gives it, or comes twice, is a doubt.
* Messages of other kinds belong to somebody else and are passed over.
* A merged datagram (UDP_GRO) is a doubt: the kernel merges without regard to mark or security path.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from ipsec_aio.flow import map4, unmap

__all__ = ["Ancillary", "ControlMessage", "parse", "source", "split"]

ControlMessage = tuple[int, int, bytes]
"""Level, type and data, as ``socket.recvmsg`` returns them."""

# struct cmsghdr of the running machine: size_t with the header's own length, level, type; cmsg(3).
_HEADER = struct.Struct("@Nii")
_ALIGNMENT = struct.calcsize("@N")

# Levels and types are those of asm-generic/socket.h, linux/in.h, linux/in6.h, linux/udp.h.
_MARK = struct.Struct("=I")
_IN_PKTINFO = struct.Struct("=i4s4s")
_IN6_PKTINFO = struct.Struct("=16sI")


@dataclass(frozen=True, slots=True)
class Ancillary:
    """What came beside a datagram's bytes.

    ``mark`` is the packet's mark as the host's number, ``local`` the unmapped destination address
    of its IP header; both absent (None, ``b""``) where the kernel did not say. ``reassembled``:
    it came in fragments. ``doubt`` is empty, or why nothing may be concluded.
    """

    mark: int | None = None
    local: bytes = b""
    reassembled: bool = False
    doubt: str = ""


def parse(messages: Iterable[ControlMessage]) -> Ancillary:
    """Read the control messages of one datagram."""
    mark: int | None = None
    local = b""
    reassembled = False
    for level, kind, data in messages:
        match level, kind:
            case (1, 36):  # SOL_SOCKET, SO_MARK
                if mark is not None or len(data) != _MARK.size:
                    return Ancillary(doubt="malformed mark message")
                (mark,) = _MARK.unpack(data)
            case (0, 8):  # IPPROTO_IP, IP_PKTINFO
                if local or len(data) != _IN_PKTINFO.size:
                    return Ancillary(doubt="malformed packet info")
                _, _, local = _IN_PKTINFO.unpack(data)
            case (41, 50):  # IPPROTO_IPV6, IPV6_PKTINFO
                if local or len(data) != _IN6_PKTINFO.size:
                    return Ancillary(doubt="malformed packet info")
                address, _ = _IN6_PKTINFO.unpack(data)
                local = unmap(address)
            case (0, 25) | (41, 77):  # IP_RECVFRAGSIZE, IPV6_RECVFRAGSIZE
                reassembled = True
            case (17, 104):  # SOL_UDP, UDP_GRO
                return Ancillary(doubt="merged by UDP_GRO")
            case _:
                pass
    return Ancillary(mark, local, reassembled)


def source(local: bytes, *, ipv6: bool) -> ControlMessage:
    """Return the message that has a datagram sent from a local address (ip(7), ipv6(7)).

    ``ipv6``: the socket is AF_INET6, which takes an IPv4 address in its mapped form.
    """
    if not ipv6:
        return 0, 8, _IN_PKTINFO.pack(0, local, bytes(4))
    return 41, 50, _IN6_PKTINFO.pack(local if len(local) == 16 else map4(local), 0)


def split(control: bytes) -> list[ControlMessage]:
    """Cut a control buffer into its messages. What has not their form ends it, as zeros do."""
    messages: list[ControlMessage] = []
    start, end = 0, len(control)
    while start + _HEADER.size <= end:
        size, level, kind = _HEADER.unpack_from(control, start)
        if size < _HEADER.size or start + size > end:
            break
        messages.append((level, kind, control[start + _HEADER.size : start + size]))
        start += -(-size // _ALIGNMENT) * _ALIGNMENT
    return messages
