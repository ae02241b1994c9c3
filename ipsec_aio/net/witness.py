"""What the datagrams of one socket are worth: from raw evidence to a token and a verdict.

Rules:

* Per wake-up: receive, :meth:`Witness.look`, then judge each datagram, then deliver. ``look``
  drains the backend, so that a token knows at least what the kernel had told when the datagram
  was received.
* A stamp covers a datagram only if it was verified before the datagram arrived, and the policies
  judge one only as they were then. What may have waited in the receive queue since before either
  changed is in doubt, until the queue was seen empty once, which is looked for at once
  (:meth:`Witness.watch`) and then after each receiving. So is what waits after a long pause.
* A verdict is kept by its raw evidence (sender and control messages) as long as the backend's
  epoch and the stamp stay as they are. Kept are at most ``PROTECTED_LIMIT`` protected peers,
  ``CACHE_LIMIT`` clear ones, and as many that are UNKNOWN or refused: none of these kinds pushes
  out another, whatever sources are spoofed.
* Where a policy of the socket's own stands in for the SPD, the SPD is asked here, too.
* A backend that is closed under a running endpoint makes everything UNKNOWN; nothing raises.
"""

# Its peer's address is a token's own.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ipsec_aio.enums import Assurance
from ipsec_aio.errors import BackendError, ProtectionError
from ipsec_aio.evidence import IPPROTO_UDP, NEVER, Evidence
from ipsec_aio.flow import pack_address
from ipsec_aio.kernel.sockopts import (
    is_readable,
    netns_cookie,
    protocol_of,
    receive_fragment_sizes,
    receive_marks,
    receive_packet_info,
)
from ipsec_aio.wire.cmsg import ControlMessage, parse

from .batch import address
from .pinning import Pinning, source_of

if TYPE_CHECKING:
    from ipsec_aio.backends.contract import Backend, Registration
    from ipsec_aio.require import Require
    from ipsec_aio.tokens import PToken

    from .batch import Odd
    from .enforce import Enforcement

__all__ = ["CACHE_LIMIT", "PROTECTED_LIMIT", "Entry", "Judged", "Verdict", "Witness", "runs_udp"]

_T = TypeVar("_T")

CACHE_LIMIT = 16384
PROTECTED_LIMIT = 131072

_IP_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_WILDCARDS = (bytes(4), bytes(16))
# A plain number: the enumeration's operators are slow.
_TRUNCATED = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)


def runs_udp(sock: socket.socket) -> bool:
    """Whether the kernel runs UDP over IP on this socket: not UDP-Lite, ICMP or AF_UNIX."""
    return _runs_ip(sock) and protocol_of(sock) == IPPROTO_UDP


def _runs_ip(sock: socket.socket) -> bool:
    # asyncio also takes what only passes for a socket, such as a test's; no kernel answers there.
    real = issubclass(type(sock), socket.socket)  # pyright: ignore[reportUnnecessaryIsInstance]
    return real and sock.family in _IP_FAMILIES


class Verdict:
    """A token, and what the endpoint's requirement says of it (None: welcome).

    ``waits``: it is not welcome yet, and that may change when the token is settled.
    """

    __slots__ = ("error", "protected", "token", "unknown", "waits")

    def __init__(
        self, token: PToken, error: ProtectionError | None, *, waits: bool = False
    ) -> None:
        self.token = token
        self.error = error
        self.waits = waits
        self.protected = token.protected
        self.unknown = token.assurance is Assurance.UNKNOWN


Entry = tuple[Any, "PToken"]
"""A sender's address, and the token of its datagrams, which are welcome."""
Judged = tuple[Any, Verdict]
"""A sender's address, and the verdict on a datagram of it."""


class Witness:
    """Judges the datagrams of one socket, which is bound, connected or will be bound later.

    ``registration`` is None where the backend covers no port of it. ``covered`` is the stamp's
    generation as read before the socket was bound; None where it was registered later. ``after``
    is the backend's ``policies`` as read before that, NEVER where it was not.
    """

    def __init__(
        self,
        sock: socket.socket,
        backend: Backend,
        registration: Registration | None = None,
        require: Require | None = None,
        *,
        covered: int | None = None,
        after: int = NEVER,
        enforcement: Enforcement | None = None,
    ) -> None:
        self._sock = sock
        self._backend = backend
        self._registration = registration
        self._require = require
        self._enforcement = enforcement
        self._pinning = Pinning(backend, enforcement)
        self._ip = _runs_ip(sock)
        self._family = sock.family
        # Welcome: protected, or known not to be. And all the others.
        self._protected: dict[object, Entry] = {}
        self._clear: dict[object, Entry] = {}
        self._others: dict[object, Judged] = {}
        self.find_protected: Callable[[object], Entry | None] = self._protected.get
        self.find_clear: Callable[[object], Entry | None] = self._clear.get
        # The epoch that was last looked at, and the version of the enforcement.
        self._epoch = -1
        self._version = 0
        # Whether nothing but these two can change what is concluded: no system call is due.
        self._settled = False
        self._state: object = None
        self._gap = False
        # Whether what is in the queue may have waited for long, and whether what is judged may.
        self._waits = self._late = False
        self._unsubscribe: Callable[[], None] = _nothing
        self._configured: int | None = None
        self._readable = self._expects_mark = self._tells_fragments = False
        self._local = b""
        self._port = 0
        self._doubt = self._unfitness()
        self._tells_whole = enforcement is not None and self._ip and receive_fragment_sizes(sock)
        self._when_closed = self._check(backend.resolve(_unknown("the backend is closed")))
        self._locate()
        self._generation = self._stamp()
        self._covered = covered or 0
        # What evidence is after: as of now, and as it was when what is judged was received.
        self._emptied: int = after
        self._after: int = after
        if covered is None or after == NEVER:
            self._cover()

    def watch(self) -> None:
        """Follow stamp and policies also while nothing arrives. Call on the loop; ends with
        close().
        """
        if not self._doubt:
            self._unsubscribe = self._backend.subscribe(self._cover)

    def close(self) -> None:
        """Stop watching and give the port back. Idempotent."""
        self._unsubscribe()
        if self._enforcement is not None:
            self._enforcement.close()
        if self._registration is not None:
            self._registration.close()

    def doubt_queue(self) -> None:
        """Nobody knows any more how long what is in the receive queue has waited."""
        self._waits = True
        self._settled = False
        self._cover()

    def _cover(self) -> None:
        now = self._stamp(), self._backend.policies
        # In this order: what arrives after the queue was seen empty arrived after both.
        if (
            (self._waits or now != (self._covered, self._emptied))
            and not self._doubt
            and not is_readable(self._sock)
        ):
            self._covered, self._emptied = now
            self._waits = False

    def look(self) -> None:
        """Take in what the backend knows by now: after receiving, before judging."""
        backend = self._backend
        try:
            backend.drain()
            epoch = backend.epoch
        except BackendError:
            epoch = -1
        enforcement = self._enforcement
        if (
            epoch != self._epoch
            or not self._settled
            or (enforcement is not None and enforcement.version != self._version)
        ):
            self._look_closely(epoch)

    def _look_closely(self, epoch: int) -> None:
        generation, covered = self._stamp(), self._covered
        policies, emptied, waits = self._backend.policies, self._emptied, self._waits
        version = 0 if self._enforcement is None else self._enforcement.version
        state = epoch, version, generation, covered, emptied, waits
        if state != self._state:
            self._state = state
            self._epoch, self._version = epoch, version
            self._generation = generation
            self._after = emptied
            # A stamp that is lost and restored has another generation: nothing was in between.
            self._gap = generation not in (0, covered)
            self._late = waits
            self._forget()
        covers = generation == covered and policies == emptied and not waits
        if not covers:
            self._cover()
        if not self._port:
            self._locate()
        self._settled = bool(self._doubt) or (covers and self._port > 0)

    def welcome(self, evidence: Sequence[bytes]) -> tuple[list[Entry], int] | None:
        """Return sender and token of datagrams that a :class:`~.batch.Batch` has received.

        The number says how many are protected. None where one of them is not known to be welcome,
        so that each has to be judged. ``find_protected`` and ``find_clear`` do the same for one
        datagram, by its address and control messages in one tuple.
        """
        found = list(map(self.find_protected, evidence))
        if all(found):
            return cast("list[Entry]", found), len(found)
        if not self._clear:
            return None
        protected = len(found) - found.count(None)
        found = [
            entry or self.find_clear(beside) for entry, beside in zip(found, evidence, strict=True)
        ]
        return (cast("list[Entry]", found), protected) if all(found) else None

    def judge(self, addr: Any, ancillary: Sequence[ControlMessage], flags: int) -> Verdict:
        """Return the verdict on one datagram, described as ``recvmsg`` does."""
        if flags & _TRUNCATED:
            return self._verdict(self._evidence(addr, ancillary, "truncated"))
        key = (addr, *ancillary)
        judged = self._known(key)
        return (self._learn(key, addr, ancillary) if judged is None else judged)[1]

    def judge_batch(self, evidence: Sequence[bytes], odd: Mapping[int, Odd]) -> list[Judged]:
        """Return sender and verdict of datagrams that a :class:`~.batch.Batch` has received."""
        return [
            self._judge_odd(odd[index]) if index in odd else self._judge_raw(beside)
            for index, beside in enumerate(evidence)
        ]

    def _judge_odd(self, odd: Odd) -> Judged:
        if odd.flags & _TRUNCATED:
            addr, ancillary = address(self._family, odd.evidence)
            return addr, self._verdict(self._evidence(addr, ancillary, "truncated"))
        return self._judge_raw(odd.evidence)

    def _judge_raw(self, beside: bytes) -> Judged:
        return self._known(beside) or self._learn(beside, *address(self._family, beside))

    def _known(self, key: object) -> Judged | None:
        entry = self.find_protected(key) or self.find_clear(key)
        if entry is None:
            return self._others.get(key)
        addr, token = entry
        return addr, Verdict(token, None)

    def _learn(self, key: object, addr: Any, ancillary: Sequence[ControlMessage]) -> Judged:
        evidence = self._evidence(addr, ancillary)
        verdict = self._verdict(evidence)
        if verdict is self._when_closed:
            return addr, verdict
        if self._ip and addr[0] == verdict.token._peer:
            # One text for all that is kept of a peer.
            addr = verdict.token._peer, *addr[1:]
            key = key if isinstance(key, bytes) else (addr, *ancillary)
        if verdict.unknown or verdict.error is not None:
            _keep(self._others, CACHE_LIMIT, key, (addr, verdict))
        elif verdict.protected:
            _keep(self._protected, PROTECTED_LIMIT, key, (addr, verdict.token))
        elif not evidence.generation or self._backend.ignores_ports(evidence):
            # What came unstamped though an SA may have carried it is asked about each time.
            _keep(self._clear, CACHE_LIMIT, key, (addr, verdict.token))
        return addr, verdict

    def _forget(self) -> None:
        self._protected.clear()
        self._clear.clear()
        self._others.clear()

    def again(self, verdict: Verdict) -> Verdict:
        """Return what a verdict that waited is by now, with the channel's token."""
        return self._check(verdict.token.channel)

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have ``callback()`` called soon after the backend's epoch changed.

        Returns a function that ends it. Raises BackendError where the backend is closed.
        """
        return self._backend.subscribe(callback)

    def token_of(self, addr: Any) -> PToken:
        """Return the token of what a connected peer sends at this moment: POLICY at most."""
        if not self._ip:
            return self._verdict(_unknown(self._doubt)).token
        peer = pack_address(addr[0])
        evidence = Evidence(
            IPPROTO_UDP,
            self._local,
            self._port,
            peer,
            addr[1],
            doubt=self._doubt,
            after=self._backend.policies,
        )
        return self._verdict(self._enforced(evidence)).token

    def pinned(self, token: PToken, addr: Any) -> ProtectionError | None:
        """Say why a datagram to this address would not be protected as the token says."""
        doubt = self._doubt
        if doubt:
            return ProtectionError("ptoken", doubt)
        if not self._port:
            self._locate()
        return self._pinning.objection(token, self._local, self._port, addr)

    def source_of(self, token: PToken) -> list[ControlMessage]:
        """Return the control messages that have a datagram sent from the token's address.

        There are none where the socket has an address of its own.
        """
        if self._local:
            return []
        return source_of(token, ipv6=self._family == socket.AF_INET6)

    @property
    def pinning(self) -> str:
        """``"kernel"`` where it lets nothing out in the clear, else ``"user"``."""
        return "kernel" if self.outbound else "user"

    @property
    def outbound(self) -> bool:
        """Whether the socket has an outbound policy of its own."""
        return self._enforcement is not None and self._enforcement.outbound is not None

    @property
    def enforced(self) -> str:
        """``"kernel"`` or ``"user"``: where the requirement is enforced."""
        return "user" if self._enforcement is None else self._enforcement.place

    def _unfitness(self) -> str:
        """Why evidence of this socket can never mean anything; nearly always empty."""
        if not self._ip:
            return "not an IP socket"
        if not runs_udp(self._sock):
            return "not a UDP socket"
        try:
            cookie = self._backend.netns_cookie
        except BackendError:
            return ""
        if cookie is not None and cookie != netns_cookie(self._sock):
            return "the socket is in another network namespace"
        return ""

    def _locate(self) -> None:
        """Note the local address; ask for it with each datagram where the socket has none."""
        if not self._ip:
            return
        try:
            host, self._port = self._sock.getsockname()[:2]
        except OSError:
            return
        address = pack_address(host)
        self._local = b"" if address in _WILDCARDS else address
        if not self._local:
            receive_packet_info(self._sock)

    def _stamp(self) -> int:
        """The generation of the stamp, 0 where there is none or its marks cannot be read."""
        registration = self._registration
        if registration is None:
            return 0
        generation = registration.generation
        if generation != self._configured:
            self._configured = generation
            sock = self._sock
            keeps = registration.keeps_fragments
            self._tells_fragments = keeps and receive_fragment_sizes(sock)
            self._expects_mark = registration.reads_marks
            self._readable = self._tells_fragments == keeps and (
                not self._expects_mark or receive_marks(sock)
            )
        return generation if self._readable else 0

    def _evidence(
        self, addr: Any, ancillary: Sequence[ControlMessage], doubt: str = ""
    ) -> Evidence:
        if not self._ip:
            return _unknown(self._doubt)
        told = parse(ancillary)
        local = self._local or told.local
        stamp = self._generation
        doubt = doubt or self._doubt or told.doubt
        if not doubt:
            if not local:
                doubt = "the local address is not known"
            elif self._late:
                doubt = "it may have waited for so long that its SA is forgotten"
            elif stamp and self._gap:
                doubt = "it may have arrived before the stamp was in place"
            elif stamp and self._expects_mark and told.mark is None:
                doubt = "no mark came with it"
            elif told.reassembled and self._tells_fragments:
                doubt = "reassembled from fragments"
        evidence = Evidence(
            IPPROTO_UDP,
            local,
            self._port,
            pack_address(addr[0]),
            addr[1],
            told.mark,
            stamp,
            doubt,
            after=self._after,
        )
        return self._enforced(evidence, whole=self._tells_whole and not told.reassembled)

    def _enforced(self, evidence: Evidence, *, whole: bool = False) -> Evidence:
        enforcement = self._enforcement
        if enforcement is None or evidence.doubt:
            return evidence
        evidence = replace(evidence, enforced=enforcement.template)
        return replace(evidence, doubt=enforcement.objection(evidence, whole=whole))

    def _verdict(self, evidence: Evidence) -> Verdict:
        try:
            token = self._backend.resolve(evidence)
        except BackendError:
            return self._when_closed
        return self._check(token)

    def _check(self, token: PToken) -> Verdict:
        require = self._require
        if require is None:
            return Verdict(token, None)
        pending = token.pending
        error = require.check(token)
        waits = pending and error is not None and require.decide(token) is None
        return Verdict(token, error, waits=waits)


def _keep(cache: dict[object, _T], limit: int, key: object, value: _T) -> None:
    if len(cache) >= limit:
        cache.clear()
    cache[key] = value


def _nothing() -> None:
    pass


def _unknown(doubt: str) -> Evidence:
    return Evidence(IPPROTO_UDP, b"", 0, b"", 0, doubt=doubt)
