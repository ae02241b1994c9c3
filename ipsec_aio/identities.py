"""Who is at the two ends of an SA, and what that says of a packet that several may have carried.

Rules:

* Identities belong to an SA, never to its group: two peers may have SAs that look alike.
* Who asks says whether the SA leads in or out: kernels before 6.10 do not tell, and between two
  addresses of one host it does both.
* Where several SAs may have carried a packet, an end is known only if all of them agree.
* What may yet come to be known is awaited until a moment that was fixed when the SA came. From
  then on it counts as not known.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from .enums import Direction

if TYPE_CHECKING:
    from typing import TypeAlias

    from .identity import IToken
    from .sad import Record

__all__ = ["UNIDENTIFIED", "Answer", "Awaited", "Identify", "Identities", "agreed"]


class Identities(NamedTuple):
    """The identities of both ends, None where not known."""

    local: IToken | None = None
    peer: IToken | None = None


class Awaited(NamedTuple):
    """Identities may come to be known until this moment, in monotonic seconds."""

    until: float


UNIDENTIFIED: Final = Identities()
"""Nobody is known."""

Answer: TypeAlias = "Identities | Awaited"
"""What is known of an SA's ends, for good or for now."""


class Identify(Protocol):
    """Tells who is at the ends of an SA that leads in, or out, at a time."""

    def __call__(
        self, record: Record, now: float, direction: Direction = Direction.IN, /
    ) -> Answer: ...


def agreed(answers: Iterable[Answer]) -> Answer:
    """Return what holds whichever SA it was, given what is known of each."""
    known: Identities | None = None
    until: float | None = None
    for answer in answers:
        if isinstance(answer, Awaited):
            until = answer.until if until is None else min(until, answer.until)
        elif known is None:
            known = answer
        else:
            known = Identities(
                known.local if known.local == answer.local else None,
                known.peer if known.peer == answer.peer else None,
            )
    if until is None or known == UNIDENTIFIED:
        return UNIDENTIFIED if known is None else known
    return Awaited(until)
