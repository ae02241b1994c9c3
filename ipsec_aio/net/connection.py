"""What a stream's token rests on, and when it is replaced.

Rules:

* An accepted connection that rests on the stamp was judged once, by the facts at its accept. SAs
  that are rekeyed or deleted later say nothing about its handshake, so nobody asks again: old
  evidence against new tables could name another peer. What ends it is a change of the stamp,
  which kept clear segments off: then it is UNKNOWN for good. (A token that waits for its SA
  settles by itself.)
  The kernel's own latch keeps clear segments off as well, so there the token stands.
* Every other connection is inferred from the SPD, which also judges the segments to come: it is
  asked again whenever the backend's epoch moves. Its token may get weaker and recover, but never
  says more than the first one that said anything, since earlier bytes came under that.
* An outgoing connection carries no stamp: POLICY at most, or ENFORCED where the kernel held it to
  its requirement before it was connected.
* A connection's own policy, inherited or set, stands in for the SPD: so the SPD is asked here, too.
* Addresses come from the socket alone.
* Tokens that were handed out stay as they are; ``get_extra_info("ptoken")`` and
  ``current_ptoken()`` give the new one, and protocols of ours are told.
* A backend that is closed under a connection makes it UNKNOWN; nothing raises.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Mapping, MutableMapping
from contextvars import Context
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, WeakValueDictionary, ref

from ipsec_aio.enums import Assurance
from ipsec_aio.errors import BackendError, ProtectionError
from ipsec_aio.evidence import IPPROTO_TCP, Evidence
from ipsec_aio.flow import pack_address

from . import registry
from .context import TokenCell
from .enforce import Where, weakly
from .forward import user_of
from .latching import guard_for
from .listening import Listener, run_soon, unfitness
from .protocols import takes_token

if TYPE_CHECKING:
    from ipsec_aio.backends.contract import Backend
    from ipsec_aio.latch import Latch, LatchStatus, ListenerLatch
    from ipsec_aio.tokens import PToken

    from .enforce import Enforcement
    from .latching import Guard

__all__ = ["Connection", "Judge"]

_IP_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_judges: WeakValueDictionary[tuple[int, int], Judge] = WeakValueDictionary()


class Connection(TokenCell):
    """One stream: the cell that its contexts share, with the evidence behind it.

    ``listeners``, by port, are those of the server that accepts it; None for an outgoing one. It
    keeps its listener's port registered until it is closed or nobody holds it any more.
    ``enforcement`` is an outgoing one's; an accepted one gets its listener's.
    """

    __slots__ = (
        "_ceiling",
        "_context",
        "_judge",
        "_listener",
        "_listeners",
        "_transport",
        "enforcement",
        "evidence",
        "extra",
        "guard",
    )

    def __init__(
        self,
        judge: Judge,
        listeners: Mapping[int, Listener] | None,
        enforcement: Enforcement | None = None,
    ) -> None:
        super().__init__()
        self.enforcement = enforcement
        self._judge = judge
        self._listeners = listeners
        self._listener: Listener | None = None
        self._ceiling = Assurance.UNKNOWN
        self._transport: Callable[[], asyncio.BaseTransport | None] = _nothing
        self._context: Context | None = None
        self.guard: Guard | None = None
        """What follows its latch; None where it is not latched."""
        self.evidence = _nowhere("not connected yet")
        self.extra: MutableMapping[str, Any] | None = None
        """A transport's own extra information, where ``"ptoken"`` is looked up."""

    def __del__(self) -> None:
        self.close()

    def made(self, transport: asyncio.BaseTransport) -> PToken:
        """Read the evidence of a connection that was made just now, and return its token."""
        sock: socket.socket | None = transport.get_extra_info("socket")
        local = transport.get_extra_info("sockname")
        peer = transport.get_extra_info("peername")
        judge = self._judge
        if sock is None or sock.family not in _IP_FAMILIES or not local or not peer:
            self.evidence = _nowhere("not an IP socket")
        else:
            self.evidence = self._read(sock, local, peer)
        judge.drain()
        token = self.ptoken = judge.resolve(self.evidence)
        self._ceiling = token.assurance
        if not self.evidence.doubt and not self.evidence.generation:
            judge.inferred.add(self)
        if sock is not None:
            with contextlib.suppress(OSError, ValueError):
                registry.remember(sock, self)
        return token

    @property
    def enforced(self) -> str:
        """``"kernel"`` or ``"user"``: where its requirement is enforced."""
        return "user" if self.enforcement is None else self.enforcement.place

    def _read(self, sock: socket.socket, local: Any, peer: Any) -> Evidence:
        mark, generation, doubt = None, 0, ""
        enforcement = self.enforcement
        if self._listeners is None:
            doubt = unfitness(sock, self._judge.backend)
        elif (listener := self._listeners.get(local[1])) is None:
            doubt = "no listener of ours has this port"
        else:
            mark, generation, doubt = listener.read(sock)
            self._listener = listener
            listener.hold()
            if generation and not doubt:
                listener.stamped.add(self)
            enforcement = listener.enforcement_of(sock, pack_address(local[0]))
        evidence = Evidence(
            IPPROTO_TCP,
            pack_address(local[0]),
            local[1],
            pack_address(peer[0]),
            peer[1],
            mark,
            generation,
            doubt=doubt,
            enforced=None if enforcement is None else enforcement.template,
        )
        if enforcement is None:
            return evidence
        if self._listeners is not None:
            where = Where(evidence.local, evidence.local_port, evidence.peer, evidence.peer_port)
            self.enforcement = enforcement.inherit(sock, where)
        else:
            enforcement.handed_over(sock)
        if self.enforcement is not None:
            self.enforcement.changed = weakly(self._enforced_otherwise)
        return evidence if doubt else replace(evidence, doubt=enforcement.objection(evidence))

    def carried_by(self, transport: asyncio.BaseTransport, context: Context) -> None:
        """Note the loop's transport, and the context that callbacks belong in."""
        try:
            # Weak, because a cycle would keep the transport from going at once.
            self._transport = ref(transport)
        except TypeError:
            # uvloop's TLS transports.
            self._transport = lambda: transport
        self._context = context

    @property
    def transport(self) -> asyncio.BaseTransport | None:
        """The loop's transport; None before it is handed over, and when it is gone."""
        return self._transport()

    def enter(self, callback: Callable[..., object], *arguments: object) -> None:
        """Call back in the connection's context."""
        if self._context is not None:
            # A copy can be entered from inside the context itself.
            self._context.copy().run(callback, *arguments)

    def tell(self, callback: str, *arguments: object, ours: bool = True) -> None:
        """Call a method of the user's protocol, if it is not closing; of ours alone, or of any."""
        transport = self._transport()
        if transport is None or transport.is_closing():
            return
        protocol = user_of(transport)
        if protocol is None or (ours and not takes_token(protocol)):
            return
        try:
            self.enter(getattr(protocol, callback), *arguments)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            self._judge.report(
                {
                    "message": f"Fatal error: protocol.{callback}() call failed.",
                    "exception": error,
                    "transport": transport,
                    "protocol": protocol,
                }
            )

    def latch(
        self, transport: asyncio.BaseTransport, options: Latch, listener: ListenerLatch | None
    ) -> ProtectionError | None:
        """Latch it, right before it is handed over; return what stands in the way."""
        sock: socket.socket | None = transport.get_extra_info("socket")
        token: Any = self.ptoken
        made = guard_for(self, self._judge, token, options, listener, sock)
        if isinstance(made, ProtectionError):
            return made
        self.guard = made
        self._judge.latched.add(self)
        return None

    @property
    def latch_status(self) -> LatchStatus | None:
        """How its latch is; None where it is not latched."""
        return None if self.guard is None else self.guard.status

    @property
    def is_kept_clean(self) -> bool:
        """Whether the kernel keeps clear segments off it even without the stamp."""
        return self.guard is not None and self.guard.keeps_clear_off

    def close(self) -> None:
        """The connection is gone. Idempotent."""
        if self.enforcement is not None:
            self.enforcement.close()
        if self.guard is not None:
            self.guard.close()
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.release()

    def infer(self) -> None:
        """Ask again, and take no answer that claims more than the first."""
        evidence, enforcement = self.evidence, self.enforcement
        if enforcement is not None:
            evidence = self.evidence = replace(evidence, enforced=enforcement.template)
            evidence = replace(evidence, doubt=enforcement.objection(evidence))
        token = self._judge.resolve(evidence)
        if self._ceiling is Assurance.UNKNOWN:
            self._ceiling = token.assurance
        if token.assurance <= self._ceiling:
            self._replace(token)

    def discredit(self, reason: str) -> None:
        """Make it UNKNOWN for good."""
        if self.guard is not None:
            self.guard.void()
        e = self.evidence
        self.evidence = Evidence(
            e.protocol, e.local, e.local_port, e.peer, e.peer_port, doubt=reason
        )
        self._replace(self._judge.resolve(self.evidence))

    def _enforced_otherwise(self) -> None:
        if self.extra is not None:
            self.extra["ipsec_enforced"] = self.enforced
        if self in self._judge.inferred:
            self.infer()

    def _replace(self, token: PToken) -> None:
        old, self.ptoken = self.ptoken, token
        if self.extra is not None:
            self.extra["ptoken"] = token
        if token is not old:
            self.tell("protection_changed", old, token)


class Judge:
    """What the streams of one backend on one loop share: the subscription to its changes."""

    __slots__ = (
        "__weakref__",
        "_backend",
        "_loop",
        "_unsubscribe",
        "_when_closed",
        "inferred",
        "latched",
        "listeners",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, backend: Backend) -> None:
        self._unsubscribe: Callable[[], None] = _nothing
        self._loop = loop
        self._backend = backend
        self._when_closed = backend.resolve(_nowhere("the backend is closed"))
        self.inferred: WeakSet[Connection] = WeakSet()
        self.latched: WeakSet[Connection] = WeakSet()
        self.listeners: WeakSet[Listener] = WeakSet()
        self._unsubscribe = backend.subscribe(weakly(self._changed))

    def __del__(self) -> None:
        run_soon(self._loop, self._unsubscribe)

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop, backend: Backend) -> Judge:
        """Return the one for this loop and backend. Raises BackendUnavailable for a closed one."""
        # Numbers are safe as keys: an entry keeps its loop and backend alive.
        judge = _judges.get((id(loop), id(backend)))
        if judge is None:
            judge = _judges[id(loop), id(backend)] = cls(loop, backend)
        return judge

    @property
    def backend(self) -> Backend:
        """The backend."""
        return self._backend

    def time(self) -> float:
        """The loop's time."""
        return self._loop.time()

    def call_at(self, when: float, method: Callable[[], None]) -> asyncio.TimerHandle:
        """Have the loop call a method at that time, if its object is still there."""
        return self._loop.call_at(when, weakly(method))

    def report(self, context: dict[str, Any]) -> None:
        """Give what a callback has raised to the loop."""
        self._loop.call_exception_handler(context)

    def drain(self) -> None:
        """Take in what the backend was told by now; never raises."""
        with contextlib.suppress(BackendError):
            self._backend.drain()

    def resolve(self, evidence: Evidence) -> PToken:
        """Return the token for this evidence; never raises."""
        try:
            return self._backend.resolve(evidence)
        except BackendError:
            return self._when_closed

    def _changed(self) -> None:
        # Latches first: what conflicts is held before anybody is told of new tokens.
        for connection in list(self.latched):
            if connection.guard is not None:
                connection.guard.look()
        closed = self.resolve(_nowhere("a trial")) is self._when_closed
        for listener in list(self.listeners):
            for connection in list(listener.stamped):
                lost = connection.evidence.generation != listener.generation
                if closed or (lost and not connection.is_kept_clean):
                    listener.stamped.discard(connection)
                    connection.discredit("the stamp was lost while the connection stood")
        for connection in list(self.inferred):
            connection.infer()


def _nothing() -> None: ...


def _nowhere(doubt: str) -> Evidence:
    return Evidence(IPPROTO_TCP, b"", 0, b"", 0, doubt=doubt)
