"""Whose SA an SA is: the kernel's SAs joined with what charon says of its children.

Rules:

* An SA is found by its addresses, protocol, SPI and mode, in the direction that it is asked for;
  where several have those, and always where it leads out, by mark and interface id as well. charon
  does not see its SAs go, and keeps their numbers: only source and mode tell its SA from one that
  another key manager made since.
* Outbound numbers are the peers' choice. A child that was rekeyed or taken down is still listed
  when its SA that led out is gone: then its number may be another peer's behind the same address,
  and only SAs of living children are named anew.
* An SPI may be used again. What charon said counts for an SA that was there when it said so, and
  for a removed one only while no other SA has its number. An event may have been raised some time
  before it was read: where another SA had the number shortly before, only what was asked for
  counts. Once known, an SA's identities are kept with it, whatever becomes of charon.
* charon reports an SA some time after the kernel has it. Until ``PENDING_SECONDS`` after it came
  its identities are awaited; unless charon, asked when the SA had been there for
  ``LISTED_SECONDS``, did not list it: then it is none of charon's.
* A reqid counts only for such an SA that leads in, and only if all children of that reqid belong to
  one IKE SA between the SA's own addresses that came up before it: what a charon that died has left
  behind is nobody's. Then it is the kernel's policies that take the one for the other.
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
_REMEMBERED: Final = 4096


class Join:
    """Answers who is at the ends of an SA.

    ``ends`` tells those of an IKE SA, None while that is being found out. ``doubtful`` gathers the
    unique ids of IKE SAs of which only an event tells what must be asked for: list them again.
    ``unlisted`` gathers SAs of which everything listed a while from now may tell more: if
    :meth:`wants_listing` then.
    """

    def __init__(
        self, mirror: Mirror, table: IKETable, ends: Callable[[IKESA], Identities | None]
    ) -> None:
        self.mirror = mirror
        self.table = table
        self._ends = ends
        self.doubtful: set[int] = set()
        self.unlisted: dict[Record, Direction] = {}
        # By child, which word of charon was doubted: each is asked about once.
        self._doubted: dict[int, float] = {}

    def identities_of(
        self, record: Record, now: float, direction: Direction = Direction.IN
    ) -> Answer:
        """Return who is at the ends of an SA that leads in, or out, or until when that may come to
        be known.
        """
        sa = record.sa
        if sa.proto not in PROTECTING or sa.direction not in (None, direction):
            return UNIDENTIFIED
        until = record.added + PENDING_SECONDS
        found = self._children(record, direction)
        answer = self._agreed((each.ike for each in found), until)
        leaves = direction is Direction.OUT
        if isinstance(answer, Identities) and answer != UNIDENTIFIED:
            record.identities, record.leaves = answer, leaves
        elif record.identities is not None and record.leaves is leaves:
            return record.identities
        elif not found:
            foreign = self._is_foreign(record, direction)
            parents = () if leaves else self._by_reqid(record)
            answer = self._agreed(parents, until) if foreign else Awaited(until)
        if isinstance(answer, Awaited) and now > until:
            return UNIDENTIFIED
        return answer

    def keyed_by_hand(self, record: Record, direction: Direction = Direction.IN) -> bool:
        """Whether an SA is none of charon's, not even by its reqid."""
        foreign = self._is_foreign(record, direction)
        return foreign and not self.table.peers_of_reqid(record.sa.reqid)

    def of_number(self, sa: SA) -> tuple[int, ...]:
        """Return the unique ids of the IKE SAs that had an SA of this name: what charon said of
        them does not count for one that came just now, until it says so again.
        """
        both = Direction.IN, Direction.OUT
        found = (each for direction in both for each in self._named(sa, direction))
        return tuple(dict.fromkeys(each.ike.unique_id for each in found))

    def wants_listing(self) -> bool:
        """Whether everything listed now would tell more of the SAs in ``unlisted``; empties that.

        Mostly charon has told of them by itself meanwhile.
        """
        asked, self.unlisted = self.unlisted, {}
        return len(asked) >= _REMEMBERED or any(
            self._is_nameless(record, direction) and not self._listed_since(record)
            for record, direction in asked.items()
        )

    def _named(self, sa: SA, direction: Direction) -> tuple[Negotiated, ...]:
        """Return the children that have an SA of this name in a direction, or had."""
        inbound = direction is Direction.IN
        return self.table.find(sa.destination, sa.proto, sa.spi, inbound=inbound)

    def _agreed(self, ikes: Iterable[IKESA], until: float) -> Answer:
        return agreed(
            Awaited(until) if (ends := self._ends(ike)) is None else ends
            for ike in {ike.key: ike for ike in ikes}.values()
        )

    def _children(self, record: Record, direction: Direction) -> list[Negotiated]:
        """Return the children that the SA is of: one, unless charon contradicts itself."""
        sa = record.sa
        alike = _comes_from if direction is Direction.IN else _leads_to
        found = [
            each
            for each in self._named(sa, direction)
            if self.table.told(each.child) >= record.added and alike(sa, each)
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
            return [each for each in found if _marked_alike(sa, each.child, direction)]
        return found

    def _doubt(self, told: Negotiated) -> None:
        when, number = self.table.told(told.child), told.child.unique_id
        if self._doubted.get(number) != when:
            if len(self._doubted) >= _REMEMBERED:
                self._doubted.clear()
            self._doubted[number] = when
            self.doubtful.add(told.ike.unique_id)

    def _is_foreign(self, record: Record, direction: Direction) -> bool:
        """Whether charon listed what it has when the SA had been there for a while, but not it."""
        if not self._is_nameless(record, direction):
            return False
        if self._listed_since(record):
            return True
        if len(self.unlisted) < _REMEMBERED:
            self.unlisted[record] = direction
        return False

    def _is_nameless(self, record: Record, direction: Direction) -> bool:
        """Whether an SA lives, and charon never told of one with its name."""
        return record.buried == inf and not self._named(record.sa, direction)

    def _listed_since(self, record: Record) -> bool:
        return self.table.synced and self.table.listed >= record.added + LISTED_SECONDS

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
            and _marked_alike(sa, child, Direction.IN)
            for child in self.table.children(ike)
        )
        return (ike,) if between and alike else ()


def _comes_from(sa: SA, told: Negotiated) -> bool:
    return sa.source == told.ike.remote_host and told.child.mode in (None, sa.mode)


def _leads_to(sa: SA, told: Negotiated) -> bool:
    return (
        told.alive
        and sa.source == told.ike.local_host
        and told.child.mode in (None, sa.mode)
        and _marked_alike(sa, told.child, Direction.OUT)
    )


def _marked_alike(sa: SA, child: ChildSA, direction: Direction) -> bool:
    if direction is Direction.IN:
        return (sa.mark, sa.if_id) == (child.mark_in, child.if_id_in)
    return (sa.mark, sa.if_id) == (child.mark_out, child.if_id_out)
