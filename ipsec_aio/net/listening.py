"""A listening port, and when the mark of a connection that it accepted means anything.

Rules:

* The stamp must have covered the port before the socket listened, and still be of the same
  generation at accept. After a change, connections are in doubt until none can be left whose SYN
  came before it (``SETTLE``); then the listener is as good as new.
* The listener's own SO_MARK must be 0, at each accept: connections inherit it.
* All of this is looked at after accept(2), once for the connections that were accepted by then.
* Policies judge a handshake as they are when its last packet comes, which may have been long
  before accept(2). Only what was accepted after the queue was seen empty came after that moment.
* It must be plain TCP (an MPTCP connection has subflows that nobody stamped), in the backend's
  network namespace, and decrypted fragments must not reach reassembly.
* What is not met goes into the evidence's ``doubt``, by name.
* A socket's own policy, set before it listened, holds for its connections: they inherit it.
* The port stays registered as long as the server listens or a connection of its lives: the
  stamp's table also keeps clear segments off those connections.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Final
from weakref import WeakMethod

from ipsec_aio.errors import BackendError
from ipsec_aio.evidence import NEVER
from ipsec_aio.kernel.sockopts import (
    examine,
    is_listening,
    is_readable,
    netns_cookie,
    protocol_of,
    read_mark,
)

if TYPE_CHECKING:
    from ipsec_aio.backends.contract import Backend, Registration

    from .enforce import Enforcement

__all__ = ["SETTLE", "Listener", "arrivals", "run_soon", "unfitness", "weakly"]

SETTLE = 64.0
"""Seconds that a connection can take from SYN to accept: 2^(tcp_synack_retries + 1) - 1 with the
kernel's 5 retries (ip-sysctl)."""
arrivals: Final = count()
"""Numbers connections, and the moments at which none was on its way, in their order."""


def unfitness(sock: socket.socket, backend: Backend) -> str:
    """Say why nothing can be concluded about connections of this socket; mostly empty."""
    try:
        if protocol_of(sock) != socket.IPPROTO_TCP:
            return "not a plain TCP socket"
        cookie = backend.netns_cookie
        if cookie is not None and cookie != netns_cookie(sock):
            return "the socket is in another network namespace"
    except BackendError:
        return "the backend is closed"
    except (OSError, ValueError) as error:
        return f"the socket cannot be examined: {error}"
    return ""


def _brings_mark(sock: socket.socket) -> bool:
    """Whether a socket may have a mark of its own."""
    try:
        return examine(sock, read_mark) != 0
    except (OSError, ValueError):
        return True  # it is closed


def run_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    """Call back on the loop; at once where it is closed. For destructors, which run anywhere."""
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:
        callback()


def weakly(method: Callable[[], None]) -> Callable[[], None]:
    """Return a callback that does nothing once the method's object is gone."""
    reference = WeakMethod(method)

    def call() -> None:
        target = reference()
        if target is not None:
            target()

    return call


class Listener:
    """One port of one server. To be made after bind and registration, before listen."""

    __slots__ = (
        "__weakref__",
        "_accepted",
        "_backend",
        "_closed",
        "_early",
        "_emptied",
        "_emptying",
        "_enforcements",
        "_generation",
        "_holds",
        "_loop",
        "_marked",
        "_registration",
        "_seen",
        "_since",
        "_sockets",
        "_unfit",
        "_unsubscribe",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        backend: Backend,
        registration: Registration,
        sockets: Sequence[socket.socket],
        enforcements: Sequence[tuple[int, bytes, Enforcement]] = (),
    ) -> None:
        self._loop = loop
        self._backend = backend
        # Of each socket that has one: its family and local address.
        self._enforcements = enforcements
        self._registration = registration
        self._sockets = sockets
        self._unfit = next(filter(None, (unfitness(sock, backend) for sock in sockets)), "")
        self._early = any(is_listening(sock) for sock in sockets)
        self._generation = registration.generation
        self._since: float | None = None
        self._holds = 0
        self._closed = False
        self._marked = False
        self._accepted = -1
        self._seen = (False, 0, "")
        # The newest first: what arrives from that number on came after the policies were these.
        self._emptied = ((NEVER, NEVER), (NEVER, NEVER))
        self._emptying = False
        self._unsubscribe = backend.subscribe(weakly(self._look_whether_empty))
        if self._early:
            self._look_whether_empty()

    @property
    def generation(self) -> int:
        """The stamp's generation at this moment; 0 for none."""
        return self._registration.generation

    @property
    def enforces(self) -> bool:
        """Whether any of its sockets has a policy of its own."""
        return len(self._enforcements) > 0

    @property
    def enforced(self) -> bool:
        """Whether the kernel enforces the requirement on all its sockets."""
        return len(self._enforcements) > 0 and all(
            enforcement.place == "kernel" for _, _, enforcement in self._enforcements
        )

    def enforcement_of(self, sock: socket.socket, local: bytes) -> Enforcement | None:
        """Return that of the socket which accepted a connection."""
        for family, address, enforcement in self._enforcements:
            if family == sock.family and (address == local or not any(address)):
                return enforcement
        return None

    def about_to_listen(self) -> None:
        """Note the generation that all handshakes will be of, and the policies that judge them."""
        self._generation = self._registration.generation
        if not self._early:
            self._note_empty(self._backend.policies)

    def emptied_before(self, number: int) -> int:
        """Return what the backend's ``policies`` was when nothing waited to be accepted, at last
        before a connection arrived, NEVER for unknown; ``number`` is the connection's.
        """
        (newest, policies), (older, before) = self._emptied
        return policies if number > newest else before if number > older else NEVER

    def _look_whether_empty(self) -> None:
        policies = self._backend.policies
        if (
            policies == self._emptied[0][1]
            or self._emptying
            or self._closed
            or any(map(is_readable, self._sockets))
        ):
            return
        self._emptying = True
        # What asyncio accepted before has a task that is due by now, and gets its number there.
        self._loop.call_soon(self._note_empty, policies)

    def _note_empty(self, policies: int) -> None:
        self._emptying = False
        self._emptied = (next(arrivals), policies), self._emptied[0]

    def read(self, mark: int | None, accepted: int) -> tuple[int | None, int, str]:
        """Return mark, generation and doubt for a connection that was accepted just now with a
        mark; the mark is None where it means nothing.

        ``accepted`` counts connections: one look serves all that were accepted before it.
        """
        if accepted != self._accepted:
            self._seen = self._look()
            self._accepted = accepted
        means, generation, doubt = self._seen
        if not means:
            return None, generation, doubt
        if mark is None and generation:
            doubt = "the mark cannot be read"
        return mark, generation, doubt

    def _look(self) -> tuple[bool, int, str]:
        """Return whether marks mean anything, generation and doubt as they are at this moment."""
        registration = self._registration
        registration.refresh()
        generation = registration.generation
        if generation != self._generation:
            self._generation = generation
            self._since = self._loop.time()
        self._look_whether_empty()
        doubt = self._unfit or (self._doubt() if generation else "")
        means = not doubt and registration.reads_marks and (generation or not self._is_marked())
        return bool(means), generation, doubt

    def hold(self) -> None:
        """Keep the port registered for one connection more."""
        self._holds += 1

    def release(self) -> None:
        """Give back what :meth:`hold` took. Destructors call it, so in any thread."""
        self._holds -= 1
        self._close_if_unused()

    def close(self) -> None:
        """The server is about to close. Idempotent."""
        if not self._closed:
            self._marked = self._is_marked()
            self._closed = True
            self._sockets = ()
            self._unsubscribe()
            for _, _, enforcement in self._enforcements:
                enforcement.close()
            self._close_if_unused()

    def _doubt(self) -> str:
        if self._early:
            return "the socket was listening before the stamp covered its port"
        if self._registration.keeps_fragments:
            return "decrypted fragments are let through"
        if self._since is not None and self._loop.time() - self._since < SETTLE:
            return "the stamp changed, and the connection may be from before"
        if self._is_marked():
            return "the listening socket has a mark of its own"
        return ""

    def _is_marked(self) -> bool:
        # A closed server accepts no more: what its sockets were at the end stands.
        return self._marked or any(map(_brings_mark, self._sockets))

    def _close_if_unused(self) -> None:
        if self._closed and not self._holds:
            run_soon(self._loop, self._registration.close)
