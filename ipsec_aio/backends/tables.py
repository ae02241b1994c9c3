"""What backends with tables share: mirror, resolver, clock, epoch, subscribers, timers."""

from __future__ import annotations

import asyncio
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import suppress
from contextvars import Context
from typing import TYPE_CHECKING

from ipsec_aio import enforcement, outbound
from ipsec_aio.enums import Direction
from ipsec_aio.errors import BackendUnavailable, ProtectionError
from ipsec_aio.identities import UNIDENTIFIED
from ipsec_aio.mirror import Mirror
from ipsec_aio.outlook import survey
from ipsec_aio.tokens import PToken, Resolver

from .contract import Backend

if TYPE_CHECKING:
    from ipsec_aio.enforcement import Bundle
    from ipsec_aio.events import Event
    from ipsec_aio.evidence import Evidence
    from ipsec_aio.flow import Flow
    from ipsec_aio.identities import Answer
    from ipsec_aio.latch import Outlook
    from ipsec_aio.sa import SAKey
    from ipsec_aio.sad import Record

    from .static import StaticIdentities

__all__ = ["TableBackend"]

_TEMPLATES_KEPT = 1024


class _Subscriber:
    """A callback, the loop on which it is called, and whether that is about to happen."""

    __slots__ = ("callback", "due", "loop")

    def __init__(self, callback: Callable[[], None], loop: asyncio.AbstractEventLoop) -> None:
        self.callback: Callable[[], None] | None = callback
        self.loop = loop
        self.due = False

    def run(self) -> None:
        due, self.due = self.due, False
        if due and self.callback is not None:
            self.callback()


class TableBackend(Backend):
    """A backend whose facts are a mirror.

    A subclass brings the facts: it calls :meth:`take` with live events, or changes ``mirror``
    itself (a resync) and then calls :meth:`changed`. It overrides :meth:`lookup_missing`, and may
    override :meth:`drain` and :meth:`identities_of`. After :meth:`bind_loop` it belongs to the
    running loop.

    Tokens may be read in any thread, and ask mirror and resolver then: whoever changes either holds
    ``_lock``, as the methods here do. It may be taken again by its holder, and nobody is called
    back under it.
    """

    name = "tables"

    def __init__(
        self, *, trust_policy: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.trust_policy = trust_policy
        self.clock = clock
        self.mirror = Mirror()
        self._lock = threading.RLock()
        self.resolver = Resolver(self.mirror, clock, trust_policy=trust_policy)
        self.resolver.lock = self._lock
        self.resolver.lookup_missing = self.lookup_missing
        self.resolver.identify = self._identify
        self._static: StaticIdentities | None = None
        self.resolver.wait = self._wait
        self.resolver.settled = self._settled
        self.loop: asyncio.AbstractEventLoop | None = None
        self.closed = False
        self._thread = 0
        self._seen = self.mirror.epoch
        self._subscribers: dict[_Subscriber, None] = {}
        self._waiters: dict[PToken, list[asyncio.Future[None]]] = {}
        self._timer: tuple[asyncio.AbstractEventLoop, float, asyncio.TimerHandle] | None = None
        self._templates: dict[object, tuple[Bundle, ...]] = {}
        self._templates_of: object = None

    # For subclasses

    def bind_loop(self) -> None:
        """Belong to the running loop from now on."""
        self.loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()

    def check(self) -> None:
        """Raise BackendUnavailable when closed, forked, or in another loop's thread."""
        if self.closed:
            raise BackendUnavailable(f"the {self.name} backend is closed")
        if self.resolver.stale:
            raise BackendUnavailable(f"the {self.name} backend belongs to the parent process")
        if self.loop is not None and self._thread != threading.get_ident():
            raise BackendUnavailable(f"the {self.name} backend belongs to another loop's thread")

    def check_loop(self) -> None:
        """Like :meth:`check`, and demand the loop that opened the backend."""
        self.check()
        if self.loop is not None and self.loop is not asyncio.get_running_loop():
            raise BackendUnavailable(f"the {self.name} backend belongs to another loop")

    def take(self, events: Iterable[Event]) -> None:
        """Take in live events."""
        with self._lock:
            now = self.clock()
            for event in events:
                self.mirror.apply(event, now)
            self.changed()

    def changed(self) -> None:
        """Let everybody know who must, after the mirror or the resolver was changed."""
        with self._lock:
            if self.mirror.epoch != self._seen:
                self.resolver.settle_all()
                self._seen = self.mirror.epoch
                for subscriber in list(self._subscribers):
                    self._call(subscriber)
            self._arm()

    def tell(self) -> None:
        """Call back now who would be soon: for what the loop itself calls, so that nobody's code
        is interrupted. What is read later in this turn of the loop is judged by the news.
        """
        loop = asyncio.get_running_loop()
        for subscriber in list(self._subscribers):
            if subscriber.loop is loop:
                Context().run(subscriber.run)

    def set_generation(self, generation: int) -> None:
        """Tell the stamp's generation, 0 for none that is verified."""
        with self._lock:
            if generation != self.resolver.generation:
                self.resolver.generation = generation
                self.mirror.bump()
                self.changed()

    def set_opaque_interfaces(self, opaque: bool) -> None:
        """Tell whether interfaces exist that scrub the security path."""
        with self._lock:
            if opaque != self.resolver.opaque_interfaces:
                self.resolver.opaque_interfaces = opaque
                if not opaque:
                    self.resolver.links_until = self.mirror.count_change()
                self.mirror.bump()
                self.changed()

    def identities_of(
        self, record: Record, now: float, direction: Direction = Direction.IN
    ) -> Answer:
        """Return who is at the ends of an SA that leads in, or out, or until when that may come to
        be known.

        Called while a token is resolved or read. Who overrides it sets ``resolver.identified``,
        and calls :meth:`identities_changed` when an answer may have become another.
        """
        del record, now, direction
        return UNIDENTIFIED

    def keyed_by_hand(self, record: Record, direction: Direction = Direction.IN) -> bool:
        """Whether an SA of which :meth:`identities_of` knows nobody is certainly not negotiated."""
        del record, direction
        return True

    def use_identities(self, static: StaticIdentities) -> None:
        """Take these identities for SAs that were keyed by hand."""
        with self._lock:
            self._static = static
            self.resolver.identified = True
            self.identities_changed()

    def identities_changed(self) -> None:
        """Let everybody know that :meth:`identities_of` may answer otherwise."""
        with self._lock:
            self.mirror.bump()
            self.changed()

    @abstractmethod
    def lookup_missing(self, key: SAKey) -> bool:
        """Ask for one SA without waiting; True: the mirror now knows all about this key.

        Called while a token is being resolved: put what is found into ``mirror``, and leave
        :meth:`take` and :meth:`changed` for later.
        """

    def _identify(self, record: Record, now: float, direction: Direction = Direction.IN) -> Answer:
        answer = self.identities_of(record, now, direction)
        static = self._static
        if answer == UNIDENTIFIED and static is not None and self.keyed_by_hand(record, direction):
            return static.find(record.sa, direction)
        return answer

    # The contract

    @property
    def epoch(self) -> int:
        """Changes whenever an earlier answer may no longer hold."""
        return self.mirror.epoch

    def drain(self) -> None:
        """Let time pass in the mirror."""
        mirror = self.mirror
        if mirror.ages or mirror.epoch != self._seen:
            with self._lock:
                mirror.advance(self.clock())
                if mirror.epoch != self._seen:
                    self.changed()

    def resolve(self, evidence: Evidence) -> PToken:
        """Return the token for this evidence."""
        self.check()
        with self._lock:
            token = self.resolver.resolve(evidence)
            if self.mirror.epoch != self._seen:
                self.changed()
            elif self.resolver.is_pending(token):
                self._arm()
        return token

    def ignores_ports(self, evidence: Evidence) -> bool:
        """Whether this evidence is judged alike with other ports."""
        with self._lock:
            return self.resolver.ignores_ports(evidence)

    @property
    def policies(self) -> int:
        """Grows with what packets are judged by as they arrive."""
        return self.mirror.changes

    def templates(
        self,
        protocol: int,
        port: int,
        direction: Direction,
        *,
        local: bytes = b"",
        peer: bytes = b"",
        peer_port: int = 0,
    ) -> tuple[Bundle, ...]:
        """Return the templates of the policies that protect and may govern this traffic."""
        spd = self.mirror.spd
        with self._lock:
            state = spd, spd.edits
            if state != self._templates_of or len(self._templates) >= _TEMPLATES_KEPT:
                self._templates_of = state
                self._templates.clear()
            key = (protocol, port, direction, local, peer, peer_port)
            found = self._templates.get(key)
            if found is None:
                found = self._templates[key] = enforcement.governing(
                    spd, protocol, port, direction, local=local, peer=peer, peer_port=peer_port
                )
            return found

    def objection(self, evidence: Evidence, inbound: Bundle) -> str:
        """Say why the policies would not have let in what a socket's own policy did."""
        with self._lock:
            # One that names an interface would object.
            self.mirror.additions_matter = True
            return enforcement.objection(self.mirror, evidence, inbound)

    def outlook(self, evidence: Evidence) -> Outlook:
        """Return what may protect a connection from now on, by its addresses and ports."""
        self.check()
        with self._lock:
            return survey(self.resolver, evidence)

    def sends_like(self, ptoken: PToken, flow: Flow) -> ProtectionError | None:
        """Return None where an outbound flow would be protected as a token says."""
        with self._lock:
            reason = outbound.objection(self.resolver, ptoken, flow, self.applied(flow))
            return ProtectionError("ptoken", reason) if reason else None

    def applied(self, flow: Flow) -> Iterable[Bundle]:
        """Return what is applied to an outbound flow that no policy names."""
        del flow
        return ()

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have ``callback()`` called on the running loop soon after the epoch changed."""
        self.check_loop()
        subscriber = _Subscriber(callback, asyncio.get_running_loop())
        self._subscribers[subscriber] = None
        self._arm()

        def unsubscribe() -> None:
            subscriber.callback = None
            self._discard(subscriber)

        return unsubscribe

    async def aclose(self) -> None:
        """Stop; tokens stay readable. Idempotent."""
        if self.closed:
            return
        with self._lock:
            self.closed = True
            if self._timer is not None:
                self._timer[2].cancel()
                self._timer = None
            self.resolver.close()
            self.mirror.bump()
            self.changed()
            self._subscribers.clear()

    # Waiting

    def _discard(self, subscriber: _Subscriber) -> None:
        self._subscribers.pop(subscriber, None)

    def _call(self, subscriber: _Subscriber) -> None:
        if subscriber.due:
            return
        if subscriber.loop.is_closed():
            self._discard(subscriber)
            return
        subscriber.due = True
        _call_on(subscriber.loop, subscriber.run)

    async def _wait(self, token: PToken, timeout: float | None) -> None:  # noqa: ASYNC109
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._lock:
            waiters = self._waiters.setdefault(token, [])
            waiters.append(future)
        self._arm()
        try:
            # Another thread may have settled it just now.
            if self.resolver.is_pending(token):
                async with asyncio.timeout(timeout):
                    await future
        finally:
            with self._lock:
                waiters.remove(future)
                if not waiters:
                    del self._waiters[token]

    def _settled(self, token: PToken) -> None:
        # Also where its time was up: who kept that it waits must ask again.
        with self._lock:
            self.mirror.bump()
        for future in list(self._waiters.get(token, ())):
            _call_on(future.get_loop(), _finish, future)

    def _arm(self) -> None:
        """See to it that time passes also when nobody drains."""
        if self.closed or not (self._subscribers or self._waiters):
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        with self._lock:
            ends = (self.mirror.next_deadline(), self.resolver.next_deadline())
            deadline = min((end for end in ends if end is not None), default=None)
            if deadline is None:
                return
            if self._timer is not None:
                timer_loop, when, handle = self._timer
                if timer_loop is loop and when <= deadline:
                    return
                if timer_loop is loop:
                    handle.cancel()
            handle = loop.call_later(max(0.0, deadline - self.clock()) + 0.001, self._tick)
            self._timer = loop, deadline, handle

    def _tick(self) -> None:
        with self._lock:
            self._timer = None
            self.mirror.advance(self.clock())
            self.resolver.settle_all()
            self.changed()


def _call_on(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: object) -> None:
    # It may be another thread's loop, which may be closed at any moment. What is told is not of
    # whoever changed or asked something.
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *args, context=Context())


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
