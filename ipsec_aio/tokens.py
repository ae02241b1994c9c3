"""Protection tokens, and how evidence becomes one.

Rules:

* A token says what was proved of the packets that it came with, and never changes what it says.
  The exception is a pending one: it waits a moment for an SA that the mirror has not seen yet,
  says UNKNOWN meanwhile, and is fixed by what comes, or as UNKNOWN by its deadline, by a resync,
  or by the end of the backend.
* A token is a channel: local and peer address, what protects them, and how sure that is. Tokens
  are interned weakly: one object for a channel as long as somebody holds it.
* Where several SAs may have carried a packet, the weakest of their properties count.
* What cannot be told is UNKNOWN: doubt about the evidence, a mirror out of sync, a stamp of
  another generation, contradictions.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn, final
from weakref import WeakSet, WeakValueDictionary

from .enums import Assurance, Direction, Mode, PolicyAction
from .errors import StaleTokenError, TokenError
from .flow import Flow, Mark, format_address
from .policy import Policy, Template
from .sa import IPPROTO_AH, IPPROTO_COMP, IPPROTO_ESP, SA, Algorithm, SAKey

if TYPE_CHECKING:
    from .evidence import Evidence
    from .mirror import Mirror, Record

__all__ = ["PENDING_LIMIT", "PENDING_SECONDS", "PToken", "Resolver", "fits"]

PENDING_SECONDS = 2.0
"""How long a token waits for the SA that its packet was stamped with."""
PENDING_LIMIT = 4096
"""How many tokens wait at once; further ones are UNKNOWN for good."""

_PROTECTING = (IPPROTO_ESP, IPPROTO_AH)
_TUNNELS = (Mode.TUNNEL, Mode.BEET, Mode.IPTFS)

# Counts the forks between this process and the one that loaded the module.
_forks = 0


def _forked() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_forked)


class _Protection(NamedTuple):
    """What an SA, or SAs that cannot be told apart, do for a packet; what tells channels apart."""

    privacy: bool | None
    integrity: bool | None
    compression: bool | None
    tunnel: bool | None
    ipoptions: bool | None
    groups: tuple[_Group, ...] = ()
    policy: str | None = None


class _Group(NamedTuple):
    """The SAs that may replace each other within a channel."""

    proto: int
    mode: Mode
    aead: Algorithm | None
    encryption: Algorithm | None
    authentication: Algorithm | None
    compression: Algorithm | None
    reqid: int
    mark: Mark
    if_id: int
    source: bytes
    destination: bytes

    @property
    def strength(self) -> tuple[object, ...]:
        """The group without what singles out one peer."""
        return self[:6]


_UNKNOWN: Final = _Protection(None, None, None, None, None)
_CLEAR: Final = _Protection(False, False, False, False, False)


def _group(sa: SA) -> _Group:
    return _Group(
        sa.proto,
        sa.mode,
        sa.aead,
        sa.encryption,
        sa.authentication,
        sa.compression,
        sa.reqid,
        sa.mark,
        sa.if_id,
        sa.source,
        sa.destination,
    )


def _protection(sa: SA) -> _Protection:
    tunnel = sa.mode in _TUNNELS
    authenticates = sa.authenticates
    return _Protection(
        privacy=sa.encrypts,
        integrity=authenticates,
        compression=sa.proto == IPPROTO_COMP,
        tunnel=tunnel,
        # AH covers the header in front of it; a tunnel carries all of the inner one.
        ipoptions=authenticates and (sa.proto == IPPROTO_AH or sa.mode is Mode.TUNNEL),
        groups=(_group(sa),),
    )


def _weaker(one: bool | None, other: bool | None) -> bool | None:
    """Both, or else what is worse: False beats unknown beats True."""
    if one is False or other is False:
        return False
    return None if one is None or other is None else True


def _stronger(one: bool | None, other: bool | None) -> bool | None:
    if one or other:
        return True
    return None if one is None or other is None else False


def _weakest(protections: Iterable[_Protection]) -> _Protection:
    result: _Protection | None = None
    for p in protections:
        if result is None or result == p:
            result = p
        else:
            result = _Protection(
                _weaker(result.privacy, p.privacy),
                _weaker(result.integrity, p.integrity),
                result.compression if result.compression == p.compression else None,
                result.tunnel if result.tunnel == p.tunnel else None,
                _weaker(result.ipoptions, p.ipoptions),
                tuple(sorted({*result.groups, *p.groups}, key=repr)),
            )
    return _UNKNOWN if result is None else result


class _Verdict(NamedTuple):
    """What is known of a channel, by which evidence, and why not more."""

    assurance: Assurance
    protection: _Protection
    reason: str = ""


class _Pending:
    """What a token waits for."""

    __slots__ = ("deadline", "evidence", "resyncs")

    def __init__(self, evidence: Evidence, deadline: float, resyncs: int) -> None:
        self.evidence = evidence
        self.deadline = deadline
        self.resyncs = resyncs


_MISSING = _Verdict(Assurance.UNKNOWN, _UNKNOWN, "no SA with this SPI is known yet")


@final
class PToken:
    """What IPsec did for a connection or a datagram. An opaque handle; backends make them.

    Two tokens are equal only if they are one object, and all datagrams of a channel carry one
    object. A token has no truth value: ask :attr:`protected`. It cannot be built, copied or
    pickled, and holds nothing that has to be closed. After a fork every attribute raises
    StaleTokenError in the child.

    The properties are ``True``, ``False``, or None for unknown; on a clear channel they are False.
    """

    __slots__ = (
        "__weakref__",
        "_channel",
        "_local",
        "_peer",
        "_pending",
        "_ports",
        "_resolver",
        "_verdict",
    )

    _channel: PToken | None
    _local: bytes
    _peer: bytes
    _pending: _Pending | None
    _ports: tuple[int, int, int] | None
    _resolver: Resolver
    _verdict: _Verdict

    def __new__(cls) -> PToken:
        raise TypeError("a PToken cannot be built: it comes with a connection or a datagram")

    def __init_subclass__(cls) -> NoReturn:
        raise TypeError("PToken cannot be subclassed")

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

    def _now(self) -> _Verdict:
        """Return the verdict, which is the only way to read anything."""
        if self._resolver.forks != _forks:
            raise StaleTokenError("this PToken belongs to the process that forked this one")
        if self._pending is not None:
            self._resolver.settle(self)
        return self._verdict

    @property
    def assurance(self) -> Assurance:
        """How sure all the rest is."""
        return self._now().assurance

    @property
    def protected(self) -> bool:
        """Whether the kernel vouched for integrity. Pending, unknown, failed: False.

        POLICY is inference: it counts only on a backend that was opened with
        ``trust_policy=True``.
        """
        assurance, protection, _ = self._now()
        return protection.integrity is True and (
            assurance >= Assurance.INTERFACE
            or (assurance is Assurance.POLICY and self._resolver.trust_policy)
        )

    @property
    def privacy_protected(self) -> bool | None:
        """Whether the payload was encrypted, by a cipher that is not null."""
        return self._now().protection.privacy

    @property
    def integrity_protected(self) -> bool | None:
        """Whether the payload was authenticated."""
        return self._now().protection.integrity

    @property
    def compression_available(self) -> bool | None:
        """Whether IPComp may have been applied."""
        return self._now().protection.compression

    @property
    def tunnel_mode(self) -> bool | None:
        """Whether it came in a tunnel (tunnel, BEET or IP-TFS mode)."""
        return self._now().protection.tunnel

    @property
    def ipoptions_protected(self) -> bool | None:
        """Whether IP options were authenticated: AH, or anything inside an authenticated tunnel."""
        return self._now().protection.ipoptions

    @property
    def policy_name(self) -> str | None:
        """The policy that let it in, as its selector and number; None where none was asked."""
        return self._now().protection.policy

    @property
    def local(self) -> object | None:
        """The identity of this end; None: not known."""
        self._now()
        return None

    @property
    def peer(self) -> object | None:
        """The identity of the peer; None: not known."""
        self._now()
        return None

    @property
    def sas(self) -> tuple[SA, ...]:
        """The channel's living inbound SAs, oldest first. For diagnostics only."""
        verdict = self._now()
        return self._resolver.living(verdict.protection.groups)

    @property
    def sa(self) -> SA | None:
        """The newest living inbound SA of the channel. For diagnostics only."""
        sas = self.sas
        return sas[-1] if sas else None

    @property
    def alive(self) -> bool:
        """Whether the channel still stands: its backend is open and in sync and has an SA for it.

        A clear channel stands while the backend does; an unknown one never does.
        """
        verdict = self._now()
        if not self._resolver.standing or verdict.assurance is Assurance.UNKNOWN:
            return False
        return verdict.assurance is Assurance.NONE or bool(self.sas)

    @property
    def audit_string(self) -> str:
        """One line for a log: addresses, assurance, protection, the newest SA or the reason."""
        assurance, protection, reason = self._now()
        local, peer = format_address(self._local), format_address(self._peer)
        if self._ports is not None:
            proto, local_port, peer_port = self._ports
            local, peer = f"[{local}]:{local_port}", f"[{peer}]:{peer_port} proto {proto}"
        parts = [f"local={local} peer={peer} assurance={assurance.name}"]
        for name, value in (
            ("privacy", protection.privacy),
            ("integrity", protection.integrity),
            ("tunnel", protection.tunnel),
        ):
            parts.append(f"{name}={_word(value)}")
        parts.extend(f"by={_describe(group)}" for group in protection.groups)
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
        assurance, protection, reason = self._now()
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
        by = ", ".join(_describe(group) for group in protection.groups)
        return (" and ".join(kinds) or "not protected") + (f" by {by}" if by else "")

    def equivalent(self, other: PToken) -> bool:
        """Whether both are protected alike between the same addresses and identities.

        Ports and the kind of evidence may differ. What is unknown is like nothing but itself.
        """
        mine, theirs = self._now(), other._now()
        if self is other:
            return True
        if Assurance.UNKNOWN in (mine.assurance, theirs.assurance):
            return False
        return (
            (self._local, self._peer) == (other._local, other._peer)
            and self.protected == other.protected
            and mine.protection[:5] == theirs.protection[:5]
            and {g.strength for g in mine.protection.groups}
            == {g.strength for g in theirs.protection.groups}
        )

    async def resolved(self, timeout: float | None = None) -> PToken:  # noqa: ASYNC109
        """Wait until the token is no longer pending; return the channel's token.

        That is the token itself unless it was pending and the channel turned out to be known.
        ``timeout`` is in seconds; raises TimeoutError when it has passed. Without one it takes
        two seconds at most: then the token is UNKNOWN for good.
        """
        self._now()
        if self._pending is not None:
            await self._resolver.wait(self, timeout)
            self._now()
        return self if self._channel is None else self._channel

    def __repr__(self) -> str:
        try:
            return f"<PToken {self.audit_string}>"
        except StaleTokenError:
            return "<PToken stale: of another process>"


def _word(value: bool | None) -> str:
    return "unknown" if value is None else "yes" if value else "no"


_PROTO_NAMES = {IPPROTO_ESP: "esp", IPPROTO_AH: "ah", IPPROTO_COMP: "comp"}


def _describe(group: _Group) -> str:
    algorithms = "+".join(
        str(a) for a in (group.aead, group.encryption, group.authentication) if a is not None
    )
    name = _PROTO_NAMES.get(group.proto, f"proto-{group.proto}")
    text = f"{name}/{group.mode.name.lower()}" + (f"({algorithms})" if algorithms else "")
    if group.mode in _TUNNELS:
        text += f"[{format_address(group.source)}-{format_address(group.destination)}]"
    return text + (f" reqid {group.reqid}" if group.reqid else "")


def _make(
    resolver: Resolver,
    local: bytes,
    peer: bytes,
    ports: tuple[int, int, int] | None,
    verdict: _Verdict,
    pending: _Pending | None = None,
) -> PToken:
    token = object.__new__(PToken)
    token._resolver = resolver
    token._local = local
    token._peer = peer
    token._ports = ports
    token._verdict = verdict
    token._pending = pending
    token._channel = None
    return token


async def _no_wait(token: PToken, timeout: float | None) -> None:  # noqa: ASYNC109
    del token, timeout
    raise TokenError("this backend cannot wait for what is pending")


class Resolver:
    """Turns evidence into interned tokens, by the facts in a mirror.

    ``clock`` gives monotonic seconds, the mirror's time. The backend that owns it sets:

    * ``generation``: the stamp's, 0 while there is none that was verified;
    * ``opaque_interfaces``: whether the namespace has interfaces (xfrm, vti) that scrub the
      security path, so that mark 0 and the plain SPD prove nothing;
    * ``is_own``: says whether an address is one of this host, whose traffic no policy checks;
    * ``lookup_missing``: asks the kernel for one SA at once; True says that the mirror now knows
      all about this key;
    * ``settled``: is told each token that is pending no longer;
    * ``wait``: waits for a pending token, see :meth:`PToken.resolved`.
    """

    def __init__(
        self, mirror: Mirror, clock: Callable[[], float], *, trust_policy: bool = False
    ) -> None:
        self.mirror = mirror
        self.clock = clock
        self.trust_policy = trust_policy
        self.generation = 0
        self.opaque_interfaces = False
        self.is_own: Callable[[bytes], bool] = _nobody
        self.lookup_missing: Callable[[SAKey], bool] = _cannot_ask
        self.wait: Callable[[PToken, float | None], Awaitable[None]] = _no_wait
        self.settled: Callable[[PToken], None] = _ignore
        self.forks: Final = _forks
        self._closed = False
        self._interned: WeakValueDictionary[tuple[object, ...], PToken] = WeakValueDictionary()
        self._waiting: WeakSet[PToken] = WeakSet()

    @property
    def stale(self) -> bool:
        """Whether this process is a fork of the one that it belongs to."""
        return self.forks != _forks

    @property
    def standing(self) -> bool:
        """Whether the mirror can be believed at this moment."""
        return not self._closed and self.mirror.synced

    def resolve(self, evidence: Evidence) -> PToken:
        """Return the token for this evidence."""
        now = self.clock()
        verdict = self._judge(evidence, now)
        if verdict is _MISSING:
            return self._pend(evidence, now)
        return self._intern(evidence, verdict)

    def living(self, groups: Iterable[_Group]) -> tuple[SA, ...]:
        """Return the living SAs of some groups, oldest first."""
        found = [
            record
            for group in groups
            for record in self.mirror.between(group.source, group.destination)
            if _group(record.sa) == group
        ]
        found.sort(key=lambda record: record.added)
        return tuple(record.sa for record in found)

    # Pending tokens

    def next_deadline(self) -> float | None:
        """Return when the first pending token has waited long enough."""
        return min(
            (p.deadline for token in self._waiting if (p := token._pending) is not None),
            default=None,
        )

    def settle_all(self) -> list[PToken]:
        """Fix the pending tokens that can be fixed, and return them. Call it after each event."""
        return [token for token in list(self._waiting) if self.settle(token)]

    def settle(self, token: PToken) -> bool:
        """Fix a pending token if that is possible by now; say whether it is fixed."""
        pending = token._pending
        if pending is None:
            return True
        now = self.clock()
        evidence = pending.evidence
        if self._closed:
            verdict = _Verdict(Assurance.UNKNOWN, _UNKNOWN, "the backend was closed")
        elif pending.resyncs != self.mirror.resyncs:
            verdict = _Verdict(Assurance.UNKNOWN, _UNKNOWN, "events were lost meanwhile")
        elif now > pending.deadline:
            verdict = _Verdict(Assurance.UNKNOWN, _UNKNOWN, "no SA with this SPI came to be known")
        else:
            verdict = self._judge(evidence, now)
            if verdict is _MISSING:
                return False
        self._waiting.discard(token)
        token._pending = None
        token._verdict = verdict
        if verdict.assurance is not Assurance.UNKNOWN:
            ports = self._ports(evidence, verdict)
            token._ports = ports
            key = (token._local, token._peer, ports, verdict)
            token._channel = self._interned.setdefault(key, token)
            if token._channel is token:
                token._channel = None
        self.settled(token)
        return True

    def close(self) -> None:
        """Fix every pending token as UNKNOWN. Other tokens stay readable."""
        self._closed = True
        self.settle_all()

    def _pend(self, evidence: Evidence, now: float) -> PToken:
        self.mirror.await_spi(evidence.spi)
        key = (evidence, self.mirror.resyncs)
        token = self._interned.get(key)
        if token is not None and token._pending is not None and now <= token._pending.deadline:
            return token
        if len(self._waiting) >= PENDING_LIMIT:
            return self._intern(
                evidence, _Verdict(Assurance.UNKNOWN, _UNKNOWN, "too many tokens wait for their SA")
            )
        token = _make(
            self,
            evidence.local,
            evidence.peer,
            None,
            _MISSING,
            _Pending(evidence, now + PENDING_SECONDS, self.mirror.resyncs),
        )
        self._interned[key] = token
        self._waiting.add(token)
        return token

    def _intern(self, evidence: Evidence, verdict: _Verdict) -> PToken:
        ports = self._ports(evidence, verdict)
        key = (evidence.local, evidence.peer, ports, verdict)
        token = self._interned.get(key)
        if token is None:
            token = _make(self, evidence.local, evidence.peer, ports, verdict)
            self._interned[key] = token
        return token

    def _ports(self, evidence: Evidence, verdict: _Verdict) -> tuple[int, int, int] | None:
        return None

    # The truth table

    def _judge(self, evidence: Evidence, now: float) -> _Verdict:
        if evidence.doubt:
            return _unknown(evidence.doubt)
        if self._closed:
            return _unknown("the backend is closed")
        if not self.mirror.synced:
            return _unknown("events were lost; the tables are being read again")
        if not evidence.generation:
            return self._infer(evidence, now)
        if evidence.generation != self.generation:
            return _unknown("the stamp was lost or restored meanwhile")
        if evidence.mark is None:
            return _unknown("the mark was not read")
        if evidence.mark:
            return self._by_spi(evidence)
        if self.opaque_interfaces:
            return _unknown("an xfrm interface may have hidden the security path")
        return _NOTHING

    def _by_spi(self, evidence: Evidence) -> _Verdict:
        mirror, spi = self.mirror, evidence.spi
        living = [r for r in mirror.living(spi) if fits(r.sa, evidence)]
        buried = [r for r in mirror.buried(spi) if fits(r.sa, evidence)]
        if not living:
            keys = {r.sa.key for r in buried} or {
                SAKey(evidence.local, proto, spi) for proto in _PROTECTING
            }
            answers = [self.lookup_missing(key) for key in keys]
            living = [r for r in mirror.living(spi) if fits(r.sa, evidence)]
            if not living and not (buried and all(answers)):
                return _MISSING
            buried = [r for r in mirror.buried(spi) if fits(r.sa, evidence)]
        return _Verdict(Assurance.EXACT, _weakest(_derived(r) for r in (*living, *buried)))

    def _infer(self, evidence: Evidence, now: float) -> _Verdict:
        mirror = self.mirror
        mirror.additions_matter = True
        if self.opaque_interfaces:
            return _unknown("it may have come through an xfrm interface")
        if evidence.mark is None and mirror.has_marked_inbound():
            return _unknown("policies or SAs look at marks, and the mark was not read")
        if not evidence.ifindex and mirror.spd.interface_inbound:
            return _unknown("policies look at interfaces, and the interface was not read")
        flow = evidence.flow
        if evidence.mark:
            flow = Flow(
                flow.source,
                flow.destination,
                flow.proto,
                flow.source_port,
                flow.destination_port,
                flow.ifindex,
                evidence.mark,
            )
        ties = mirror.spd.ties(flow, Direction.IN)
        if any(p.action is PolicyAction.BLOCK for group in ties for p in group):
            return _unknown("a policy blocks this traffic")
        # Which of several policies with one number is the first is not certain: all must protect.
        group = next((g for g in ties if all(p.protects for p in g)), None)
        if group is not None:
            if evidence.peer == evidence.local or self.is_own(evidence.peer):
                return _unknown("no policy checks what this host sends to itself")
            if not all(mirror.vouches(p, now) for p in group):
                return _unknown("the policy may be younger than the packet")
            return _Verdict(Assurance.POLICY, _weakest(self._admitted(p, evidence) for p in group))
        if any(p.protects for g in ties for p in g):
            return _unknown("policies of one priority contradict each other")
        if not ties and mirror.defaults.inbound is PolicyAction.BLOCK:
            return _unknown("no policy lets this traffic in")
        if any(_carries(r.sa, evidence) for r in (*mirror.records(), *mirror.tombstones())):
            return _unknown("an SA may have carried it, and no policy demands one")
        return _NOTHING

    def _admitted(self, policy: Policy, evidence: Evidence) -> _Protection:
        result: _Protection | None = None
        for template in policy.templates:
            if template.optional or template.proto not in _PROTECTING:
                continue
            p = self._under(template, evidence)
            result = (
                p
                if result is None
                else _Protection(
                    _stronger(result.privacy, p.privacy),
                    _stronger(result.integrity, p.integrity),
                    None,
                    _stronger(result.tunnel, p.tunnel),
                    _stronger(result.ipoptions, p.ipoptions),
                    result.groups + p.groups,
                )
            )
        return (result or _UNKNOWN)._replace(policy=_name(policy))

    def _under(self, template: Template, evidence: Evidence) -> _Protection:
        records = (
            self.mirror.between(template.source, template.destination)
            if template.mode in _TUNNELS and any(template.source) and any(template.destination)
            else self.mirror.records()
            if template.mode in _TUNNELS
            else self._transport(evidence)
        )
        result = _weakest(
            _derived(r) for r in records if _carries(r.sa, evidence) and _meets(r.sa, template)
        )
        return (
            result
            if result is not _UNKNOWN
            else _UNKNOWN._replace(tunnel=template.mode in _TUNNELS)
        )

    def _transport(self, evidence: Evidence) -> Iterable[Record]:
        yield from self.mirror.between(evidence.peer, evidence.local)
        for unspecified in (b"", bytes(len(evidence.peer))):
            yield from self.mirror.between(unspecified, evidence.local)


_NOTHING = _Verdict(Assurance.NONE, _CLEAR)


def _unknown(reason: str) -> _Verdict:
    return _Verdict(Assurance.UNKNOWN, _UNKNOWN, reason)


def _ignore(token: PToken) -> None:
    del token


def _nobody(address: bytes) -> bool:
    del address
    return False


def _cannot_ask(key: SAKey) -> bool:
    del key
    return False


def _derived(record: Record) -> _Protection:
    protection = record.protection
    if not isinstance(protection, _Protection):
        protection = record.protection = _protection(record.sa)
    return protection


def fits(sa: SA, evidence: Evidence) -> bool:
    """Whether an inbound SA may have carried this packet."""
    if sa.larval or sa.direction not in (None, Direction.IN):
        return False
    if sa.mode in _TUNNELS:
        return sa.selector.matches(evidence.flow)
    return sa.destination == evidence.local and (sa.source == evidence.peer or not any(sa.source))


def _carries(sa: SA, evidence: Evidence) -> bool:
    """Whether an SA may have carried this packet, for all that its own mark says."""
    if not fits(sa, evidence):
        return False
    mark = sa.set_mark
    return (
        evidence.mark is None
        or mark is None
        or mark.mask != 0xFFFFFFFF
        or evidence.mark == mark.value
    )


def _meets(sa: SA, template: Template) -> bool:
    """Whether an SA satisfies a template, as ``xfrm_state_ok()`` compares them."""
    return (
        sa.proto == template.proto
        and sa.mode == template.mode
        and template.reqid in (0, sa.reqid)
        and template.spi in (0, sa.spi)
        and (
            sa.mode not in _TUNNELS
            or (
                (not any(template.source) or template.source == sa.source)
                and (not any(template.destination) or template.destination == sa.destination)
            )
        )
    )


def _name(policy: Policy) -> str:
    return f"{policy.selector} priority {policy.priority} index {policy.index}"
