"""The SAD in memory: SAs by key, by number, and by what they might carry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, product
from math import inf
from operator import attrgetter
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from .enums import Direction, Mode
from .flow import Selector
from .prefixes import Place, Prefixes, places
from .sa import IPPROTO_COMP, SA, SAKey

if TYPE_CHECKING:
    from .identities import Identities

__all__ = ["SAD", "Index", "Record"]

_K = TypeVar("_K")
_key = attrgetter("destination", "proto", "mark", "if_id")
_DIRECTIONS = (Direction.IN, Direction.OUT)
_UNSPECIFIED = (b"", bytes(4), bytes(16))
_TUNNELS = (Mode.TUNNEL, Mode.BEET, Mode.IPTFS)


class Record:
    """An SA in the mirror.

    ``added`` and ``buried`` are the times of its arrival and removal (infinity: it lives).
    ``alone``: when it was added, no other SA with its number was known, nor could have been missed.
    ``known_since`` is what the mirror's ``changes`` came to when the tables were last read before
    that: in the time before that an SA with its number may have come and gone unseen.
    ``protection`` is room for what is derived from the SA, ``identities`` for what was said of
    its ends, ``leaves`` for whether that was said of an SA that leads out.
    """

    __slots__ = (
        "added",
        "alone",
        "buried",
        "identities",
        "known_since",
        "leaves",
        "protection",
        "sa",
    )

    def __init__(self, sa: SA, added: float, *, alone: bool = False, known_since: int = 0) -> None:
        self.sa = sa
        self.added = added
        self.alone = alone
        self.known_since = known_since
        self.buried = inf
        self.protection: object | None = None
        self.identities: Identities | None = None
        self.leaves = False


# Mostly there is one: a table of its own for each would be most of the memory.
_Group: TypeAlias = "Record | dict[Record, None]"


class Index:
    """Records by SPI, by outer addresses, and by the addresses that their selectors admit.

    Of equal standing they come in the order of their arrival.
    """

    __slots__ = ("_by_spi", "_narrow", "_selected", "_wide")

    def __init__(self) -> None:
        self._by_spi: dict[int, _Group] = {}
        # Those whose selectors name addresses …
        self._narrow = _Ends()
        # … by these, unless they are the SA's own: there those are found.
        self._selected: Prefixes[_Group] = Prefixes()
        # Those whose selectors name none, by direction: there may be very many.
        self._wide: dict[Direction | None, _Ends] = {}

    def __iter__(self) -> Iterator[Record]:
        return chain.from_iterable(map(_members, self._by_spi.values()))

    def add(self, record: Record) -> None:
        """Put a record in."""
        sa = record.sa
        _put(self._by_spi, sa.spi, record)
        self._ends(sa).add(record)
        for shape, key in _selected(sa):
            _put(self._selected.at(shape), key, record)

    def remove(self, record: Record) -> None:
        """Take a record out."""
        sa = record.sa
        _discard(self._by_spi, sa.spi, record)
        self._ends(sa).remove(record)
        for shape, key in _selected(sa):
            _discard(self._selected.at(shape), key, record)
            self._selected.prune(shape)

    def numbered(self, spi: int) -> Iterable[Record]:
        """Return the SAs with this SPI, whatever their protocol."""
        return _members(self._by_spi.get(spi))

    def between(self, source: bytes, destination: bytes) -> Iterable[Record]:
        """Return the SAs with these outer addresses."""
        return chain.from_iterable(
            ends.between(source, destination) for ends in (self._narrow, *self._wide.values())
        )

    def transports(self, peer: bytes, local: bytes) -> Iterable[Record]:
        """Return the SAs whose outer addresses fit this traffic without a tunnel."""
        return chain(
            self.between(peer, local),
            self.between(b"", local),
            self.between(bytes(len(peer)), local),
        )

    def leading(self, source: bytes, destination: bytes) -> Iterable[Record]:
        """Return the SAs with these outer addresses, or with any in the place of either."""
        return chain.from_iterable(
            self.between(*ends)
            for ends in product((source, *_UNSPECIFIED), (destination, *_UNSPECIFIED))
        )

    def admitting(
        self, source: bytes, destination: bytes, direction: Direction = Direction.IN
    ) -> Iterable[Record]:
        """Return the SAs whose selectors may admit traffic between these addresses.

        What serves only the other direction may be left out.
        """
        return chain(
            (r for r in self._narrow.between(source, destination) if _names_its_ends(r.sa)),
            chain.from_iterable(map(_members, self._selected.matching(source, destination))),
            self._wide.get(direction, ()),
            self._wide.get(None, ()),
        )

    def tunnels(self, source: bytes | None = None) -> Iterable[Record]:
        """Return the SAs in a tunnel mode: all, or those with this outer source address."""
        found = (
            self
            if source is None
            else chain.from_iterable(e.of(source) for e in (self._narrow, *self._wide.values()))
        )
        return (record for record in found if record.sa.mode in _TUNNELS)

    def _ends(self, sa: SA) -> _Ends:
        if not _is_wide(sa.selector):
            return self._narrow
        direction = sa.direction if sa.direction in _DIRECTIONS else None
        ends = self._wide.get(direction)
        if ends is None:
            ends = self._wide[direction] = _Ends()
        return ends


class _Ends:
    """Records by outer source address and, where several have that, by the destination."""

    __slots__ = ("_by_source",)

    def __init__(self) -> None:
        self._by_source: dict[bytes, Record | dict[bytes, _Group]] = {}

    def __iter__(self) -> Iterator[Record]:
        return chain.from_iterable(map(self.of, self._by_source))

    def add(self, record: Record) -> None:
        sa = record.sa
        found = self._by_source.setdefault(sa.source, record)
        if found is record:
            return
        if isinstance(found, Record):
            found = self._by_source[sa.source] = {found.sa.destination: found}
        _put(found, sa.destination, record)

    def remove(self, record: Record) -> None:
        source = record.sa.source
        found = self._by_source[source]
        if isinstance(found, Record):
            del self._by_source[source]
            return
        _discard(found, record.sa.destination, record)
        if len(found) == 1:
            (left,) = found.values()
            if isinstance(left, Record):
                self._by_source[source] = left

    def of(self, source: bytes) -> Iterable[Record]:
        found = self._by_source.get(source)
        if isinstance(found, dict):
            return chain.from_iterable(map(_members, found.values()))
        return _members(found)

    def between(self, source: bytes, destination: bytes) -> Iterable[Record]:
        found = self._by_source.get(source)
        if isinstance(found, dict):
            return _members(found.get(destination))
        return _members(found) if found and found.sa.destination == destination else ()


def _is_wide(selector: Selector) -> bool:
    return not (selector.source_prefix or selector.destination_prefix)


def _names_its_ends(sa: SA) -> bool:
    """Whether an SA's selector names its two outer addresses: in transport mode most do."""
    selector = sa.selector
    return (
        selector.source == sa.source
        and selector.destination == sa.destination
        and selector.source_prefix == selector.destination_prefix == 8 * len(sa.source)
        and selector.source_prefix > 0
    )


def _selected(sa: SA) -> Iterable[Place]:
    return () if _is_wide(sa.selector) or _names_its_ends(sa) else places(sa.selector)


def _members(group: _Group | None) -> Iterable[Record]:
    if group is None:
        return ()
    return (group,) if isinstance(group, Record) else group


def _put(index: dict[_K, _Group], at: _K, record: Record) -> None:
    group = index.setdefault(at, record)
    if isinstance(group, dict):
        group[record] = None
    elif group is not record:
        index[at] = {group: None, record: None}


def _discard(index: dict[_K, _Group], at: _K, record: Record) -> None:
    group = index[at]
    if isinstance(group, Record):
        del index[at]
        return
    del group[record]
    if len(group) == 1:
        (index[at],) = group


def _tally(counts: dict[_K, int], what: _K, step: int) -> None:
    count = counts.get(what, 0) + step
    if count:
        counts[what] = count
    else:
        del counts[what]


class SAD(Index):
    """The living SAs."""

    __slots__ = ("_bound", "_compressing", "_crowded", "_marked", "_size", "mark_changes")

    def __init__(self) -> None:
        super().__init__()
        self._size = 0
        # An SPI is mostly one SA's alone: by their keys there are only those where it is not.
        self._crowded: dict[SAKey, Record] = {}
        self._marked = 0
        self._bound = 0
        self.mark_changes = 0
        """Counts the changes of SAs that look at marks, or write them."""
        self._compressing: dict[tuple[bytes, bytes], int] = {}

    def __len__(self) -> int:
        return self._size

    def get(self, key: SAKey) -> Record | None:
        """Return the SA with this key."""
        group = self._by_spi.get(key.spi)
        if isinstance(group, Record):
            return group if group.sa.key == key else None
        return None if group is None else self._crowded.get(key)

    def twin(self, sa: SA) -> Record | None:
        """Return the SA with the key of this one."""
        group = self._by_spi.get(sa.spi)
        if isinstance(group, Record):
            return group if _key(group.sa) == _key(sa) else None
        return None if group is None else self._crowded.get(sa.key)

    def add(self, record: Record) -> None:
        """Put an SA in whose key is free."""
        super().add(record)
        sa = record.sa
        group = self._by_spi[sa.spi]
        if not isinstance(group, Record):
            for each in group if len(group) == 2 else (record,):
                self._crowded[each.sa.key] = each
        self._size += 1
        self._count(sa, 1)

    def load(self, record: Record) -> None:
        """Put an SA in, in the place of one with the same key."""
        if record.sa.spi in self._by_spi:
            self.pop(record.sa.key)
        self.add(record)

    def pop(self, key: SAKey) -> Record | None:
        """Take out and return the SA with this key."""
        record = self.get(key)
        if record is None:
            return None
        super().remove(record)
        if self._crowded.pop(key, None) is not None:
            left = self._by_spi[key.spi]
            if isinstance(left, Record):
                del self._crowded[left.sa.key]
        self._size -= 1
        self._count(record.sa, -1)
        return record

    @property
    def marked(self) -> bool:
        """Whether an SA that may be inbound looks at packets' marks."""
        return self._marked > 0

    @property
    def names_interface(self) -> bool:
        """Whether an SA that may be inbound names an interface in its selector."""
        return self._bound > 0

    def compresses(self, source: bytes, destination: bytes) -> bool:
        """Whether there is an IPComp SA with these outer addresses."""
        return (source, destination) in self._compressing

    def _count(self, sa: SA, step: int) -> None:
        if sa.direction is not Direction.OUT:
            self._marked += step * (sa.mark != (0, 0))
            self._bound += step * (sa.selector.ifindex != 0)
        if sa.set_mark is not None or sa.mark != (0, 0):
            self.mark_changes += 1
        if sa.proto == IPPROTO_COMP:
            _tally(self._compressing, (sa.source, sa.destination), step)
