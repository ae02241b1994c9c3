"""Protection tokens: channels, interned, and fixed once resolved.

Rules:

* A token says what was proved of the packets that it came with, and never changes what it says.
  The exception is a pending one: it waits a moment for an SA that the mirror has not seen yet,
  says UNKNOWN meanwhile, and is fixed by what comes, or as UNKNOWN by its deadline, by a resync,
  or by the end of the backend.
* A token is a channel: local and peer address, what protects them, and how sure that is. Tokens
  are interned weakly: one object for a channel as long as somebody holds it.
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

from .enums import Assurance
from .errors import StaleTokenError, TokenError
from .flow import format_address
from .protection import Group, Verdict, group_of, unknown
from .truth import MISSING, TruthTable

if TYPE_CHECKING:
    from .evidence import Evidence
    from .identity import IToken
    from .mirror import Mirror
    from .sa import SA

__all__ = ["PENDING_LIMIT", "PENDING_SECONDS", "PToken", "Resolver"]

PENDING_SECONDS = 2.0
"""How long a token waits for the SA that its packet was stamped with."""
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
    """What a token waits for."""

    __slots__ = ("deadline", "evidence", "resyncs")

    def __init__(self, evidence: Evidence, deadline: float, resyncs: int) -> None:
        self.evidence = evidence
        self.deadline = deadline
        self.resyncs = resyncs


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
        "_resolver",
        "_verdict",
    )

    _channel: PToken | None
    _local: bytes
    _peer: bytes
    _pending: _Pending | None
    _resolver: Resolver
    _verdict: Verdict

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

    def _now(self) -> Verdict:
        """Return the verdict, which is the only way to read anything."""
        if self._resolver.stale:
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
        verdict = self._now()
        assurance, protection = verdict.assurance, verdict.protection
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
    def local(self) -> IToken | None:
        """The identity of this end; None: not known."""
        self._now()
        return None

    @property
    def peer(self) -> IToken | None:
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
        """Whether the channel still stands: its backend is open and knows a living SA for it.

        A clear channel stands while the backend is open; an unknown one never does.
        """
        verdict = self._now()
        if self._resolver.closed or verdict.assurance is Assurance.UNKNOWN:
            return False
        return verdict.assurance is Assurance.NONE or bool(self.sas)

    @property
    def audit_string(self) -> str:
        """One line for a log: addresses, assurance, protection, the newest SA or the reason."""
        assurance, protection, reason, ports = self._now()
        local, peer = format_address(self._local), format_address(self._peer)
        if ports is not None:
            proto, local_port, peer_port = ports
            local, peer = f"{_end(local, local_port)}", f"{_end(peer, peer_port)} proto={proto}"
        parts = [f"local={local} peer={peer} assurance={assurance.name}"]
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
        assurance, protection, reason, _ = self._now()
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
    waits for that (see :meth:`PToken.resolved`), and ``lock`` where several threads read tokens.
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
        self.lock: AbstractContextManager[object] = nullcontext()
        self._forks = _forks
        self._interned: WeakValueDictionary[tuple[object, ...], PToken] = WeakValueDictionary()
        self._waiting: WeakSet[PToken] = WeakSet()

    @property
    def stale(self) -> bool:
        """Whether this process is a fork of the one that it belongs to."""
        return self._forks != _forks

    def resolve(self, evidence: Evidence) -> PToken:
        """Return the token for this evidence."""
        now = self.clock()
        verdict = self.judge(evidence, now)
        if verdict is MISSING:
            return self._pend(evidence, now)
        return self._intern(evidence.local, evidence.peer, verdict)

    def living(self, groups: Iterable[Group]) -> tuple[SA, ...]:
        """Return the living SAs of some groups, oldest first."""
        with self.lock:
            found = [
                record
                for group in groups
                for record in self.mirror.sad.between(group.source, group.destination)
                if group_of(record.sa) == group
            ]
        # A dump tells all at once, and newest first.
        found.sort(key=lambda record: (record.added, record.sa.usage.add_time))
        return tuple(record.sa for record in found)

    def close(self) -> None:
        """Fix every pending token as UNKNOWN. All tokens stay readable."""
        self.closed = True
        self.settle_all()

    # Pending tokens

    def next_deadline(self) -> float | None:
        """Return when the first pending token has waited long enough."""
        pending = (token._pending for token in self._waiting)
        return min((p.deadline for p in pending if p is not None), default=None)

    def settle_all(self) -> None:
        """Fix the pending tokens that can be fixed by now. Call it when the epoch has changed."""
        for token in list(self._waiting):
            self.settle(token)

    def is_pending(self, token: PToken) -> bool:
        """Whether a token still waits for its SA."""
        return token._pending is not None

    def settle(self, token: PToken) -> None:
        """Fix a pending token if that is possible by now."""
        with self.lock:
            pending = token._pending
            if pending is None:
                return
            verdict = self._settlement(pending)
            if verdict is MISSING:
                # Other changes of the epoch must not make this one go unseen.
                self.mirror.await_spi(pending.evidence.spi)
                return
            self._waiting.discard(token)
            _put(token, "_verdict", verdict)
            _put(token, "_pending", None)
            channel = self._interned.setdefault((token._local, token._peer, verdict), token)
            if channel is not token:
                _put(token, "_channel", channel)
        self.settled(token)

    def _settlement(self, pending: _Pending) -> Verdict:
        if self.closed:
            return unknown("the backend was closed")
        if pending.resyncs != self.mirror.resyncs:
            return unknown("events were lost meanwhile")
        return self.judge_again(pending.evidence, pending.deadline, self.clock())

    def _pend(self, evidence: Evidence, now: float) -> PToken:
        self.mirror.await_spi(evidence.spi)
        key = (evidence, self.mirror.resyncs)
        token = self._interned.get(key)
        if token is not None and token._pending is not None and now <= token._pending.deadline:
            return token
        if len(self._waiting) >= PENDING_LIMIT:
            verdict = unknown("too many tokens wait for their SA")
            return self._intern(evidence.local, evidence.peer, verdict)
        pending = _Pending(evidence, now + PENDING_SECONDS, self.mirror.resyncs)
        token = _make(self, evidence.local, evidence.peer, MISSING, pending)
        self._interned[key] = token
        self._waiting.add(token)
        return token

    def _intern(self, local: bytes, peer: bytes, verdict: Verdict) -> PToken:
        key = (local, peer, verdict)
        token = self._interned.get(key)
        if token is None:
            token = self._interned[key] = _make(self, local, peer, verdict, None)
        return token


def _make(
    resolver: Resolver, local: bytes, peer: bytes, verdict: Verdict, pending: _Pending | None
) -> PToken:
    token = object.__new__(PToken)
    _put(token, "_resolver", resolver)
    _put(token, "_local", local)
    _put(token, "_peer", peer)
    _put(token, "_verdict", verdict)
    _put(token, "_pending", pending)
    _put(token, "_channel", None)
    return token
