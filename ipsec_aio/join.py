"""Whose SA an SA is: the kernel's SAs joined with what charon says of its children.

Rules:

* An SA is found by its addresses, protocol, SPI and mode; where several have those, by mark and
  interface id as well. charon does not see its SAs go, and keeps their numbers: only source and
  mode tell its SA from one that another key manager made since.
* An SPI may be used again. What charon said counts for an SA that was there when it said so, and
  for a removed one only while no other SA has its number. An event may have been raised some time
  before it was read: where another SA had the number shortly before, only what was asked for
  counts. Once known, an SA's identities are kept with it, whatever becomes of charon.
* charon reports an SA some time after the kernel has it. Until ``PENDING_SECONDS`` after it came
  its identities are awaited; unless charon, asked when the SA had been there for
  ``LISTED_SECONDS``, did not list it: then it is none of charon's.
* A reqid counts only for such an SA, and only if all children of that reqid belong to one IKE SA
  between the SA's own addresses that came up before it: what a charon that died has left behind is
  nobody's. Then it is the kernel's policies that take the one for the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf
from typing import TYPE_CHECKING, Final

from .enums import Direction
from .identities import UNIDENTIFIED, Answer, Awaited, Identities, agreed
from .protection import PROTECTING
from .tokens import PENDING_SECONDS

if TYPE_CHECKING:
    from .ike import IKESA, ChildSA, IKETable, Negotiated
    from .mirror import Mirror
    from .sa import SA
    from .sad import Record

__all__ = ["LISTED_SECONDS", "Join"]

LISTED_SECONDS: Final = 0.5
"""How soon after the kernel has an SA of charon's, charon lists it."""
_DOUBTED: Final = 4096


class Join:
    """Answers who is at the ends of an SA.

    ``ends`` tells those of an IKE SA, None while that is being found out. ``doubtful`` gathers the
    unique ids of IKE SAs of which only an event tells what must be asked for: list them again.
    ``wanting`` is set where everything listed a while from now would tell more.
    """

    def __init__(
        self, mirror: Mirror, table: IKETable, ends: Callable[[IKESA], Identities | None]
    ) -> None:
        self.mirror = mirror
        self.table = table
        self._ends = ends
        self.doubtful: set[int] = set()
        self.wanting = False
        # By child, which word of charon was doubted: each is asked about once.
        self._doubted: dict[int, float] = {}

    def identities_of(self, record: Record, now: float) -> Answer:
        """Return who is at the ends of an SA, or until when that may come to be known."""
        sa = record.sa
        if sa.proto not in PROTECTING or sa.direction is Direction.OUT:
            return UNIDENTIFIED
        until = record.added + PENDING_SECONDS
        found = self._children(record)
        answer = self._agreed((each.ike for each in found), until)
        if isinstance(answer, Identities) and answer != UNIDENTIFIED:
            record.identities = answer
        elif record.identities is not None:
            return record.identities
        elif not found:
            foreign = self._is_foreign(record)
            answer = self._agreed(self._by_reqid(record), until) if foreign else Awaited(until)
        if isinstance(answer, Awaited) and now > until:
            return UNIDENTIFIED
        return answer

    def keyed_by_hand(self, record: Record) -> bool:
        """Whether an SA is none of charon's, not even by its reqid."""
        return self._is_foreign(record) and not self.table.peers_of_reqid(record.sa.reqid)

    def of_number(self, sa: SA) -> tuple[int, ...]:
        """Return the unique ids of the IKE SAs that had an SA of this name: what charon said of
        them does not count for one that came just now, until it says so again.
        """
        found = self.table.find(sa.destination, sa.proto, sa.spi)
        return tuple(dict.fromkeys(each.ike.unique_id for each in found))

    def _agreed(self, ikes: Iterable[IKESA], until: float) -> Answer:
        return agreed(
            Awaited(until) if (ends := self._ends(ike)) is None else ends
            for ike in {ike.key: ike for ike in ikes}.values()
        )

    def _children(self, record: Record) -> list[Negotiated]:
        """Return the children that the SA is of: one, unless charon contradicts itself."""
        sa = record.sa
        found = [
            each
            for each in self.table.find(sa.destination, sa.proto, sa.spi)
            if self.table.told(each.child) >= record.added and _is_alike(sa, each)
        ]
        if not record.alone:
            asked = [each for each in found if self.table.asked(each.child) >= record.added]
            for each in found:
                if each not in asked:
                    self._doubt(each)
            found = asked
        if not found:
            return found
        others = [
            other
            for index in (self.mirror.sad, self.mirror.graveyard)
            for other in index.numbered(sa.spi)
            if other is not record and other.sa.key[:3] == sa.key[:3]
        ]
        if record.buried != inf and others:
            return []
        if len(found) > 1 or any(other.buried == inf for other in others):
            return [each for each in found if _marked_alike(sa, each.child)]
        return found

    def _doubt(self, told: Negotiated) -> None:
        when, number = self.table.told(told.child), told.child.unique_id
        if self._doubted.get(number) != when:
            if len(self._doubted) >= _DOUBTED:
                self._doubted.clear()
            self._doubted[number] = when
            self.doubtful.add(told.ike.unique_id)

    def _is_foreign(self, record: Record) -> bool:
        """Whether charon listed what it has when the SA had been there for a while, but not it."""
        sa = record.sa
        if record.buried != inf or self.table.find(sa.destination, sa.proto, sa.spi):
            return False
        if self.table.synced and self.table.listed >= record.added + LISTED_SECONDS:
            return True
        self.wanting = True
        return False

    def _by_reqid(self, record: Record) -> tuple[IKESA, ...]:
        """Return the IKE SA that a foreign SA belongs to by its reqid."""
        sa = record.sa
        if not sa.reqid:
            return ()
        keys = self.table.peers_of_reqid(sa.reqid)
        if len(keys) != 1:
            return ()
        (ike,) = (ike for ike in self.table.parents() if ike.key in keys)
        came = self.table.came(ike.key)
        if came is None or came > record.added:
            return ()
        between = (ike.remote_host, ike.local_host) == (sa.source, sa.destination)
        alike = any(
            (child.reqid, child.proto, child.mode) == (sa.reqid, sa.proto, sa.mode)
            and _marked_alike(sa, child)
            for child in self.table.children(ike)
        )
        return (ike,) if between and alike else ()


def _is_alike(sa: SA, told: Negotiated) -> bool:
    return sa.source == told.ike.remote_host and told.child.mode in (None, sa.mode)


def _marked_alike(sa: SA, child: ChildSA) -> bool:
    return (sa.mark, sa.if_id) == (child.mark_in, child.if_id_in)
