"""Linux socket options that the ``socket`` module does not name, and typed ways to read them.

Numbers are asm-generic's (socket(7), ip(7), ipv6(7), include/uapi/asm-generic/socket.h).
"""

from __future__ import annotations

import select
import socket
import struct
from asyncio.trsock import TransportSocket
from collections.abc import Callable
from typing import Protocol, TypeVar, cast

__all__ = [
    "IPPROTO_MPTCP",
    "IPV6_RECVFRAGSIZE",
    "IPV6_RECVPKTINFO",
    "IPV6_XFRM_POLICY",
    "IP_PKTINFO",
    "IP_RECVFRAGSIZE",
    "IP_XFRM_POLICY",
    "SO_ACCEPTCONN",
    "SO_COOKIE",
    "SO_MARK",
    "SO_NETNS_COOKIE",
    "SO_PROTOCOL",
    "SO_RCVBUFFORCE",
    "SO_RCVMARK",
    "bytes_received",
    "clear_policies",
    "examine",
    "has_key_manager",
    "is_listening",
    "is_readable",
    "is_v6only",
    "netns_cookie",
    "protocol_of",
    "read_mark",
    "receive_fragment_sizes",
    "receive_marks",
    "receive_packet_info",
    "set_policy",
    "socket_cookie",
]

SO_ACCEPTCONN = 30
SO_RCVBUFFORCE = 33
SO_MARK = 36
SO_PROTOCOL = 38
SO_COOKIE = 57
SO_NETNS_COOKIE = 71
SO_RCVMARK = 75
IP_PKTINFO = 8
IP_XFRM_POLICY = 17
IP_RECVFRAGSIZE = 25
IPV6_XFRM_POLICY = 35
IPV6_RECVPKTINFO = 49
IPV6_RECVFRAGSIZE = 77
IPPROTO_MPTCP = 262

_U64 = struct.Struct("=Q")
# tcpi_bytes_received of struct tcp_info (linux/tcp.h), since Linux 4.1.
_BYTES_RECEIVED = struct.Struct("=128xQ")
_ANSWERING = (TransportSocket, socket.SocketType)
_T = TypeVar("_T")


class _HasFileno(Protocol):
    def fileno(self) -> int: ...


def examine(sock: _HasFileno, question: Callable[[socket.SocketType], _T]) -> _T:
    """Call ``question`` with an object that answers for a socket, each time by one system call.

    uvloop's stand-ins for sockets make a socket object for each question; here one is made for
    all of them, and detached, since the descriptor is the loop's. Raises OSError or ValueError for
    a closed socket.
    """
    if isinstance(sock, _ANSWERING):
        return question(cast("socket.SocketType", sock))
    made = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM, 0, sock.fileno())
    try:
        return question(made)
    finally:
        made.detach()


def netns_cookie(sock: socket.SocketType) -> int | None:
    """Return the cookie of the network namespace a socket lives in, None before Linux 5.14."""
    return _read_u64(sock, SO_NETNS_COOKIE)


def socket_cookie(sock: socket.SocketType) -> int | None:
    """Return the kernel's number of a socket, never used twice; None where it has none."""
    return _read_u64(sock, SO_COOKIE)


def bytes_received(sock: socket.SocketType) -> int | None:
    """Return how many bytes a TCP socket has received in order, whoever has read them; None where
    that is not to be had.
    """
    try:
        told = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED.size)
        return int(_BYTES_RECEIVED.unpack(told)[0])
    except (OSError, struct.error):
        return None


def read_mark(sock: socket.SocketType) -> int | None:
    """Return SO_MARK as the host's unsigned number; None where the socket has no such option."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, SO_MARK) & 0xFFFFFFFF
    except OSError:
        return None


def protocol_of(sock: socket.socket) -> int:
    """Return the IP protocol that the kernel runs on a socket, whatever Python was told.

    Raises OSError for a closed socket.
    """
    return sock.getsockopt(socket.SOL_SOCKET, SO_PROTOCOL)


def is_listening(sock: socket.socket) -> bool:
    """Say whether listen() was called on a socket. Raises OSError for a closed one."""
    return bool(sock.getsockopt(socket.SOL_SOCKET, SO_ACCEPTCONN))


def is_readable(sock: _HasFileno) -> bool:
    """Say whether something waits in a socket's queue, in doubt True: connections to accept, where
    it is listening.
    """
    poll = select.poll()
    try:
        poll.register(sock.fileno(), select.POLLIN)
        return any(events & (select.POLLIN | select.POLLNVAL) for _, events in poll.poll(0))
    except (OSError, ValueError):
        return True


def is_v6only(sock: socket.socket) -> bool:
    """Say whether an IPv6 socket keeps IPv4-mapped traffic out. Raises OSError for a closed one."""
    return bool(sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))


def has_key_manager() -> bool:
    """Say whether anybody here would hear that the kernel wants an SA (XFRMNLGRP_ACQUIRE, PF_KEY).

    It looks at the network namespace of the calling thread (/proc/net/netlink, /proc/net/pfkey).
    """
    try:
        with open("/proc/thread-self/net/pfkey") as lines:
            if len(lines.readlines()) > 1:
                return True
    except OSError:
        pass
    try:
        with open("/proc/thread-self/net/netlink") as lines:
            rows = [line.split() for line in lines]
    except OSError:
        return True  # nobody knows
    return any(row[1] == "6" and int(row[3], 16) & 1 for row in rows[1:])


def set_policy(sock: socket.socket, policy: bytes) -> None:
    """Give a socket a policy of its own, in the place of the one for that direction, at once.

    ``policy`` is what :func:`ipsec_aio.wire.sockpolicy.encode` builds, of the socket's family.
    What was queued before stays unchecked; accepted connections inherit a listener's. Raises
    PermissionError without CAP_NET_ADMIN, OSError (ENOPROTOOPT) on a kernel without XFRM.
    """
    sock.setsockopt(*_policy_option(sock), policy)


def clear_policies(sock: socket.socket) -> None:
    """Take a socket's own policies away, of both directions at once. Raises like set_policy()."""
    sock.setsockopt(*_policy_option(sock), None, 0)


def _policy_option(sock: socket.socket) -> tuple[int, int]:
    if sock.family == socket.AF_INET6:
        return socket.IPPROTO_IPV6, IPV6_XFRM_POLICY
    return socket.IPPROTO_IP, IP_XFRM_POLICY


def receive_marks(sock: socket.socket) -> bool:
    """Ask for an SO_MARK control message with each datagram; False where the kernel will not.

    Linux 5.19 and later have it; some kernels up to 6.3 want CAP_NET_ADMIN or CAP_NET_RAW.
    """
    return _enable(sock, socket.SOL_SOCKET, SO_RCVMARK)


def receive_packet_info(sock: socket.socket) -> bool:
    """Ask for the local address and interface of each datagram.

    On an IPv6 socket, IPv4 traffic comes with a mapped address in IPV6_PKTINFO.
    """
    if sock.family == socket.AF_INET6:
        return _enable(sock, socket.IPPROTO_IPV6, IPV6_RECVPKTINFO)
    return _enable(sock, socket.IPPROTO_IP, IP_PKTINFO)


def receive_fragment_sizes(sock: socket.socket) -> bool:
    """Ask for the largest fragment's size with each datagram that was reassembled.

    An IPv6 socket reports IPv4 traffic's as IP_RECVFRAGSIZE, so it is asked for both.
    """
    if sock.family == socket.AF_INET6:
        v6 = _enable(sock, socket.IPPROTO_IPV6, IPV6_RECVFRAGSIZE)
        return _enable(sock, socket.IPPROTO_IP, IP_RECVFRAGSIZE) and v6
    return _enable(sock, socket.IPPROTO_IP, IP_RECVFRAGSIZE)


def _enable(sock: socket.socket, level: int, option: int) -> bool:
    try:
        sock.setsockopt(level, option, 1)
    except OSError:
        return False
    return True


def _read_u64(sock: socket.SocketType, option: int) -> int | None:
    try:
        (value,) = _U64.unpack(sock.getsockopt(socket.SOL_SOCKET, option, _U64.size))
    except (OSError, struct.error):
        return None
    return int(value)
