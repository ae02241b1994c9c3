"""What a namespace's interfaces and addresses mean for evidence, kept true by events.

* An xfrm interface, or a VTI, hands on packets that it decrypted. Where it was moved in from
  another namespace it scrubs their security path, so that protected packets look clear (mark 0).
* What a host sends to one of its own addresses meets no inbound policy.
"""

from __future__ import annotations

import errno
import socket
import threading
from contextlib import suppress

from ..errors import BackendOverrun
from ..wire import netlink, rtnetlink
from ..wire.netlink import Message
from .netlink import NetlinkSocket, SocketFactory, dump

__all__ = ["Links"]

_OPAQUE_KINDS = frozenset({"xfrm", "vti", "vti6"})
_QUEUE_BYTES = 1 << 20
_DUMP_TRIES = 8
_NO_ROUTE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL})


class Links:
    """The interfaces and addresses of the namespace in which this was built.

    ``changes`` counts the addresses that came or went, ``losses`` those that went, and opaque
    interfaces too. Needs no privilege. Raises OSError where there is no rtnetlink.
    """

    def __init__(self, *, factory: SocketFactory = socket.socket) -> None:
        self.changes = self.losses = 0
        self._opaque: set[int] = set()
        self._known = False
        self._loading = False
        self._asking = threading.Lock()
        self._events = NetlinkSocket(
            rtnetlink.NETLINK_ROUTE, rtnetlink.GROUPS, queue_bytes=_QUEUE_BYTES, factory=factory
        )
        try:
            self._dumps = NetlinkSocket(rtnetlink.NETLINK_ROUTE, factory=factory)
            try:
                self._requests = NetlinkSocket(rtnetlink.NETLINK_ROUTE, factory=factory)
            except BaseException:
                self._dumps.close()
                raise
        except BaseException:
            self._events.close()
            raise

    @property
    def opaque(self) -> bool:
        """Whether an xfrm, vti or vti6 interface is there, or may be: before :meth:`load`."""
        return bool(self._opaque) or not self._known

    @property
    def interfaces(self) -> frozenset[int]:
        """The numbers of the xfrm, vti and vti6 interfaces."""
        return frozenset(self._opaque)

    def fileno(self) -> int:
        """Return the descriptor of the events, to be watched for reading."""
        return self._events.fileno()

    async def load(self) -> None:
        """Read all interfaces.

        Raises BackendOverrun where they change too fast, CodecError and OSError.
        """
        self._loading, self._known = True, False
        try:
            for _ in range(_DUMP_TRIES):
                self._opaque.clear()
                if await dump(self._dumps, rtnetlink.dump_links, self._take):
                    self._known = True
                    break
            else:
                raise BackendOverrun(errno.EINTR, "interfaces change faster than they can be read")
        finally:
            self._loading = False
        self.drain()

    def drain(self) -> None:
        """Take in the events that arrived. Never blocks.

        Raises BackendOverrun, CodecError and OSError: then only a new object knows the truth.
        """
        # What comes during a dump must be played after it.
        while not self._loading and self._events.receive(self._take):
            pass

    def is_local(self, address: bytes) -> bool:
        """Say whether packets to this address stay on this host, in doubt True. Any thread may."""
        sequence = 0
        answers: list[bool] = []

        def take(buffer: memoryview, message: Message) -> None:
            if message.sequence != sequence:
                return
            if message.kind == netlink.NLMSG_ERROR:
                answers.append(netlink.error_number(buffer, message) not in _NO_ROUTE)
            else:
                answers.append(rtnetlink.is_local_route(buffer, message))

        with self._asking, suppress(OSError, ValueError):
            sequence = self._requests.next_sequence()
            self._requests.send(rtnetlink.get_route(address, sequence))
            while not answers and self._requests.receive(take):
                pass
        return answers[0] if answers else True

    def close(self) -> None:
        """Close the sockets. Idempotent."""
        self._events.close()
        self._dumps.close()
        self._requests.close()

    def _take(self, buffer: memoryview, message: Message) -> None:
        if rtnetlink.changes_addresses(message):
            self.changes += 1
            self.losses += rtnetlink.removes_address(message)
            return
        link = rtnetlink.decode_link(buffer, message)
        if link is None:
            return
        if link.gone:
            self.losses += link.ifindex in self._opaque
            self._opaque.discard(link.ifindex)
        elif link.kind in _OPAQUE_KINDS:
            self._opaque.add(link.ifindex)
