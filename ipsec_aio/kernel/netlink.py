"""Netlink sockets whose receive buffer keeps nothing, and what the kernel answers on them.

Rules:

* NETLINK_XFRM sends keys. They are received into a buffer of ours, decoded in place and
  overwritten before anyone else runs, also when decoding fails. pyroute2's sockets keep
  what they received as bytes in a queue, and do not run on uvloop, so they cannot carry it.
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
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress

from ..enums import PolicyAction
from ..errors import BackendDenied, BackendError, BackendOverrun, BackendUnavailable
from ..events import DefaultActions, Event, SAAdded
from ..sa import SA, SAKey
from ..wire import netlink as wire
from ..wire import xfrm
from .sockopts import SO_RCVBUFFORCE

__all__ = [
    "DumpReader",
    "NetlinkSocket",
    "SocketFactory",
    "Take",
    "XfrmDumps",
    "XfrmEvents",
    "XfrmRequests",
    "dump",
]

SocketFactory = Callable[[int, int, int], socket.socket]
"""``socket.socket``, or a stand-in: called with address family, type and protocol."""

_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
_BUFFER_SIZE = 1 << 16
_EVENT_QUEUE = 8 << 20
_RECORDS = 1 << 20

Take = Callable[[memoryview, wire.Message], None]
"""Called with the receive buffer and each message in it; must not keep the buffer."""


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

    @property
    def port(self) -> int:
        """The port id by which the kernel knows this socket."""
        port: int = self._socket.getsockname()[0]
        return port

    def next_sequence(self) -> int:
        """Return a number for the next request."""
        self._sequence = self._sequence % 0xFFFFFFFF + 1
        return self._sequence

    def send(self, message: bytes) -> None:
        """Send one request to the kernel, which handles it before this returns."""
        self._socket.send(message)

    def receive(self, take: Take) -> bool:
        """Receive one datagram and call ``take(buffer, message)`` for each message in it.

        The buffer is overwritten afterwards, whatever happens. Returns False where nothing was
        waiting. Raises BackendOverrun where the kernel dropped something or the buffer was too
        small, CodecError for malformed bytes, and whatever ``take`` raises.
        """
        size = _BUFFER_SIZE
        view = memoryview(self._buffer)
        try:
            try:
                size, _, flags, sender = self._socket.recvmsg_into([view])
            except BlockingIOError:
                size = 0
                return False
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                raise BackendOverrun(
                    errno.ENOBUFS, "netlink events came faster than they were read"
                ) from None
            if flags & socket.MSG_TRUNC:
                raise BackendOverrun(errno.EMSGSIZE, "a netlink message was longer than the buffer")
            if sender[0] == 0:
                for message in wire.messages(view, size):
                    take(view, message)
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


async def dump(channel: NetlinkSocket, build: Callable[[int], bytes], take: Take) -> bool:
    """Read a whole table, one datagram per turn of the loop.

    ``build(sequence)`` makes the request and ``take(buffer, message)`` gets each record. Returns
    False where the kernel says that the table changed under it: what was taken is not whole.
    Raises BackendOverrun where it stops before its end, CodecError, and OSError with the kernel's
    answer.
    """
    reader = DumpReader(channel.next_sequence(), take)
    channel.send(build(reader.sequence))
    while not reader.done:
        if not channel.receive(reader):
            raise BackendOverrun(errno.EAGAIN, "a netlink dump stopped before its end")
        await asyncio.sleep(0)
    return not reader.interrupted


class DumpReader:
    """Takes the answer to request ``sequence``, and calls ``take`` for each record of it.

    Raises OSError with the kernel's refusal. ``done`` at its end; ``interrupted`` where the kernel
    says that the table changed under it.
    """

    def __init__(self, sequence: int, take: Take) -> None:
        self.sequence = sequence
        self.done = False
        self.interrupted = False
        self._take = take

    def __call__(self, buffer: memoryview, message: wire.Message) -> None:
        if message.sequence != self.sequence or self.done:
            return
        self.interrupted |= message.interrupted
        if message.kind in (wire.NLMSG_DONE, wire.NLMSG_ERROR):
            self.done = True
            if code := wire.error_number(buffer, message):
                raise OSError(code, os.strerror(code))
        else:
            self._take(buffer, message)


WHERE = (
    "in the user namespace that owns this network namespace: run as root, under "
    "systemd with AmbientCapabilities=CAP_NET_ADMIN, or with `setcap cap_net_admin+ep` on the "
    "interpreter"
)
"""Where CAP_NET_ADMIN is needed, and how to get it."""


class _XfrmSocket:
    """A NETLINK_XFRM socket in the calling thread's namespace.

    Raises BackendUnavailable where the kernel has no XFRM, BackendDenied without CAP_NET_ADMIN;
    so do all methods, with BackendOverrun where something was lost and CodecError.
    """

    def __init__(
        self,
        groups: Iterable[int] = (),
        *,
        queue_bytes: int = 0,
        factory: SocketFactory = socket.socket,
    ) -> None:
        with _explained():
            self._channel = NetlinkSocket(
                xfrm.NETLINK_XFRM, groups, queue_bytes=queue_bytes, factory=factory
            )

    def fileno(self) -> int:
        """Return the descriptor, -1 once closed."""
        return self._channel.fileno()

    def close(self) -> None:
        """Close the socket. Idempotent."""
        self._channel.close()


class XfrmEvents(_XfrmSocket):
    """What happens to SAs and policies from now on; a loop may watch it for reading.

    ``take(event)`` is called from :meth:`drain`.
    """

    def __init__(
        self,
        take: Callable[[Event], None],
        *,
        queue_bytes: int = _EVENT_QUEUE,
        factory: SocketFactory = socket.socket,
    ) -> None:
        super().__init__(xfrm.GROUPS, queue_bytes=queue_bytes, factory=factory)
        self._take = take

    def drain(self) -> None:
        """Tell all events that are waiting. What ``take`` raises is passed on."""
        receive, take = self._channel.receive, self._take_message
        try:
            while receive(take):
                pass
        except BackendError:
            raise
        except OSError as error:
            raise _explain(error) from error

    def _take_message(self, buffer: memoryview, message: wire.Message) -> None:
        if message.kind == wire.NLMSG_OVERRUN:
            raise BackendOverrun(errno.ENOBUFS, "the kernel reports lost events")
        if message.kind >= xfrm.FIRST_TYPE:
            for event in xfrm.decode(buffer, message):
                self._take(event)


class XfrmDumps(_XfrmSocket):
    """Whole tables. What equal records have in common they share, while this is in use."""

    def __init__(self, *, factory: SocketFactory = socket.socket) -> None:
        super().__init__(factory=factory)
        self._decode = xfrm.Decoder(_RECORDS).decode

    async def read(self, build: Callable[[int], bytes], take: Callable[[Event], None]) -> None:
        """Call ``take(event)`` for each record of the table that ``build(sequence)`` asks for."""
        decode = self._decode

        def take_message(buffer: memoryview, message: wire.Message) -> None:
            for event in decode(buffer, message):
                take(event)

        with _explained():
            if not await dump(self._channel, build, take_message):
                raise BackendOverrun(errno.EINTR, "the IPsec tables changed while they were read")


class XfrmRequests(_XfrmSocket):
    """Look-ups that the kernel answers at once."""

    def __init__(self, *, factory: SocketFactory = socket.socket) -> None:
        super().__init__(factory=factory)

    def sa(self, key: SAKey) -> SA | None:
        """Return the SA of this key, whatever its ``if_id``; None where the kernel has none.

        Raises ValueError for a key whose destination is no address.
        """
        with _explained(), suppress(ProcessLookupError):
            for event in self._ask(lambda sequence: xfrm.get_sa(key, sequence)):
                if isinstance(event, SAAdded):
                    return event.sa
        return None

    def defaults(self) -> DefaultActions:
        """Return what happens to traffic without a policy; kernels before 5.15 allow it."""
        with _explained():
            try:
                answer = self._ask(xfrm.get_default)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
            else:
                for event in answer:
                    if isinstance(event, DefaultActions):
                        return event
        return DefaultActions(PolicyAction.ALLOW, PolicyAction.ALLOW, PolicyAction.ALLOW)

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
        while not events and self._channel.receive(take):
            pass
        return events


@contextmanager
def _explained() -> Generator[None]:
    """Turn the kernel's refusals into errors that say what is missing and how to get it."""
    try:
        yield
    except BackendError:
        raise
    except OSError as error:
        raise _explain(error) from error


def _explain(error: OSError) -> BackendError:
    if error.errno in (errno.EPERM, errno.EACCES):
        return BackendDenied(
            errno.EPERM,
            f"reading the kernel's IPsec tables needs CAP_NET_ADMIN {WHERE}",
        )
    if error.errno in (errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.ENOENT):
        return BackendUnavailable(
            error.errno,
            "this kernel has no NETLINK_XFRM (CONFIG_XFRM_USER; try `modprobe xfrm_user`)",
        )
    return BackendUnavailable(error.errno, f"NETLINK_XFRM: {error.strerror}")
