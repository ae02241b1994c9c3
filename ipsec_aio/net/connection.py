"""What a stream's token rests on, and when it is replaced.

Rules:

* An accepted connection that rests on the stamp was judged once, by the facts at its accept. SAs
  that are rekeyed or deleted later say nothing about its handshake, so nobody asks again: old
  evidence against new tables could name another peer. What ends it is a change of the stamp,
  which kept clear segments off: then it is UNKNOWN for good. (A token that waits for its SA
  settles by itself.)
  The kernel's own latch keeps clear segments off as well, and so does the policy that a connection
  has from its listener: there the token stands.
* Where TLS comes first, its peer decides how long after its accept a connection is made: then what
  the stamp says holds only while no SA of then can be forgotten.
* The backend is drained after a connection was accepted and before it is judged: once for those
  that were accepted together.
* What the backend said of a stamp and a peer holds for the peer's next connections as well, as long
  as the epoch stands still, and where it says that ports do not matter.
* Every other connection is inferred from the SPD, which also judges the segments to come: it is
  asked again whenever the backend's epoch moves. Its token may get weaker and recover, but never
  says more than the first one that said anything, since earlier bytes came under that.
* An outgoing connection carries no stamp: POLICY at most, or ENFORCED where the kernel held it to
  its requirement before it was connected.
* What waits to be read may have come before the policies changed: after that a connection counts as
  judged by them from the moment on at which nothing waited (which does not tell of segments that
  the kernel holds back because others are missing before them). Under TLS it waits in user space,
  too, while its user does not read, and for a moment after that: then only that nothing came tells.
* A connection's own policy, inherited or set, stands in for the SPD: so the SPD is asked here, too.
* Addresses come from the socket alone.
* Tokens that were handed out stay as they are; ``get_extra_info("ptoken")`` and
  ``current_ptoken()`` give the new one, and protocols of ours are told.
* A backend that is closed under a connection makes it UNKNOWN; nothing raises.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping, MutableMapping
from contextvars import Context
from dataclasses import replace
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast
from weakref import WeakSet, WeakValueDictionary, ref

from ipsec_aio.enums import Assurance
from ipsec_aio.errors import BackendError, ProtectionError
from ipsec_aio.evidence import IPPROTO_TCP, LATE, NEVER, Evidence
from ipsec_aio.flow import unmap
from ipsec_aio.kernel.sockopts import bytes_received, examine, is_readable, read_mark

from . import registry
from .context import TokenCell
from .enforce import Where
from .forward import user_of
from .latching import guard_for
from .listening import Listener, arrivals, run_soon, unfitness, weakly
from .protocols import takes_token
from .refusals import Refusals
from .stats import Counters

if TYPE_CHECKING:
    from ipsec_aio.backends.contract import Backend
    from ipsec_aio.latch import Latch, LatchStatus, ListenerLatch, Outlook
    from ipsec_aio.tokens import PToken

    from .enforce import Enforcement
    from .latching import Guard
    from .terms import Hold, Terms

    T = TypeVar("T")

__all__ = ["KNOWN_LIMIT", "Connection", "Facts", "Judge"]

KNOWN_LIMIT = 4096
"""How many peers' tokens are kept for their next connections."""
_AGAIN = 1.0
"""Seconds until a connection is looked at again in whose queue something waited."""

_IP_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_NO_CONTEXT = Context()
_judges: WeakValueDictionary[tuple[int, int], Judge] = WeakValueDictionary()


class Facts(NamedTuple):
    """What was read of a connection: addresses as its socket has them, mark, generation, doubt."""

    local: tuple[Any, ...]
    peer: tuple[Any, ...]
    mark: int | None
    generation: int
    doubt: str
    after: int = NEVER

    def evidence(self) -> Evidence:
        """The same as evidence."""
        local, peer, mark, generation, doubt, after = self
        return Evidence(
            IPPROTO_TCP,
            _packed(local[0]),
            local[1],
            _packed(peer[0]),
            peer[1],
            mark,
            generation,
            doubt=doubt,
            after=after,
        )


class Connection:
    """One stream: its token, and the evidence behind it.

    Its contexts share ``cell`` and hold nothing else of it, so that it goes at once when its
    transport does.

    ``listeners``, by port, are those of the server that accepts it; None for an outgoing one. It
    keeps its listener's port registered until it is closed or nobody holds it any more.
    ``enforcement`` is an outgoing one's; an accepted one gets its listener's. ``shared``: the loop
    uses one context for several connections. ``terms`` are what it has to meet as long as it
    stands.
    """

    # What most connections never change stands here: making one is paid for by each accept.
    enforcement: Enforcement | None = None
    context = _NO_CONTEXT
    """The context that callbacks belong in."""
    guard: Guard | None = None
    """What follows its latch; None where it is not latched."""
    hold: Hold | None = None
    """What keeps it from being read; None where nothing does."""
    extra: MutableMapping[str, Any] | None = None
    """A transport's own extra information, where ``"ptoken"`` is looked up."""
    cookie: int | None = None
    """The kernel's number of its socket, once somebody has asked for it (:mod:`.registry`)."""
    keeps = False
    """Whether something that was read waits for its user to read on."""
    protected: bool | None = None
    """Whether its first token is protected; None where that is not settled."""
    after = NEVER
    """What the backend's policies were before its socket was made, NEVER where not known."""
    _listener: Listener | None = None
    _first: PToken | None = None
    # When it was accepted, and the stamps' generations then, where much may lie between.
    _accepted: tuple[float, Mapping[int, int]] | None = None
    _evidence: Evidence | None = None
    _facts: Facts
    _looking = False
    # When its user began to read again, and how much had come when all of it was delivered.
    _resumed = -inf
    _delivered: int | None = None

    def __init__(
        self,
        judge: Judge,
        terms: Terms,
        listeners: Mapping[int, Listener] | None,
        *,
        shared: bool = False,
    ) -> None:
        self.cell = TokenCell()
        self.terms = terms
        self.judge = judge
        self._number = next(arrivals)
        self.shared = shared
        self._facts = _NOT_CONNECTED
        self._listeners = listeners
        self._transport: Callable[[], asyncio.BaseTransport | None] = _nothing
        if listeners is not None:
            judge.accepted += 1
        else:
            self.after = judge.backend.policies

    def __del__(self) -> None:
        self.close()
        registry.forget(self)

    def made(self, transport: asyncio.BaseTransport) -> PToken:
        """Read the evidence of a connection that was made just now, and return its token."""
        registry.remember(self)
        judge = self.judge
        facts = self._facts = self._read(transport)
        if self._listeners is None:
            judge.drain()
            self._catch_up(transport)
        else:
            judge.drain_for_accepted()
            if not facts.generation:
                self._look_later()
        if self._listeners is None or self._evidence is not None:
            token = judge.resolve(self.evidence)
        else:
            token, self.protected = judge.resolve_accepted(facts)
        if self.protected is None and token.assurance is not Assurance.UNKNOWN:
            self._first = token
        self.cell.ptoken = token
        return token

    @property
    def evidence(self) -> Evidence:
        """What its token rests on."""
        if self._evidence is None:
            self._evidence = self._facts.evidence()
        return self._evidence

    @property
    def ptoken(self) -> PToken | None:
        """Its token of the moment; None before it was made."""
        return self.cell.ptoken

    @property
    def enforced(self) -> str:
        """``"kernel"`` or ``"user"``: where its requirement is enforced."""
        return "user" if self.enforcement is None else self.enforcement.place

    def _read(self, transport: asyncio.BaseTransport) -> Facts:
        sock: socket.socket | None = transport.get_extra_info("socket")
        local = transport.get_extra_info("sockname")
        peer = transport.get_extra_info("peername")
        if sock is None or not local or not peer:
            return _nowhere("not an IP socket")
        listener, mark = None, None
        if self._listeners is not None:
            try:
                mark = examine(sock, read_mark)
            except (OSError, ValueError) as error:
                return _nowhere(f"the socket cannot be examined: {error}")
            listener = self._listeners.get(local[1])
        # Ports of IP sockets alone have listeners.
        if listener is not None:
            told = listener.read(mark, self.judge.accepted)
            if self._accepted is not None and told[1] and not told[2]:
                told = *told[:2], self._lateness(self._accepted, local[1], told[1])
            self.after = listener.emptied_before(self._number)
            facts = Facts(local, peer, *told, self.after)
            self._listener = listener
            listener.hold()
        elif sock.family not in _IP_FAMILIES:
            return _nowhere("not an IP socket")
        elif self._listeners is None:
            doubt = unfitness(sock, self.judge.backend)
            facts = Facts(local, peer, None, 0, doubt, self.after)
        else:
            facts = Facts(local, peer, None, 0, "no listener of ours has this port")
        if self.enforcement is not None or (listener is not None and listener.enforces):
            self._adopt(sock, facts, listener)
        return facts

    def note_accept(self) -> None:
        """It was accepted just now, and its peer decides when it is made: TLS comes first."""
        listeners = self._listeners or {}
        generations = {port: each.generation for port, each in listeners.items()}
        self._accepted = self.judge.time(), generations

    def _lateness(
        self, accepted: tuple[float, Mapping[int, int]], port: int, generation: int
    ) -> str:
        when, generations = accepted
        if generations.get(port) != generation:
            return "the stamp changed during the TLS handshake"
        if self.judge.time() - when > LATE:
            return "the TLS handshake took so long that the SA may be another's by now"
        return ""

    def _adopt(self, sock: socket.socket, facts: Facts, listener: Listener | None) -> None:
        """Have the connection's own policy follow the SPD, and ask that, in whose place it is."""
        evidence = facts.evidence()
        enforcement = self.enforcement
        if listener is not None:
            enforcement = listener.enforcement_of(sock, evidence.local)
        if enforcement is None:
            return
        evidence = replace(evidence, enforced=enforcement.template)
        where = Where(evidence.local, evidence.local_port, evidence.peer, evidence.peer_port)
        if listener is not None:
            self.enforcement = enforcement.inherit(sock, where)
        else:
            enforcement.handed_over(sock, where)
        if self.enforcement is not None:
            self.enforcement.changed = weakly(self._enforced_otherwise)
        if not evidence.doubt:
            evidence = replace(evidence, doubt=enforcement.objection(evidence))
        self._evidence = evidence

    def carried_by(self, transport: asyncio.BaseTransport) -> None:
        """Note the loop's transport."""
        if self.hold is not None:
            self.hold.carry(self._transport(), transport)
        try:
            # Weak, because a cycle would keep the transport from going at once.
            self._transport = ref(transport)
        except TypeError:
            # uvloop's TLS transports.
            self._transport = lambda: transport

    @property
    def transport(self) -> asyncio.BaseTransport | None:
        """The loop's transport; None before it is handed over, and when it is gone."""
        return self._transport()

    def resume_reading(self) -> None:
        """Do what the loop's transport does for it, in the connection's context."""
        transport = self._transport()
        if self.hold is not None:
            self.hold.resume = weakly(self.resume_reading)
        elif transport is not None:
            self.read_on(partial(type(transport).resume_reading, transport))  # type: ignore[attr-defined]

    def read_on(self, resume: Callable[[], None]) -> None:
        """Have the loop read again, in the connection's context."""
        self._resumed = self.judge.time()
        self.enter(resume)

    def enter(self, callback: Callable[..., object], *arguments: object) -> None:
        """Call back in the connection's context."""
        # A copy can be entered from inside the context itself.
        self.context.copy().run(callback, *arguments)

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
            self._report(callback, error, transport)

    def feed(self, name: str, callback: Callable[..., T], *arguments: Any) -> T | None:
        """Deliver what was kept, by a callback of this name of the user's protocol.

        What that raises ends the connection, as it does where the loop delivers.
        """
        try:
            return self.context.copy().run(callback, *arguments)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            transport = self._transport()
            self._report(name, error, transport)
            if transport is not None:
                transport.abort()  # type: ignore[attr-defined]
            return None

    def _report(
        self, callback: str, error: BaseException, transport: asyncio.BaseTransport | None
    ) -> None:
        self.judge.report(
            {
                "message": f"Fatal error: protocol.{callback}() call failed.",
                "exception": error,
                "transport": transport,
                "protocol": None if transport is None else user_of(transport),
            }
        )

    def latch(
        self, transport: asyncio.BaseTransport, options: Latch, listener: ListenerLatch | None
    ) -> ProtectionError | None:
        """Latch it, right before it is handed over; return what stands in the way."""
        sock: socket.socket | None = transport.get_extra_info("socket")
        token: Any = self.ptoken
        made = guard_for(self, self.judge, token, options, listener, sock)
        if isinstance(made, ProtectionError):
            return made
        self.guard = made
        self.judge.latched.add(self)
        return None

    @property
    def latch_status(self) -> LatchStatus | None:
        """How its latch is; None where it is not latched."""
        return None if self.guard is None else self.guard.status

    @property
    def is_kept_clean(self) -> bool:
        """Whether the kernel keeps clear segments off it even without the stamp."""
        token = self.ptoken
        if token is None:
            return False
        if token.tunnel_mode is not False and not self.judge.backend.drops_fragments:
            return False
        if self.guard is not None and self.guard.keeps_clear_off:
            return True
        return self._is_enforced and (outlook := self._outlook()) is not None and not outlook.opaque

    @property
    def may_settle(self) -> bool:
        """Whether its token may yet say more, and no clear segment comes until then.

        As far as the tables tell, or as they did before they are read again now.
        """
        outlook = self._outlook()
        if outlook is None or outlook.opaque:
            return False
        policies = outlook.policies_in
        demanded = len(policies) > 0 and all(policy.protects for policy in policies)
        return demanded or self._is_enforced or not outlook.sure

    @property
    def is_silent(self) -> bool:
        """Whether nothing can come: its own policy demands an SA, and none is known."""
        token, outlook = self.cell.ptoken, self._outlook()
        if not self._is_enforced or token is None or outlook is None or outlook.opaque:
            return False
        return not outlook.sure or (token.assurance is Assurance.ENFORCED and not token.sas)

    @property
    def _is_enforced(self) -> bool:
        """Whether a policy of its own was in force all the time."""
        return self.enforcement is not None and self.enforcement.template is not None

    def _outlook(self) -> Outlook | None:
        try:
            return self.judge.backend.outlook(self.evidence)
        except BackendError:
            return None

    def uphold(self, *, final: bool = False) -> None:
        """See whether it meets its terms. ``final``: its token will not get better."""
        token = self.cell.ptoken
        if token is not None:
            self.terms.uphold(self, token, final=final)

    def close(self) -> None:
        """The connection is gone. Idempotent."""
        registry.disown(self)
        if self.hold is not None:
            self.hold.close()
        if self.enforcement is not None:
            self.enforcement.close()
        if self.guard is not None:
            self.guard.close()
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.release()

    def infer(self) -> None:
        """Ask again, and take no answer that claims more than the first."""
        transport = self._transport()
        if transport is not None:
            self._catch_up(transport)
        evidence, enforcement = self.evidence, self.enforcement
        if enforcement is not None:
            evidence = self._evidence = replace(evidence, enforced=enforcement.template)
            evidence = replace(evidence, doubt=enforcement.objection(evidence))
        token = self.judge.resolve(evidence)
        first, current = self._first, self.ptoken
        if first is None:
            if token.assurance is not Assurance.UNKNOWN:
                self._first = token
        elif _claims_more(token, first):
            # That all of it is clear would no longer be true; what else it says may still hold.
            clear = current is None or current.assurance is Assurance.NONE
            if current is not None and not (clear or _claims_more(current, token)):
                return
            token = self.judge.resolve(replace(evidence, doubt="it began as something else"))
        self._replace(token)

    def _catch_up(self, transport: asyncio.BaseTransport) -> None:
        """Where nothing waits to be read, all that came before now was read; else look later."""
        policies = self.judge.backend.policies
        sock: Any = transport.get_extra_info("socket")
        if self.evidence.after == policies or sock is None:
            return
        if self.note_quiet(transport) or (
            not is_readable(sock) and self.has_heard_nothing(transport)
        ):
            self._evidence = replace(self.evidence, after=policies)
        else:
            self._look_later()

    def note_quiet(self, transport: asyncio.BaseTransport) -> bool:
        """Say whether all that came by now was delivered, and if so, take that as known."""
        sock: Any = transport.get_extra_info("socket")
        guard: Any = self.guard
        # In this order: what comes in between is not taken for delivered.
        received = None if sock is None else self._received(sock)
        if sock is None or is_readable(sock) or self.keeps or (guard is not None and guard.keeps):
            return False
        if transport.get_extra_info("ssl_object") is not None and (
            self.hold is not None
            or not cast("asyncio.Transport", transport).is_reading()
            or self.judge.time() - self._resumed < _AGAIN
        ):
            return False
        self._delivered = received
        return True

    def has_heard_nothing(self, transport: asyncio.BaseTransport) -> bool:
        """Say whether nothing has come since it was known last that all was delivered."""
        known, sock = self._delivered, transport.get_extra_info("socket")
        return known is not None and self._received(sock) == known

    def _received(self, sock: Any) -> int | None:
        try:
            return examine(sock, bytes_received)
        except (OSError, ValueError):
            return None

    def _look_later(self) -> None:
        evidence, judge = self.evidence, self.judge
        behind = evidence.after != judge.backend.policies
        if behind and not (self._looking or evidence.doubt or evidence.generation):
            self._looking = True
            judge.call_at(judge.time() + _AGAIN, self._look_again)

    def _look_again(self) -> None:
        self._looking = False
        transport = self._transport()
        if transport is None:
            self._look_later()
        elif not (transport.is_closing() or self.evidence.doubt or self.evidence.generation):
            self.infer()

    def review(self, closed: bool = False) -> None:
        """The backend's epoch has moved, or it was closed: see what the token still rests on."""
        evidence, listener = self.evidence, self._listener
        if evidence.doubt:
            return
        if not evidence.generation:
            self.infer()
        elif listener is not None:
            lost = evidence.generation != listener.generation
            if closed or (lost and not self.is_kept_clean):
                self.discredit("the stamp was lost while the connection stood")

    def discredit(self, reason: str) -> None:
        """Make it UNKNOWN for good."""
        if self.guard is not None:
            self.guard.void()
        e = self.evidence
        self._evidence = Evidence(
            e.protocol, e.local, e.local_port, e.peer, e.peer_port, doubt=reason
        )
        self._replace(self.judge.resolve(self.evidence), final=True)

    def _enforced_otherwise(self) -> None:
        if self.extra is not None:
            self.extra["ipsec_enforced"] = self.enforced
        self.review()

    def _replace(self, token: PToken, *, final: bool = False) -> None:
        old, self.cell.ptoken = self.cell.ptoken, token
        if self.extra is not None:
            self.extra["ptoken"] = token
        if token is not old:
            self.tell("protection_changed", old, token)
        # What was held may have settled under the same token.
        if token is not old or self.hold is not None:
            self.uphold(final=final)


class Judge:
    """What the streams of one backend on one loop share: the subscription to its changes."""

    __slots__ = (
        "__weakref__",
        "_backend",
        "_epoch",
        "_known",
        "_loop",
        "_unsubscribe",
        "_when_closed",
        "accepted",
        "drained",
        "latched",
        "refusals",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, backend: Backend) -> None:
        self._unsubscribe: Callable[[], None] = _nothing
        self._loop = loop
        self._backend = backend
        self.accepted = 0
        """How many connections were accepted."""
        self.drained = -1
        """How many were when the backend was drained for them."""
        self._epoch = backend.epoch
        self._known: dict[tuple[object, ...], tuple[PToken, bool]] = {}
        self._when_closed = backend.resolve(_nowhere("the backend is closed").evidence())
        self.latched: WeakSet[Connection] = WeakSet()
        self.refusals = Refusals(Counters())
        """Those of outgoing connections that met their requirement once."""
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
        try:  # noqa: SIM105 (each accept comes this way)
            self._backend.drain()
        except BackendError:
            pass

    def drain_for_accepted(self) -> None:
        """As :meth:`drain`, once for all connections that were accepted before."""
        if self.drained != self.accepted:
            self.drained = self.accepted
            self.drain()

    def resolve(self, evidence: Evidence) -> PToken:
        """Return the token for this evidence; never raises."""
        try:
            return self._backend.resolve(evidence)
        except BackendError:
            return self._when_closed

    def resolve_accepted(self, facts: Facts) -> tuple[PToken, bool | None]:
        """Return the token for a connection that was accepted just now, and whether it is
        protected where that is settled; never raises.

        What a stamp proves of a peer is the same for all its connections, while nothing changes.
        """
        local, peer, mark, generation, doubt, after = facts
        if not generation or doubt:
            return self.resolve(facts.evidence()), None
        backend, known = self._backend, self._known
        if self._epoch != backend.epoch:
            self._epoch = backend.epoch
            known.clear()
        key = local[0], peer[0], mark, generation, after
        found = known.get(key)
        if found is not None:
            return found
        evidence = facts.evidence()
        token = self.resolve(evidence)
        if token.assurance is Assurance.UNKNOWN or token.pending:
            return token, None
        if backend.ignores_ports(evidence):
            if len(known) >= KNOWN_LIMIT:
                known.clear()
            known[key] = token, token.protected
        return token, token.protected

    def _changed(self) -> None:
        # Latches first: what conflicts is held before anybody is told of new tokens.
        for latched in list(self.latched):
            if latched.guard is not None:
                self._attempt(latched.guard.look)
        closed = self.resolve(_nowhere("a trial").evidence()) is self._when_closed
        for connection in registry.living():
            if connection.judge is self:
                self._attempt(connection.review, closed)

    def _attempt(self, callback: Callable[..., None], *arguments: object) -> None:
        """Call back for one connection: what that raises keeps nobody else from his turn."""
        try:
            callback(*arguments)
        except (SystemExit, KeyboardInterrupt):
            # The others have theirs when the loop runs on, as it does to clean up.
            self._loop.call_soon(weakly(self._changed))
            raise
        except BaseException as error:
            message = "A connection could not be reviewed after a change of the backend's tables"
            self.report({"message": message, "exception": error})


def _nothing() -> None: ...


def _claims_more(one: PToken, other: PToken) -> bool:
    """Whether a token says anything for its connection where another says nothing.

    Another name is no more than a name: who began is told of it, and a requirement refuses it.
    """
    if one.assurance is Assurance.UNKNOWN:
        return False
    return (
        one.assurance > other.assurance
        or (one.protected and not other.protected)
        or (one.privacy_protected is True and other.privacy_protected is not True)
        or (one.integrity_protected is True and other.integrity_protected is not True)
        or (one.peer is not None and other.peer is None)
        or (one.local is not None and other.local is None)
    )


def _nowhere(doubt: str) -> Facts:
    return Facts(("", 0), ("", 0), None, 0, doubt)


_NOT_CONNECTED = _nowhere("not connected yet")


def _packed(host: str) -> bytes:
    """Pack the host of an IP socket's address."""
    if ":" not in host:
        return socket.inet_pton(socket.AF_INET, host) if host else b""
    return unmap(socket.inet_pton(socket.AF_INET6, host.partition("%")[0]))
