"""Protection tokens: channels, interned, and fixed once resolved.

Rules:

* A token says what was proved of the packets that it came with, and never changes what it says.
  The exception is a pending one: it waits a moment for an SA that the mirror has not seen yet,
  says UNKNOWN meanwhile, and is fixed by what comes, or as UNKNOWN by its deadline, by a resync,
  or by the end of the backend.
* Identities come later than their SA. A token that waits for them says all the rest, and nothing
  of its ends; it is told them at most once, and goes without them from the deadline, a resync, or
  the end of the backend on.
* A token is a channel: local and peer address, what protects them, how sure that is, and who is at
  its ends. There is one object for a channel as long as somebody holds it (:mod:`.kinds`).
  Those that wait for identities are told apart by their SAs, since those of two peers may look
  alike.
* A token holds no key, no socket, and nothing that must be closed.
"""

# Token and resolver are two halves of one thing.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NoReturn, final
from weakref import WeakSet, WeakValueDictionary

from .enums import Assurance, Direction
from .errors import StaleTokenError, TokenError
from .flow import format_address, pack_address
from .identities import UNIDENTIFIED, Answer, Awaited, Identify, Identities, agreed
from .kinds import Kind
from .protection import Group, Verdict, group_of, unknown
from .truth import MISSING, Finding, TruthTable

if TYPE_CHECKING:
    from .evidence import Evidence
    from .identity import IToken
    from .mirror import Mirror
    from .sa import SA
    from .sad import Record

__all__ = ["PENDING_LIMIT", "PENDING_SECONDS", "PToken", "Resolver"]

PENDING_SECONDS = 2.0
"""How long a token waits for the SA that its packet was stamped with, and an SA's identities
after the SA came.
"""
PENDING_LIMIT = 4096
"""How many tokens wait at once; further ones are UNKNOWN for good."""

# How many forks lie between the process that loaded the module and this one.
_forks = 0


def _forked() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_forked)

_put = object.__setattr__


class _Pending:
    """What a token waits for: the SA of its evidence, or identities of the SAs in ``records``."""

    __slots__ = ("deadline", "evidence", "records", "resyncs")

    def __init__(
        self,
        evidence: Evidence,
        deadline: float,
        resyncs: int,
        records: tuple[Record, ...] = (),
    ) -> None:
        self.evidence = evidence
        self.deadline = deadline
        self.resyncs = resyncs
        self.records = records


@final
class PToken:
    """What IPsec did for a connection or a datagram. An opaque handle; backends make them.

    Two tokens are equal only if they are one object, and all datagrams of a channel carry one
    object. A token has no truth value: ask :attr:`protected`. It cannot be built, copied or
    pickled, and holds nothing that has to be closed. After a fork every attribute raises
    StaleTokenError in the child.

    The properties are ``True``, ``False``, or None for unknown; on a clear channel they are False.
    """

    __slots__ = ("__weakref__", "_kind", "_peer", "_state")

    _kind: Kind
    # As text: the host of an address that a program gets is the same object.
    _peer: str
    # What it waits for, or in place of what channel's token it was made; nearly always None.
    _state: _Pending | PToken | None

    def __new__(cls) -> PToken:
        raise TypeError("a PToken cannot be built: it comes with a connection or a datagram")

    def __init_subclass__(cls) -> NoReturn:
        raise TypeError("PToken cannot be subclassed")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("a PToken does not change")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError("a PToken does not change")

    def __bool__(self) -> NoReturn:
        raise TypeError("a PToken is neither true nor false: ask its 'protected'")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a PToken is valid in its own process only: it cannot be pickled or copied")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self.__reduce__()

    def __copy__(self) -> NoReturn:
        self.__reduce__()

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__reduce__()

    def _now(self) -> Kind:
        """Return all but the peer's address, which is the only way to read anything."""
        resolver = self._kind.resolver
        if resolver.stale:
            raise StaleTokenError("this PToken belongs to the process that forked this one")
        if isinstance(self._state, _Pending):
            resolver.settle(self)
        return self._kind

    @property
    def _ends(self) -> tuple[bytes, bytes]:
        """The packed addresses of the peer and of this end, empty where not known."""
        return b"" if self._peer == "*" else pack_address(self._peer), self._kind.local

    @property
    def assurance(self) -> Assurance:
        """How sure all the rest is."""
        return self._now().verdict.assurance

    @property
    def protected(self) -> bool:
        """Whether the kernel vouched for integrity. Pending, unknown, failed: False.

        POLICY is inference: it counts only on a backend that was opened with
        ``trust_policy=True``.
        """
        kind = self._now()
        assurance, protection = kind.verdict.assurance, kind.verdict.protection
        return protection.integrity is True and (
            assurance >= Assurance.INTERFACE
            or (assurance is Assurance.POLICY and kind.resolver.trust_policy)
        )

    @property
    def privacy_protected(self) -> bool | None:
        """Whether the payload was encrypted, by a cipher that is not null."""
        return self._now().verdict.protection.privacy

    @property
    def integrity_protected(self) -> bool | None:
        """Whether the payload was authenticated."""
        return self._now().verdict.protection.integrity

    @property
    def compression_available(self) -> bool | None:
        """Whether IPComp may have been applied."""
        return self._now().verdict.protection.compression

    @property
    def tunnel_mode(self) -> bool | None:
        """Whether it came in a tunnel (tunnel, BEET or IP-TFS mode)."""
        return self._now().verdict.protection.tunnel

    @property
    def ipoptions_protected(self) -> bool | None:
        """Whether IP options were authenticated: AH, or anything inside an authenticated tunnel."""
        return self._now().verdict.protection.ipoptions

    @property
    def policy_name(self) -> str | None:
        """The policy that let it in, as its selector and number.

        None where the token rests on something else: with any assurance but POLICY.
        """
        return self._now().verdict.protection.policy

    @property
    def local(self) -> IToken | None:
        """The identity of this end; None: not known, or not yet."""
        return self._now().identities.local

    @property
    def peer(self) -> IToken | None:
        """The identity of the peer; None: not known, or not yet.

        It is that of whoever negotiated the SAs, if it is the same for all under which the packet
        may have come.
        """
        return self._now().identities.peer

    @property
    def pending(self) -> bool:
        """Whether its SA, or an identity, is still awaited: :meth:`resolved` waits for it."""
        self._now()
        return isinstance(self._state, _Pending)

    @property
    def channel(self) -> PToken:
        """The channel's token, as :meth:`resolved` returns it, as far as it is known by now."""
        self._now()
        return self._state if isinstance(self._state, PToken) else self

    @property
    def sas(self) -> tuple[SA, ...]:
        """The channel's living inbound SAs, oldest first. For diagnostics only."""
        kind = self._now()
        return kind.resolver.living(kind.verdict.protection.groups, kind.identities)

    @property
    def sa(self) -> SA | None:
        """The newest living inbound SA of the channel. For diagnostics only."""
        sas = self.sas
        return sas[-1] if sas else None

    @property
    def alive(self) -> bool:
        """Whether the channel still stands: its backend is open and knows a living SA for it.

        A clear channel stands while the backend is open; an unknown one never does.
        """
        kind = self._now()
        assurance = kind.verdict.assurance
        if kind.resolver.closed or assurance is Assurance.UNKNOWN:
            return False
        return assurance is Assurance.NONE or bool(self.sas)

    @property
    def audit_string(self) -> str:
        """One line for a log: addresses, assurance, identities, protection, the newest SA or the
        reason.
        """
        kind = self._now()
        assurance, protection, reason, ports = kind.verdict
        local, peer = format_address(kind.local), self._peer
        if ports is not None:
            proto, local_port, peer_port = ports
            local, peer = f"{_end(local, local_port)}", f"{_end(peer, peer_port)} proto={proto}"
        parts = [f"local={local} peer={peer} assurance={assurance.name}"]
        for end, who in zip(("local", "peer"), kind.identities, strict=True):
            if who is not None:
                parts.append(f"{end}_id={who.kind.name}:{str(who)!r}")
        if isinstance(self._state, _Pending):
            parts.append("pending")
        for name, value in (
            ("privacy", protection.privacy),
            ("integrity", protection.integrity),
            ("tunnel", protection.tunnel),
        ):
            parts.append(f"{name}={_word(value)}")
        parts.extend(f"by={group}" for group in protection.groups)
        sa = self.sa
        if sa is not None:
            parts.append(f"spi={sa.spi:#010x}")
        if protection.policy is not None:
            parts.append(f"policy={protection.policy!r}")
        if reason:
            parts.append(f"reason={reason!r}")
        return " ".join(parts)

    @property
    def information_string(self) -> str:
        """The protection in words, for people."""
        assurance, protection, reason, _ = self._now().verdict
        if assurance is Assurance.UNKNOWN:
            return f"unknown: {reason}"
        if assurance is Assurance.NONE:
            return "clear"
        kinds = [
            word
            for word, value in (
                ("encrypted", protection.privacy),
                ("authenticated", protection.integrity),
            )
            if value
        ]
        by = ", ".join(str(group) for group in protection.groups)
        return (" and ".join(kinds) or "not protected") + (f" by {by}" if by else "")

    def equivalent(self, other: PToken) -> bool:
        """Whether both are protected alike between the same addresses and identities.

        Ports and the kind of evidence may differ. What is unknown is like nothing but itself; an
        identity that is not known is only like another that is not.
        """
        mine, theirs = self._now(), other._now()
        if self is other:
            return True
        verdict, another = mine.verdict, theirs.verdict
        if Assurance.UNKNOWN in (verdict.assurance, another.assurance):
            return False
        return (
            (mine.local, self._peer) == (theirs.local, other._peer)
            and mine.identities == theirs.identities
            and self.protected == other.protected
            and verdict.protection[:5] == another.protection[:5]
            and verdict.protection.others == another.protection.others
            and {g.strength for g in verdict.protection.groups}
            == {g.strength for g in another.protection.groups}
        )

    async def resolved(self, timeout: float | None = None) -> PToken:  # noqa: ASYNC109
        """Wait until the token is no longer pending; return the channel's token.

        That is the token itself unless it was pending and the channel turned out to be known.
        ``timeout`` is in seconds; raises TimeoutError when it has passed. Without one it takes
        two seconds at most for its SA, which is UNKNOWN then for good, and as long after the SA
        came for identities.
        """
        kind = self._now()
        if isinstance(self._state, _Pending):
            await kind.resolver.wait(self, timeout)
        return self.channel

    def __repr__(self) -> str:
        try:
            return f"<PToken {self.audit_string}>"
        except StaleTokenError:
            return "<PToken stale: of another process>"


def _word(value: bool | None) -> str:
    return "unknown" if value is None else "yes" if value else "no"


def _end(address: str, port: int) -> str:
    return (f"[{address}]:{port}" if ":" in address else f"{address}:{port}") if port else address


async def _no_wait(token: PToken, timeout: float | None) -> None:  # noqa: ASYNC109
    del token, timeout
    raise TokenError("this backend cannot wait for what is pending")


def _ignore(token: PToken) -> None:
    del token


class Resolver(TruthTable):
    """Turns evidence into interned tokens, by the facts in a mirror.

    ``clock`` gives monotonic seconds, the mirror's time. Beside the truth table's own attributes,
    its owner sets ``settled``, which is told each token that is pending no longer, ``wait``, which
    waits for that (see :meth:`PToken.resolved`), ``lock`` where several threads read tokens, and
    ``identify``, which tells the ends of one SA at a time, with ``identified``. When an answer of
    it may have changed, the owner changes the mirror's epoch and calls :meth:`settle_all`.
    """

    def __init__(
        self, mirror: Mirror, clock: Callable[[], float], *, trust_policy: bool = False
    ) -> None:
        super().__init__(mirror)
        self.clock = clock
        self.trust_policy = trust_policy
        self.closed = False
        self.wait: Callable[[PToken, float | None], Awaitable[None]] = _no_wait
        self.settled: Callable[[PToken], None] = _ignore
        self.identify: Identify = _nobody
        self.lock: AbstractContextManager[object] = nullcontext()
        self._forks = _forks
        self._kinds: WeakValueDictionary[tuple[object, ...], Kind] = WeakValueDictionary()
        self._waiting: WeakSet[PToken] = WeakSet()
        # The same, by what they wait for, and some that wait no longer.
        self._waiting_by: WeakValueDictionary[tuple[object, ...], PToken] = WeakValueDictionary()

    @property
    def stale(self) -> bool:
        """Whether this process is a fork of the one that it belongs to."""
        return self._forks != _forks

    def resolve(self, evidence: Evidence) -> PToken:
        """Return the token for this evidence."""
        now = self.clock()
        finding = self.judge(evidence)
        if finding is MISSING:
            return self._pend(evidence, now)
        identities = self._identities(finding.records, now)
        if isinstance(identities, Awaited):
            return self._pend_identity(evidence, finding, identities.until)
        return self._intern(evidence, finding.verdict, identities)

    def living(
        self, groups: Iterable[Group], identities: Identities = UNIDENTIFIED
    ) -> tuple[SA, ...]:
        """Return the living SAs of some groups, oldest first: of known ends, theirs alone."""
        with self.lock:
            now = self.clock()
            found = [
                record
                for group in groups
                for record in self.mirror.sad.between(group.source, group.destination)
                if group_of(record.sa) == group and self._is_of(record, identities, now)
            ]
        # A dump tells all at once, and newest first.
        found.sort(key=lambda record: (record.added, record.sa.usage.add_time))
        return tuple(record.sa for record in found)

    def close(self) -> None:
        """Fix every pending token as it is. All tokens stay readable."""
        self.closed = True
        self.settle_all()

    # Pending tokens

    def next_deadline(self) -> float | None:
        """Return when the first pending token has waited long enough."""
        states = [token._state for token in self._waiting]
        return min((s.deadline for s in states if isinstance(s, _Pending)), default=None)

    def settle_all(self) -> None:
        """Fix the pending tokens that can be fixed by now. Call it when the epoch has changed."""
        for token in list(self._waiting):
            self.settle(token)

    def is_pending(self, token: PToken) -> bool:
        """Whether a token still waits, for its SA or for an identity."""
        return isinstance(token._state, _Pending)

    def settle(self, token: PToken) -> None:
        """Fix a pending token if that is possible by now."""
        with self.lock:
            pending = token._state
            if not isinstance(pending, _Pending):
                return
            verdict = token._kind.verdict
            if pending.records:
                identities = self._named(pending)
            else:
                verdict, records = self._settlement(pending)
                if verdict is MISSING.verdict:
                    # Other changes of the epoch must not make this one go unseen.
                    self.mirror.await_spi(pending.evidence.spi)
                    return
                identities = self._identities(records, self.clock())
                if isinstance(identities, Awaited):
                    pending = self._waits_for(pending.evidence, identities.until, records)
                    _put(token, "_kind", self._kind(pending.evidence, verdict))
                    _put(token, "_state", pending)
            if isinstance(identities, Awaited):
                return
            self._waiting.discard(token)
            kind = self._kind(pending.evidence, verdict, identities)
            channel = kind.keep(token)
            _put(token, "_kind", kind)
            _put(token, "_state", None if channel is token else channel)
        self.settled(token)

    def _settlement(self, pending: _Pending) -> Finding:
        if self.closed:
            return Finding(unknown("the backend was closed"))
        if pending.resyncs != self.mirror.resyncs:
            return Finding(unknown("events were lost meanwhile"))
        return self.judge_again(pending.evidence, pending.deadline, self.clock())

    def _pend(self, evidence: Evidence, now: float) -> PToken:
        self.mirror.await_spi(evidence.spi)
        key = (evidence, self.mirror.resyncs)
        token = self._waiting_as(key)
        if token is not None:
            return token
        if len(self._waiting) >= PENDING_LIMIT:
            verdict = unknown("too many tokens wait for their SA")
            return self._intern(evidence, verdict, UNIDENTIFIED)
        deadline = now + PENDING_SECONDS
        return self._start(key, MISSING.verdict, self._waits_for(evidence, deadline))

    # Identities

    def _identities(self, records: tuple[Record, ...], now: float) -> Answer:
        return agreed(self.identify(record, now) for record in records)

    def _is_of(self, record: Record, identities: Identities, now: float) -> bool:
        """Whether nothing is known of an SA's ends that contradicts these, or all that they say."""
        if identities == UNIDENTIFIED:
            return True
        answer = self.identify(record, now)
        return isinstance(answer, Identities) and all(
            wanted in (None, known) for wanted, known in zip(identities, answer, strict=True)
        )

    def _named(self, pending: _Pending) -> Answer:
        """Return what a token that waits for identities is told by now."""
        now = self.clock()
        if self.closed or pending.resyncs != self.mirror.resyncs or now > pending.deadline:
            return UNIDENTIFIED
        return self._identities(pending.records, now)

    def _pend_identity(self, evidence: Evidence, finding: Finding, until: float) -> PToken:
        # The records themselves: an id() of theirs might be another's one day.
        key = (evidence.local, evidence.peer, finding.verdict, frozenset(finding.records))
        token = self._waiting_as(key)
        if token is not None:
            return token
        if len(self._waiting) >= PENDING_LIMIT:
            return self._intern(evidence, finding.verdict, UNIDENTIFIED)
        pending = self._waits_for(evidence, until, finding.records)
        return self._start(key, finding.verdict, pending)

    # Making and finding tokens

    def _waits_for(
        self, evidence: Evidence, deadline: float, records: tuple[Record, ...] = ()
    ) -> _Pending:
        return _Pending(evidence, deadline, self.mirror.resyncs, records)

    def _waiting_as(self, key: tuple[object, ...]) -> PToken | None:
        token = self._waiting_by.get(key)
        state = None if token is None else token._state
        return token if isinstance(state, _Pending) and self.clock() <= state.deadline else None

    def _start(self, key: tuple[object, ...], verdict: Verdict, pending: _Pending) -> PToken:
        evidence = pending.evidence
        kind = self._kind(evidence, verdict)
        token = self._waiting_by[key] = _make(format_address(evidence.peer), kind, pending)
        self._waiting.add(token)
        return token

    def _intern(self, evidence: Evidence, verdict: Verdict, identities: Identities) -> PToken:
        peer = format_address(evidence.peer)
        kind = self._kind(evidence, verdict, identities)
        token = kind.find(peer)
        return kind.keep(_make(peer, kind)) if token is None else token

    def _kind(
        self, evidence: Evidence, verdict: Verdict, identities: Identities = UNIDENTIFIED
    ) -> Kind:
        key = evidence.local, verdict, identities
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds.setdefault(key, Kind(self, *key))
        return kind


def _nobody(record: Record, now: float, direction: Direction = Direction.IN) -> Answer:
    del record, now, direction
    return UNIDENTIFIED


def _make(peer: str, kind: Kind, pending: _Pending | None = None) -> PToken:
    token = object.__new__(PToken)
    _put(token, "_peer", peer)
    _put(token, "_kind", kind)
    _put(token, "_state", pending)
    return token
