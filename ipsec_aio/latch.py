"""Connection latches (RFC 5660): how a connection was protected, and whether it still is.

Rules:

* :data:`TRANSITIONS` is all that ever moves a latch.
* A latch follows its channel by the SAs that may carry the connection now, never by asking again
  what an old packet's evidence means: by now that could name another peer.
* Every SA that the kernel would accept for the connection counts, not the newest one: one that
  is weaker, or another peer's, is a conflict as long as it is there.
* As good as what was latched is: the same protocol, mode and algorithms with at least the bits.
  Other algorithms cannot be compared, so they are not as good.
* An SA is the latched peer's by identity where one is latched, else by reqid and addresses. One
  whose identity is still awaited breaks nothing, but meanwhile nothing may be read
  (``waiting``). One whose identity stays unknown is not the peer's.
* An identity is still the latched one where the name is, and nothing known of its proof speaks
  against it (``IToken.is_still``): a peer authenticates anew, and renews certificates. What was not
  known of the proof is latched once it is. What is demanded of a connection must be shown by the
  SAs that it comes with.
* A peer who is known by identity may move: when none of the channel's SAs is left and he has others
  that are as good, those are the channel.
* While tables are being read again nothing is known, and latches stay as they are.
* Time is an argument: monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from numbers import Real
from typing import Final, NamedTuple, final

from .enums import Mode, PolicyAction
from .flow import Mark
from .identity import IToken
from .policy import Policy, Template
from .protection import PROTECTING, TUNNELS
from .sa import SA, Algorithm, SAKey

__all__ = [
    "INDETERMINATE",
    "TRANSITIONS",
    "Channel",
    "ConnectionLatch",
    "Grade",
    "Latch",
    "LatchEvent",
    "LatchParameters",
    "LatchReason",
    "LatchState",
    "LatchStatus",
    "ListenerLatch",
    "Outlook",
    "Sighting",
    "Transition",
    "diagram",
]


class LatchState(StrEnum):
    """States of a latch (RFC 5660, 2)."""

    LISTENER = "LISTENER"
    """It belongs to a listening socket, and says what its children's latches must be like."""
    ESTABLISHED = "ESTABLISHED"
    """All that may carry the connection is as good as what was latched."""
    BROKEN = "BROKEN"
    """Something conflicts with what was latched; nothing is read or written."""
    CLOSED = "CLOSED"
    """It was released, refused, or can never be good again. Final."""


class LatchEvent(StrEnum):
    """What moves a latch."""

    LISTEN = "listen"
    ADMIT = "child conforms"
    LATCH = "connection conforms"
    REFUSE = "connection does not conform"
    CONFORM = "all SAs and policies conform"
    CONFLICT = "SA, identity or policy conflicts"
    VOID = "evidence is lost"
    EXPIRE = "broken for too long"
    RELEASE = "closed"


class LatchReason(StrEnum):
    """Why a latch is broken or closed, gravest first."""

    PEER = "peer"
    """An SA that may carry the connection is not the latched peer's, or not known to be."""
    QUALITY = "quality"
    """Such an SA protects less than what was latched, or by other means."""
    POLICY = "policy"
    """Policies forbid the traffic, demand something else, or no longer demand protection."""
    LOST = "lost"
    """No SA of the channel is left: deleted, expired, or the peer was found dead."""
    EVIDENCE = "evidence"
    """Interfaces (xfrm, vti) may lead packets past policies. Or what kept clear segments off the
    connection is gone, or the backend is closed: that is final.
    """
    TIMEOUT = "timeout"
    """It stayed broken for longer than ``Latch.timeout``."""


class Transition(NamedTuple):
    """A row of the table; ``source`` None is birth."""

    source: LatchState | None
    event: LatchEvent
    target: LatchState


_L, _E = LatchState, LatchEvent

TRANSITIONS: Final = (
    Transition(None, _E.LISTEN, _L.LISTENER),
    Transition(None, _E.LATCH, _L.ESTABLISHED),
    Transition(None, _E.REFUSE, _L.CLOSED),
    Transition(_L.LISTENER, _E.ADMIT, _L.LISTENER),
    Transition(_L.LISTENER, _E.RELEASE, _L.CLOSED),
    Transition(_L.ESTABLISHED, _E.CONFORM, _L.ESTABLISHED),
    Transition(_L.ESTABLISHED, _E.CONFLICT, _L.BROKEN),
    Transition(_L.ESTABLISHED, _E.VOID, _L.CLOSED),
    Transition(_L.ESTABLISHED, _E.RELEASE, _L.CLOSED),
    Transition(_L.BROKEN, _E.CONFLICT, _L.BROKEN),
    Transition(_L.BROKEN, _E.CONFORM, _L.ESTABLISHED),
    Transition(_L.BROKEN, _E.VOID, _L.CLOSED),
    Transition(_L.BROKEN, _E.EXPIRE, _L.CLOSED),
    Transition(_L.BROKEN, _E.RELEASE, _L.CLOSED),
)
"""All that may happen to a latch; what is not here does not."""

_moves = {(t.source, t.event): t.target for t in TRANSITIONS}


def diagram() -> str:
    """Return the table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2"]
    for source, event, target in TRANSITIONS:
        lines.append(f"    {source or '[*]'} --> {target}: {event}")
    lines.append(f"    {_L.CLOSED} --> [*]")
    return "\n".join(lines)


# What is latched


class Grade(NamedTuple):
    """How well an SA protects. ``replay``: it refuses packets that were seen before."""

    proto: int
    mode: Mode
    aead: Algorithm | None
    encryption: Algorithm | None
    authentication: Algorithm | None
    replay: bool = False

    @classmethod
    def of(cls, sa: SA) -> Grade:
        """Return an inbound SA's."""
        return cls(sa.proto, sa.mode, *sa.algorithms, sa.replay_window > 0)

    def serves(self, wanted: Grade, *, inbound: bool = True) -> bool:
        """Whether this is as good as ``wanted``. Only a receiver refuses replays."""
        return (
            (self.proto, self.mode) == (wanted.proto, wanted.mode)
            and all(_no_less(mine, theirs) for mine, theirs in zip(self[2:5], wanted[2:5]))  # noqa: B905
            and (self.replay or not wanted.replay or not inbound)
        )


def _no_less(mine: Algorithm | None, wanted: Algorithm | None) -> bool:
    if wanted is None:
        return True
    return (
        mine is not None
        and mine.name == wanted.name
        and mine.strength_bits >= wanted.strength_bits
        and mine.icv_bits >= wanted.icv_bits
    )


INDETERMINATE: Final = "indeterminate"
"""The quality where several SAs of different grades might have carried the handshake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatchParameters:
    """What is latched; as ``Latch.like`` a None leaves free.

    ``protocols`` are the IP protocol numbers (50 ESP, 51 AH), ascending; ``mode`` is theirs, None
    where they differ. ``quality`` has one :class:`Grade` per protocol, or is
    :data:`INDETERMINATE`. An identity is None where no source of identities knows one.
    """

    protocols: tuple[int, ...] | None = None
    mode: Mode | None = None
    quality: tuple[Grade, ...] | str | None = None
    local: IToken | None = None
    peer: IToken | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Latch:
    """How connections are latched: what to pass as ``latch=``; ``True`` is ``Latch()``.

    ``on_break`` is what a break does: ``"reset"`` resets the connection, ``"pause"`` stops reading
    and writing until the latch is restored, but for no longer than ``timeout`` seconds (None: as
    long as it takes). ``like`` is what a connection must be like to be latched at all: a
    listener's demand on its children, or a client's on a peer whom it met before.

    Raises ValueError for another ``on_break`` and for a timeout that is not positive, TypeError
    for what is of another type.
    """

    on_break: str = "reset"
    timeout: float | None = None
    like: LatchParameters | None = None

    def __post_init__(self) -> None:
        if self.on_break not in ("reset", "pause"):
            raise ValueError(f"on_break is 'reset' or 'pause', not {self.on_break!r}")
        timeout: object = self.timeout
        if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, Real)):
            raise TypeError(f"timeout is a number of seconds, not {timeout!r}")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout is a positive number of seconds, not {self.timeout!r}")
        _check_like(self.like)

    @classmethod
    def of(cls, value: object) -> Latch | None:
        """Return what an argument ``latch=`` asks for. Raises TypeError."""
        if value is None or value is False:
            return None
        if value is True:
            return cls()
        if not isinstance(value, Latch):
            raise TypeError(f"latch is True, False, None or a Latch, not {value!r}")
        return value


def _check_like(like: object) -> None:
    """What connections must be like is compared with facts: of another type it equals none."""
    if like is None:
        return
    if not isinstance(like, LatchParameters):
        raise TypeError(f"like is LatchParameters, not {like!r}")
    for name, who in (("local", like.local), ("peer", like.peer)):
        if not _is_none_or(IToken, who):
            raise TypeError(f"like: {name} is an IToken, as IToken.named() gives, not {who!r}")
    if not _is_none_or(Mode, like.mode):
        raise TypeError(f"like: mode is an ipsec_aio.enums.Mode, not {like.mode!r}")
    for name, several in (("protocols", like.protocols), ("quality", like.quality)):
        if several not in (None, INDETERMINATE) and not isinstance(several, tuple):
            raise TypeError(f"like: {name} is a tuple, not {several!r}")


def _is_none_or(kind: type, value: object) -> bool:
    return value is None or isinstance(value, kind)


class LatchStatus(NamedTuple):
    """A latch at one moment: ``get_extra_info("ipsec_latch")``.

    ``held_by`` is ``"kernel"`` where a policy of the socket lets nothing else in or out, and
    ``"user"`` where a conflict is only noticed, and then acted upon. ``reason`` tells why it is
    not ESTABLISHED; ``breaks`` counts how often it broke.
    """

    state: LatchState
    held_by: str
    parameters: LatchParameters
    reason: LatchReason | None
    breaks: int


# What is to be seen


class Sighting(NamedTuple):
    """A living SA that may carry a connection's packets.

    ``born`` tells it from an earlier one with its key. The identities are those of the two ends,
    None where not known; ``pending``: they may yet come to be known.
    """

    sa: SA
    born: float = 0.0
    local: IToken | None = None
    peer: IToken | None = None
    pending: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """How a connection's packets may be protected from now on, as far as the tables tell.

    ``inbound`` and ``outbound`` are the SAs that fit its addresses and ports. ``policies_in`` and
    ``policies_out`` are those policies of which any may be the kernel's first choice for it;
    ``blocked_in`` and ``blocked_out``: there is none, and the default action is to block.
    ``sure`` is False while the tables are being read again, ``opaque`` True where interfaces
    (xfrm, vti) may lead packets past these policies, and past a socket's own, and where policies or
    SAs name interfaces, so that nobody knows which apply. ``settled_in`` is how many seconds it
    takes at most until no identity is awaited any more.
    """

    inbound: tuple[Sighting, ...] = ()
    outbound: tuple[Sighting, ...] = ()
    policies_in: tuple[Policy, ...] = ()
    policies_out: tuple[Policy, ...] = ()
    blocked_in: bool = False
    blocked_out: bool = False
    sure: bool = True
    opaque: bool = False
    settled_in: float = 0.0


class Channel(NamedTuple):
    """What tells SAs of one channel from all others, without their identities.

    The ends are those of the inbound SAs.
    """

    proto: int
    mode: Mode
    reqid: int
    if_id: int
    source: bytes
    destination: bytes
    mark: Mark = Mark()

    @classmethod
    def of(cls, sa: SA) -> Channel:
        """Return an inbound SA's."""
        return cls(sa.proto, sa.mode, sa.reqid, sa.if_id, sa.source, sa.destination, sa.mark)

    def carries(self, sa: SA, *, inbound: bool) -> bool:
        """Whether an SA belongs to it, in this direction."""
        if inbound:
            return self == Channel.of(sa)
        return self[:4] == (sa.proto, sa.mode, sa.reqid, sa.if_id) and (
            (self.source, self.destination) == (sa.destination, sa.source)
        )

    def template(self, *, inbound: bool) -> Template:
        """Return the template that its SAs satisfy, and as few others as can be."""
        ends = (self.source, self.destination) if inbound else (self.destination, self.source)
        return Template(
            proto=self.proto,
            mode=self.mode,
            reqid=self.reqid,
            source=ends[0],
            destination=ends[1],
            family=2 if len(self.destination) == 4 else 10,
        )


def _meets(sa: SA | Template, template: Template, *, inbound: bool) -> bool:
    """Whether an SA satisfies a template.

    Inwards as ``xfrm_state_ok()`` compares: never the source of what came without a tunnel.
    Outwards the kernel looks for the template's ends, and for its reqid even where that is 0.
    """
    return (
        (sa.proto, sa.mode) == (template.proto, template.mode)
        and (sa.reqid == template.reqid or (inbound and not template.reqid))
        and (
            sa.mode not in TUNNELS
            or (
                (not any(template.source) or template.source == sa.source)
                and (
                    inbound
                    or not any(template.destination)
                    or template.destination == sa.destination
                )
            )
        )
    )


class _Machine:
    """A latch: a state that only the table moves."""

    __slots__ = ("_state",)

    def __init__(self, birth: LatchEvent) -> None:
        self._state = _moves[None, birth]

    @property
    def state(self) -> LatchState:
        """The state."""
        return self._state

    def _move(self, event: LatchEvent) -> bool:
        target = _moves.get((self._state, event), self._state)
        moved = target is not self._state
        self._state = target
        return moved

    def release(self) -> None:
        """The socket was closed."""
        self._move(LatchEvent.RELEASE)


class ListenerLatch(_Machine):
    """A listening socket's latch: what its children's have in common.

    Children outlive it.
    """

    __slots__ = ("options",)

    def __init__(self, options: Latch) -> None:
        super().__init__(LatchEvent.LISTEN)
        self.options = options

    def admit(
        self, sas: Iterable[SA], outlook: Outlook, *, kernel: bool = False
    ) -> ConnectionLatch:
        """Return a child's latch, CLOSED if it does not conform. Raises RuntimeError if closed."""
        if self._state is not LatchState.LISTENER:
            raise RuntimeError("the listener is closed")
        child = ConnectionLatch(self.options, sas, outlook, kernel=kernel)
        if child.state is LatchState.ESTABLISHED:
            self._move(LatchEvent.ADMIT)
        return child


class ConnectionLatch(_Machine):
    """A connection's latch. It is born ESTABLISHED, or CLOSED with a reason.

    ``sas`` are the inbound SAs that its token rests on. ``kernel``: a policy of the socket lets
    in and out nothing but :attr:`channels`, so that other SAs cannot carry it; settable.
    ``waiting``: an identity is awaited; read nothing meanwhile. The channels are others when
    their peer has moved.
    """

    __slots__ = (
        "_broken_since",
        "_demanded",
        "_floor",
        "_known",
        "_like",
        "_local",
        "_origins",
        "_peer",
        "_quality",
        "breaks",
        "channels",
        "kernel",
        "options",
        "reason",
        "waiting",
    )

    def __init__(
        self, options: Latch, sas: Iterable[SA], outlook: Outlook, *, kernel: bool = False
    ) -> None:
        latched = [sa for sa in sas if sa.proto in PROTECTING]
        like = options.like or LatchParameters()
        self.options = options
        self.kernel = kernel
        self.reason: LatchReason | None = None
        self.breaks = 0
        self.waiting = False
        self.channels = tuple(dict.fromkeys(Channel.of(sa) for sa in latched))
        self._broken_since: float | None = None
        grades = tuple(sorted({Grade.of(sa) for sa in latched}, key=repr))
        self._quality = grades if len({g.proto for g in grades}) == len(grades) else INDETERMINATE
        self._floor = grades
        self._like = like
        self._local, self._peer = like.local, like.peer
        keys = {sa.key for sa in latched}
        self._origins = {(s.sa.key, s.born) for s in outlook.inbound if s.sa.key in keys}
        self._known: set[tuple[SAKey, float]] = set()
        # Where nothing was demanded, its absence is no change.
        self._demanded = (_demands(outlook.policies_in), _demands(outlook.policies_out))
        mine = self.parameters
        if not latched:
            self.reason = LatchReason.LOST
        elif not outlook.sure:
            self.reason = LatchReason.EVIDENCE
        elif not (
            like.protocols in (None, mine.protocols)
            and like.mode in (None, mine.mode)
            and _all_serve(grades, like.quality)
        ):
            self.reason = LatchReason.QUALITY
        else:
            self.reason, self.waiting = self._judge(outlook)
        super().__init__(LatchEvent.REFUSE if self.reason else LatchEvent.LATCH)

    @property
    def parameters(self) -> LatchParameters:
        """What is latched. An identity that was awaited comes in once, and stays."""
        modes = {channel.mode for channel in self.channels}
        return LatchParameters(
            protocols=tuple(sorted({channel.proto for channel in self.channels})),
            mode=modes.pop() if len(modes) == 1 else None,
            quality=self._quality,
            local=self._local,
            peer=self._peer,
        )

    @property
    def status(self) -> LatchStatus:
        """A snapshot for users."""
        held_by = "kernel" if self.kernel else "user"
        return LatchStatus(self.state, held_by, self.parameters, self.reason, self.breaks)

    def observe(self, outlook: Outlook, now: float) -> bool:
        """Take in how things are now; True where the state changed."""
        if self.state is LatchState.CLOSED or not outlook.sure:
            return False
        self._follow(outlook)
        self.reason, self.waiting = self._judge(outlook)
        moved = self._move(LatchEvent.CONFLICT if self.reason else LatchEvent.CONFORM)
        if moved:
            broken = self.state is LatchState.BROKEN
            self._broken_since = now if broken else None
            self.breaks += broken
        return moved

    def void(self) -> bool:
        """Nothing can be known of the connection any more; True where that was news."""
        return self._end(LatchEvent.VOID, LatchReason.EVIDENCE)

    def next_deadline(self) -> float | None:
        """Return when :meth:`advance` has something to do."""
        if self._broken_since is None or self.options.timeout is None:
            return None
        return self._broken_since + self.options.timeout

    def advance(self, now: float) -> bool:
        """Let time pass; True where the state changed."""
        deadline = self.next_deadline()
        if deadline is None or now < deadline:
            return False
        return self._end(LatchEvent.EXPIRE, LatchReason.TIMEOUT)

    def release(self) -> None:
        """The connection is gone."""
        self._broken_since = None
        super().release()

    def _end(self, event: LatchEvent, reason: LatchReason) -> bool:
        if not self._move(event):
            return False
        self.reason = reason
        self.waiting = False
        self._broken_since = None
        return True

    def _follow(self, outlook: Outlook) -> None:
        """Go with the peer who has moved: the same identity, under another reqid or address."""
        if self._peer is None or any(
            channel.carries(s.sa, inbound=True)
            for s in outlook.inbound
            for channel in self.channels
        ):
            return
        found = {
            Channel.of(s.sa)
            for s in outlook.inbound
            if s.peer is not None
            and self._is_peers(s, True)
            and any(Grade.of(s.sa).serves(wanted) for wanted in self._floor)
        }
        if len(found) == len(self.channels) == 1:
            self.channels = tuple(found)

    def _judge(self, outlook: Outlook) -> tuple[LatchReason | None, bool]:
        """Return what conflicts, and whether an identity is awaited."""
        found: set[LatchReason] = set()
        waiting = False
        carrying: set[int] = set()
        seen: list[Sighting] = []
        for inbound, sightings, policies, demanded, blocked in (
            (True, outlook.inbound, outlook.policies_in, self._demanded[0], outlook.blocked_in),
            (False, outlook.outbound, outlook.policies_out, self._demanded[1], outlook.blocked_out),
        ):
            for sighting in sightings:
                sa = sighting.sa
                if not self._may_carry(sa, policies, inbound):
                    continue
                grade = Grade.of(sa)
                whose = self._is_peers(sighting, inbound)
                if whose is False:
                    found.add(LatchReason.PEER)
                elif not any(grade.serves(wanted, inbound=inbound) for wanted in self._floor):
                    found.add(LatchReason.QUALITY)
                else:
                    waiting = waiting or whose is None
                    seen.append(sighting)
                    if inbound:
                        carrying.add(sa.proto)
            if (
                blocked
                or (demanded and not _demands(policies))
                or any(self._forbids(policy, inbound) for policy in policies)
            ):
                found.add(LatchReason.POLICY)
        told = [s.peer for s in seen if s.peer is not None]
        if self._peer is None and told and _one(told) is None:
            found.add(LatchReason.PEER)
        if outlook.opaque:
            found.add(LatchReason.EVIDENCE)
        if not carrying.issuperset(channel.proto for channel in self.channels):
            found.add(LatchReason.LOST)
        reason = next((r for r in LatchReason if r in found), None)
        if reason is None:
            self._learn(seen)
        return reason, waiting and reason is None

    def _may_carry(self, sa: SA, policies: tuple[Policy, ...], inbound: bool) -> bool:
        """Whether the kernel would take this SA for the connection."""
        if any(channel.carries(sa, inbound=inbound) for channel in self.channels):
            return True
        if self.kernel:
            templates = [channel.template(inbound=inbound) for channel in self.channels]
        elif _demands(policies):
            templates = [template for policy in policies for template in policy.templates]
        else:
            # The kernel takes nothing out of a tunnel without a policy, and sends in clear.
            return inbound and sa.mode not in TUNNELS
        return any(_meets(sa, template, inbound=inbound) for template in templates)

    def _is_peers(self, sighting: Sighting, inbound: bool) -> bool | None:
        """Whether an SA is the latched peer's; None where that is awaited."""
        if sighting.peer is not None or sighting.local is not None:
            if self._peer is not None or self._local is not None:
                return (
                    self._is_like(sighting)
                    and _may_be(sighting.peer, self._peer)
                    and (
                        _may_be(sighting.local, self._local)
                        or (sighting.local is None and self._like.local is None)
                    )
                )
        elif inbound and (self._peer is not None or self._local is not None):
            if (sighting.sa.key, sighting.born) in self._known:
                return True
            return None if sighting.pending else False
        # Not every source of identities tells those of outbound SAs.
        return any(channel.carries(sighting.sa, inbound=inbound) for channel in self.channels)

    def _is_like(self, sighting: Sighting) -> bool:
        """Whether an SA that the connection came with shows whom the connection must be with."""
        if (sighting.sa.key, sighting.born) not in self._origins:
            return True
        return all(
            want is None or (have is not None and have.is_still(want) is True)
            for have, want in (
                (sighting.local, self._like.local),
                (sighting.peer, self._like.peer),
            )
        )

    def _learn(self, sightings: list[Sighting]) -> None:
        """Latch the identities once they are known, and remember whose SAs these are.

        Only the SAs that the connection came with can tell whose it is; how that is proved, all.
        """
        origins = [s for s in sightings if (s.sa.key, s.born) in self._origins]
        self._peer = _learned(self._peer, [s.peer for s in origins], [s.peer for s in sightings])
        self._local = _learned(
            self._local, [s.local for s in origins], [s.local for s in sightings]
        )
        # A source of identities that goes away later takes none of them back.
        self._known = {
            (s.sa.key, s.born)
            for s in sightings
            if (self._peer is not None and _may_be(s.peer, self._peer))
            or (s.sa.key, s.born) in self._known
        }

    def _forbids(self, policy: Policy, inbound: bool) -> bool:
        """Whether a policy lets nothing pass, or demands what the channel is not."""
        return policy.action is PolicyAction.BLOCK or not all(
            template.optional
            or template.proto not in PROTECTING
            or any(
                _meets(channel.template(inbound=inbound), template, inbound=inbound)
                for channel in self.channels
            )
            for template in policy.templates
        )


def _may_be(have: IToken | None, known: IToken | None) -> bool:
    return known is None or (have is not None and have.is_still(known) is not False)


def _one(tokens: Iterable[IToken]) -> IToken | None:
    """Return what several say of one end; None where they contradict each other."""
    found: IToken | None = None
    for token in tokens:
        if found is None:
            found = token
        elif not (_may_be(token, found) and _may_be(found, token)):
            return None
        else:
            found = found.completed(token)
    return found


def _learned(
    known: IToken | None, origins: list[IToken | None], told: list[IToken | None]
) -> IToken | None:
    """Return what is known of an end by now: who it is by the first, details by all."""
    named = [each for each in origins if each is not None]
    if known is None and len(named) == len(origins):
        known = _one(named)
    details = _one(each for each in told if each is not None)
    return known if known is None or details is None else known.completed(details)


def _demands(policies: tuple[Policy, ...]) -> bool:
    return bool(policies) and all(policy.protects for policy in policies)


def _all_serve(grades: tuple[Grade, ...], wanted: tuple[Grade, ...] | str | None) -> bool:
    if not isinstance(wanted, tuple):
        return True
    return all(any(grade.serves(w) for w in wanted) for grade in grades)
