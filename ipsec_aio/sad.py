"""The SAD in memory: SAs by key, by number, and by what they might carry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from math import inf
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from .enums import Direction, Mode
from .flow import Mark
from .sa import IPPROTO_COMP, SA, SAKey

if TYPE_CHECKING:
    from .identities import Identities

__all__ = ["SAD", "Index", "Record"]

_K = TypeVar("_K")
_TUNNELS = (Mode.TUNNEL, Mode.BEET, Mode.IPTFS)


class Record:
    """An SA in the mirror.

    ``added`` and ``buried`` are the times of its arrival and removal (infinity: it lives).
    ``alone``: when it was added, no other SA with its number was known, nor could have been missed.
    ``protection`` is room for what is derived from the SA, ``identities`` for what was said of
    its ends.
    """

    __slots__ = ("added", "alone", "buried", "identities", "protection", "sa")

    def __init__(self, sa: SA, added: float, *, alone: bool = False) -> None:
        self.sa = sa
        self.added = added
        self.alone = alone
        self.buried = inf
        self.protection: object | None = None
        self.identities: Identities | None = None


# Mostly there is one: a table of its own for each would be most of the memory.
_Group: TypeAlias = "Record | dict[Record, None]"


class Index:
    """Records by SPI, by outer addresses, by the source that their selectors admit, and those of
    tunnels; in the order of their arrival.
    """

    __slots__ = ("_by_pair", "_by_source", "_by_spi", "_tunnels")

    def __init__(self) -> None:
        self._by_spi: dict[int, _Group] = {}
        self._by_pair: dict[tuple[bytes, bytes], _Group] = {}
        self._by_source: dict[bytes, _Group] = {}
        self._tunnels: dict[bytes, _Group] = {}

    def add(self, record: Record) -> None:
        """Put a record in."""
        sa = record.sa
        _put(self._by_spi, sa.spi, record)
        _put(self._by_pair, (sa.source, sa.destination), record)
        _put(self._by_source, _only_source(sa), record)
        if sa.mode in _TUNNELS:
            _put(self._tunnels, sa.source, record)

    def remove(self, record: Record) -> None:
        """Take a record out."""
        sa = record.sa
        _discard(self._by_spi, sa.spi, record)
        _discard(self._by_pair, (sa.source, sa.destination), record)
        _discard(self._by_source, _only_source(sa), record)
        if sa.mode in _TUNNELS:
            _discard(self._tunnels, sa.source, record)

    def numbered(self, spi: int) -> Iterable[Record]:
        """Return the SAs with this SPI, whatever their protocol."""
        return _members(self._by_spi.get(spi))

    def between(self, source: bytes, destination: bytes) -> Iterable[Record]:
        """Return the SAs with these outer addresses."""
        return _members(self._by_pair.get((source, destination)))

    def transports(self, peer: bytes, local: bytes) -> Iterable[Record]:
        """Return the SAs whose outer addresses fit this traffic without a tunnel."""
        return chain(
            self.between(peer, local),
            self.between(b"", local),
            self.between(bytes(len(peer)), local),
        )

    def admitting(self, source: bytes) -> Iterable[Record]:
        """Return the SAs whose selectors may admit traffic from this address, whoever sent it."""
        return chain(_members(self._by_source.get(source)), _members(self._by_source.get(b"")))

    def tunnels(self, source: bytes | None = None) -> Iterable[Record]:
        """Return the SAs in a tunnel mode: all, or those with this outer source address."""
        if source is None:
            return chain.from_iterable(map(_members, self._tunnels.values()))
        return _members(self._tunnels.get(source))


def _only_source(sa: SA) -> bytes:
    """Return the one source address that an SA's selector admits, nothing where there are more."""
    selector = sa.selector
    return selector.source if selector.source_prefix == 8 * len(selector.source) else b""


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

    __slots__ = ("_compressing", "_crowded", "_marked", "_set_marks", "_size")

    def __init__(self) -> None:
        super().__init__()
        self._size = 0
        # An SPI is mostly one SA's alone: by their keys there are only those where it is not.
        self._crowded: dict[SAKey, Record] = {}
        self._marked = 0
        self._set_marks: dict[Mark, int] = {}
        self._compressing: dict[tuple[bytes, bytes], int] = {}

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Record]:
        return chain.from_iterable(map(_members, self._by_spi.values()))

    def get(self, key: SAKey) -> Record | None:
        """Return the SA with this key."""
        group = self._by_spi.get(key.spi)
        if isinstance(group, Record):
            return group if group.sa.key == key else None
        return None if group is None else self._crowded.get(key)

    def add(self, record: Record) -> None:
        """Put an SA in whose key is free."""
        super().add(record)
        group = self._by_spi[record.sa.spi]
        if not isinstance(group, Record):
            for each in group if len(group) == 2 else (record,):
                self._crowded[each.sa.key] = each
        self._size += 1
        self._count(record.sa, 1)

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
    def set_marks(self) -> frozenset[Mark]:
        """The marks that SAs write into packets."""
        return frozenset(self._set_marks)

    def compresses(self, source: bytes, destination: bytes) -> bool:
        """Whether there is an IPComp SA with these outer addresses."""
        return (source, destination) in self._compressing

    def _count(self, sa: SA, step: int) -> None:
        if sa.mark != (0, 0) and sa.direction is not Direction.OUT:
            self._marked += step
        if sa.set_mark is not None:
            _tally(self._set_marks, sa.set_mark, step)
        if sa.proto == IPPROTO_COMP:
            _tally(self._compressing, (sa.source, sa.destination), step)
