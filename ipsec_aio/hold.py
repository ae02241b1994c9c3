"""What waits for a verdict: bounded queues, one for each peer.

Rules:

* What a peer sent leaves in the order in which it came, or not at all: behind something that
  waits, everything of that peer waits.
* An item waits until ``deadline`` seconds after it came and no longer; then it is late.
* There is room for ``LIMIT`` items and ``LIMIT_BYTES`` bytes in all, and for ``PEER_LIMIT`` items
  of one peer. What finds no room is not taken: what came first is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from enum import Enum
from typing import Generic, NamedTuple, TypeVar

__all__ = ["LIMIT", "LIMIT_BYTES", "PEER_LIMIT", "Hold", "Outcome"]

LIMIT = 4096
"""How many items wait at once."""
LIMIT_BYTES = 8 << 20
"""How many bytes wait at once."""
PEER_LIMIT = 256
"""How many items of one peer wait at once."""

T = TypeVar("T")


class Outcome(Enum):
    """How the waiting of an item ended."""

    ADMITTED = "admitted"
    REFUSED = "refused"
    LATE = "late"


class _Held(NamedTuple, Generic[T]):
    item: T
    size: int
    deadline: float


class Hold(Generic[T]):
    """Queues of items by peer. Times are in seconds, of any clock that never goes back.

    An item waits ``deadline`` seconds at most, from its :meth:`add` on.
    """

    def __init__(
        self,
        deadline: float = 1.0,
        *,
        limit: int = LIMIT,
        limit_bytes: int = LIMIT_BYTES,
        peer_limit: int = PEER_LIMIT,
    ) -> None:
        self._deadline = deadline
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._peer_limit = peer_limit
        self._queues: dict[Hashable, deque[_Held[T]]] = {}
        self._count = self._bytes = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, peer: Hashable) -> bool:
        return peer in self._queues

    def add(self, peer: Hashable, item: T, size: int, now: float) -> bool:
        """Take an item of so many bytes; return False where there is no room for it."""
        queue = self._queues.get(peer)
        if (
            self._count >= self._limit
            or self._bytes + size > self._limit_bytes
            or (queue is not None and len(queue) >= self._peer_limit)
        ):
            return False
        if queue is None:
            queue = self._queues[peer] = deque()
        queue.append(_Held(item, size, now + self._deadline))
        self._count += 1
        self._bytes += size
        return True

    def next_deadline(self) -> float | None:
        """Return when the first item will be late; None where nothing waits."""
        return min((queue[0].deadline for queue in self._queues.values()), default=None)

    def review(self, judge: Callable[[T], bool | None], now: float) -> Iterator[tuple[T, Outcome]]:
        """Yield the items that wait no longer, each peer's in order, and how their waiting ended.

        ``judge(item)`` says whether an item is admitted, None where that is not known yet. Each
        item has left before it is yielded. While the iterator is in use nothing may be added.
        """
        for peer in list(self._queues):
            queue = self._queues.get(peer)
            while queue:
                held = queue[0]
                answer = judge(held.item)
                if answer is None and now < held.deadline:
                    break
                queue.popleft()
                self._count -= 1
                self._bytes -= held.size
                if not queue:
                    del self._queues[peer]
                yield held.item, _OUTCOMES[answer]

    def clear(self) -> int:
        """Drop everything; return how many items that were."""
        dropped, self._count, self._bytes = self._count, 0, 0
        for queue in self._queues.values():
            queue.clear()
        self._queues.clear()
        return dropped


_OUTCOMES = {True: Outcome.ADMITTED, False: Outcome.REFUSED, None: Outcome.LATE}
