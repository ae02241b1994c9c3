"""Datagrams whose verdict waits for an identity or an SA: held, then delivered in order or refused.

Rules:

* Held is what the requirement cannot decide yet, and behind it all that its sender's host sends.
  What is refused for good is not held.
* It is looked at again whenever the backend's epoch moves, and when the first deadline passes.
  What is delivered then carries the token that was settled, the channel's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextvars import Context
from typing import TYPE_CHECKING, Any, NamedTuple

from ipsec_aio.hold import Hold, Outcome

if TYPE_CHECKING:
    from ipsec_aio.tokens import PToken

    from .witness import Verdict, Witness

__all__ = ["Released", "Waiting"]


class Released(NamedTuple):
    """A datagram that waits no longer. ``late``: because it waited long enough."""

    data: bytes
    addr: Any
    verdict: Verdict
    late: bool


class Waiting:
    """The datagrams of one endpoint that wait; falsy while there are none.

    ``wake()`` is called soon after something may have changed: then :meth:`release` is due.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        witness: Witness,
        deadline: float,
        wake: Callable[[], None],
        context: Context,
    ) -> None:
        self._loop = loop
        self._witness = witness
        self._wake = wake
        self._context = context
        self._hold: Hold[tuple[bytes, Any, Verdict]] = Hold(deadline)
        self._deadline = deadline
        self._timer: asyncio.TimerHandle | None = None
        self._unsubscribe: Callable[[], None] | None = None

    def __len__(self) -> int:
        return len(self._hold)

    def must_wait(self, addr: Any, verdict: Verdict) -> bool:
        """Whether a datagram may neither be delivered nor refused now."""
        return verdict.waits or (verdict.error is None and _host(addr) in self._hold)

    def add(self, data: bytes, addr: Any, verdict: Verdict) -> bool:
        """Hold a datagram; return False where there is no room, or nothing to wait for."""
        if not self._deadline:
            return False
        now = self._loop.time()
        if not self._hold.add(_host(addr), (data, addr, verdict), len(data), now):
            return False
        self._watch()
        return True

    def release(self) -> Iterator[Released]:
        """Yield what waits no longer, each host's in order, with the verdict that it now has.

        May be left at any time: what was not yielded waits on.
        """
        fresh: dict[PToken, Verdict] = {}
        again = self._witness.again

        def judge(item: tuple[bytes, Any, Verdict]) -> bool | None:
            verdict = item[2]
            if verdict.error is None:
                return True
            now = fresh.get(verdict.token)
            if now is None:
                now = fresh[verdict.token] = again(verdict)
            return None if now.waits else now.error is None

        try:
            for (data, addr, verdict), outcome in self._hold.review(judge, self._loop.time()):
                yield Released(
                    data, addr, fresh.get(verdict.token, verdict), outcome is Outcome.LATE
                )
        finally:
            self._watch()

    def close(self) -> int:
        """Drop what waits; return how many datagrams that were. Idempotent."""
        dropped = self._hold.clear()
        self._watch()
        return dropped

    def _watch(self) -> None:
        """Listen and set the clock while something waits, and only then."""
        deadline = self._hold.next_deadline()
        if deadline is None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._unsubscribe is not None:
                self._unsubscribe()
                self._unsubscribe = None
            return
        if self._timer is None:
            # The first deadline only ever becomes a later one.
            self._timer = self._loop.call_at(deadline, self._passed, context=self._context)
        if self._unsubscribe is None:
            self._unsubscribe = self._witness.subscribe(self._changed)

    def _passed(self) -> None:
        self._timer = None
        self._wake()

    def _changed(self) -> None:
        self._loop.call_soon(self._wake, context=self._context)


def _host(addr: Any) -> Any:
    return addr[0]
