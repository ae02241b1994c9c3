"""Netlink sockets whose receive buffer keeps nothing, and what the kernel answers on them.

Rules:

* NETLINK_XFRM sends keys. They are received into a buffer of ours, decoded in place and
  overwritten before anyone else runs, also when decoding fails. (pyroute2's sockets queue what
  they received, and cannot run on uvloop: they carry other families, never this one.)
* Requests and events have separate sockets: an event carries the sequence number of whoever
  caused it, so only the socket tells it from a reply.
* A socket belongs to the network namespace that its creator was in. Only what the kernel itself
  sent is looked at.
* Nothing here waits: the kernel answers a request within send(), a dump within recv().
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Iterable

from ..enums import PolicyAction
from ..errors import BackendDenied, BackendError, BackendOverrun, BackendUnavailable
from ..events import DefaultActions, Event, SAAdded
from ..sa import SA, SAKey
from ..wire import netlink as wire
from ..wire import xfrm
from .sockopts import SO_RCVBUFFORCE

__all__ = ["NetlinkSocket", "SocketFactory", "XfrmRequests", "dump", "open_xfrm"]

SocketFactory = Callable[[int, int, int], socket.socket]
"""``socket.socket``, or a stand-in: called with address family, type and protocol."""

_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
_BUFFER_SIZE = 1 << 16
_EVENT_QUEUE = 8 << 20
_DUMP_TRIES = 8

_Take = Callable[[memoryview, wire.Message], None]


class NetlinkSocket:
    """A non-blocking netlink socket, subscribed to ``groups`` (multicast group numbers).

    Raises OSError as socket(2), bind(2) and setsockopt(2) do.
    """

    def __init__(
        self,
        protocol: int,
        groups: Iterable[int] = (),
        *,
        queue_bytes: int = 0,
        factory: SocketFactory = socket.socket,
    ) -> None:
        self._buffer = bytearray(_BUFFER_SIZE)
        self._sequence = 0
        self._socket = factory(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        try:
            self._socket.setblocking(False)
            if queue_bytes:
                self._make_room(queue_bytes)
            self._socket.bind((0, 0))
            for group in groups:
                self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor, -1 once closed."""
        return self._socket.fileno()

    def next_sequence(self) -> int:
        """Return a number for the next request."""
        self._sequence = self._sequence % 0xFFFFFFFF + 1
        return self._sequence

    def send(self, message: bytes) -> None:
        """Send one request to the kernel, which handles it before this returns."""
        self._socket.send(message)

    def receive(self, take: _Take) -> bool:
        """Receive one datagram and call ``take(buffer, message)`` for each message in it.

        The buffer is overwritten afterwards, whatever happens. Returns False where nothing was
        waiting. Raises BackendOverrun where the kernel dropped something or the buffer was too
        small, CodecError for malformed bytes, and whatever ``take`` raises.
        """
        size = _BUFFER_SIZE
        view = memoryview(self._buffer)
        try:
            size, _, flags, sender = self._socket.recvmsg_into([view])
            if flags & socket.MSG_TRUNC:
                raise BackendOverrun(errno.EMSGSIZE, "a netlink message was longer than the buffer")
            if sender[0] == 0:
                for message in wire.messages(view, size):
                    take(view, message)
        except BlockingIOError:
            size = 0
            return False
        except OSError as error:
            if error.errno == errno.ENOBUFS and not isinstance(error, BackendError):
                raise BackendOverrun(
                    errno.ENOBUFS, "netlink events came faster than they were read"
                ) from None
            raise
        finally:
            view[:size] = bytes(size)
            view.release()
        return True

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._socket.close()

    def _make_room(self, size: int) -> None:
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


def open_xfrm(*, events: bool = False, factory: SocketFactory = socket.socket) -> NetlinkSocket:
    """Open a NETLINK_XFRM socket, for events or for requests, in the thread's namespace.

    Raises BackendUnavailable where the kernel has no XFRM, BackendDenied without CAP_NET_ADMIN.
    """
    try:
        return NetlinkSocket(
            xfrm.NETLINK_XFRM,
            xfrm.GROUPS if events else (),
            queue_bytes=_EVENT_QUEUE if events else 0,
            factory=factory,
        )
    except OSError as error:
        raise explained(error) from error


def explained(error: OSError) -> OSError:
    """Return the error that tells a user what is missing and how to get it."""
    if isinstance(error, BackendError):
        return error
    if error.errno in (errno.EPERM, errno.EACCES):
        return BackendDenied(
            errno.EPERM,
            "reading the kernel's IPsec tables needs CAP_NET_ADMIN in the user namespace that owns "
            "this network namespace: run as root, under systemd with "
            "AmbientCapabilities=CAP_NET_ADMIN, or with `setcap cap_net_admin+ep` on the "
            "interpreter",
        )
    if error.errno in (errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.ENOENT, errno.EPROTOTYPE):
        return BackendUnavailable(
            error.errno,
            "this kernel has no NETLINK_XFRM (CONFIG_XFRM_USER; try `modprobe xfrm_user`)",
        )
    return BackendUnavailable(error.errno, f"NETLINK_XFRM: {os.strerror(error.errno or 0)}")


async def dump(
    channel: NetlinkSocket, build: Callable[[int], bytes], take: _Take, restart: Callable[[], None]
) -> None:
    """Read a whole table, one datagram per turn of the loop.

    ``build(sequence)`` makes the request and ``take(buffer, message)`` gets each record.
    ``restart()`` is called where the kernel says that the table changed under the dump and all
    records will come again. Raises BackendOverrun where it cannot be completed, CodecError, and
    OSError with the kernel's answer.
    """
    for _ in range(_DUMP_TRIES):
        reader = _DumpReader(channel.next_sequence(), take)
        channel.send(build(reader.sequence))
        while not reader.done:
            if not channel.receive(reader):
                raise BackendOverrun(errno.EAGAIN, "a netlink dump stopped before its end")
            await asyncio.sleep(0)
        if not reader.interrupted:
            return
        restart()
    raise BackendOverrun(errno.EINTR, "the IPsec tables change faster than they can be read")


class _DumpReader:
    def __init__(self, sequence: int, take: _Take) -> None:
        self.sequence = sequence
        self.done = False
        self.interrupted = False
        self._take = take

    def __call__(self, buffer: memoryview, message: wire.Message) -> None:
        if message.sequence != self.sequence:
            return
        self.interrupted |= message.interrupted
        if message.kind in (wire.NLMSG_DONE, wire.NLMSG_ERROR):
            self.done = True
            code = wire.error_number(buffer, message)
            if code == errno.EINTR:
                self.interrupted = True
            elif code:
                raise OSError(code, os.strerror(code))
        else:
            self._take(buffer, message)


class XfrmRequests:
    """Look-ups that the kernel answers at once."""

    def __init__(self, *, factory: SocketFactory = socket.socket) -> None:
        self._channel = open_xfrm(factory=factory)

    def sa(self, key: SAKey) -> SA | None:
        """Return the SA of this key, whatever its ``if_id``; None where the kernel has none.

        Raises CodecError, and BackendError with the kernel's answer.
        """
        try:
            events = self._ask(lambda sequence: xfrm.get_sa(key, sequence))
        except ProcessLookupError:
            return None
        for event in events:
            if isinstance(event, SAAdded):
                return event.sa
        return None

    def defaults(self) -> DefaultActions:
        """Return what happens to traffic without a policy; kernels before 5.15 allow it.

        Raises CodecError, and BackendError with the kernel's answer.
        """
        try:
            events = self._ask(xfrm.get_default)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            events = []
        for event in events:
            if isinstance(event, DefaultActions):
                return event
        return DefaultActions(PolicyAction.ALLOW, PolicyAction.ALLOW, PolicyAction.ALLOW)

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._channel.close()

    def _ask(self, build: Callable[[int], bytes]) -> list[Event]:
        events: list[Event] = []
        sequence = self._channel.next_sequence()

        def take(buffer: memoryview, message: wire.Message) -> None:
            if message.sequence != sequence:
                return
            if message.kind == wire.NLMSG_ERROR:
                if code := wire.error_number(buffer, message):
                    raise OSError(code, os.strerror(code))
            else:
                events.extend(xfrm.decode(buffer, message))

        self._channel.send(build(sequence))
        while self._channel.receive(take):
            if events:
                break
        return events
