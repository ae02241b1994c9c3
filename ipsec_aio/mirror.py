"""The kernel's SAD and SPD in memory, kept true by events.

Rules:

* Time is an argument: monotonic seconds, never going back.
* ``epoch`` changes whenever an answer that was drawn from the mirror may no longer hold.
* Removed SAs stay for a while as tombstones, for packets that were queued: an SA is never
  forgotten at the moment at which its last packets are read.
* Resync: after :meth:`begin_resync` nothing holds (``synced`` is False); dump records go into
  new tables by :meth:`load`; live events wait; :meth:`finish_resync` plays them on the new tables
  and swaps. What lived before and does not live after becomes a tombstone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

from .enums import Direction, PolicyAction
from .events import (
    DefaultActions,
    Event,
    PoliciesFlushed,
    PolicyAdded,
    PolicyDeleted,
    PolicyExpired,
    SAAdded,
    SADeleted,
    SAExpired,
    SAMapped,
    SAMigrated,
    SAsFlushed,
)
from .flow import Flow, Mark
from .policy import Policy
from .sa import IPPROTO_AH, IPPROTO_COMP, IPPROTO_ESP, SA, SAKey, Usage
from .spd import SPD

__all__ = [
    "AWAITED_LIMIT",
    "BACKLOG_LIMIT",
    "POLICY_AGE",
    "TOMBSTONE_LIMIT",
    "TOMBSTONE_SECONDS",
    "Mirror",
    "Record",
]

TOMBSTONE_SECONDS = 10.0
"""How long a removed SA is remembered."""
TOMBSTONE_LIMIT = 8192
"""How many removed SAs are remembered; the oldest are forgotten first."""
AWAITED_LIMIT = 4096
"""How many missing SPIs are told apart; past it every addition changes the epoch."""
BACKLOG_LIMIT = 1_000_000
"""How many live events wait for the end of a resync."""
POLICY_AGE = 1.0
"""Seconds after which a policy vouches: what is read later than that arrived under it."""

_IPSEC_PROTO_ANY = 255
_IPSEC_PROTOS = (IPPROTO_ESP, IPPROTO_AH, IPPROTO_COMP)
_NO_USAGE = Usage()
_K = TypeVar("_K")


class Record:
    """An SA in the mirror.

    ``buried`` is the time at which it was removed, None while it lives. ``protection`` is room
    for what the resolver derives from it.
    """

    __slots__ = ("added", "buried", "protection", "sa")

    def __init__(self, sa: SA, added: float) -> None:
        self.sa = sa
        self.added = added
        self.buried: float | None = None
        self.protection: object | None = None


class _Tables:
    """One generation of SAD and SPD."""

    __slots__ = ("by_pair", "by_spi", "defaults", "marked", "records", "set_marks", "spd")

    def __init__(self) -> None:
        self.records: dict[SAKey, Record] = {}
        self.by_spi: dict[int, dict[SAKey, Record]] = {}
        self.by_pair: dict[tuple[bytes, bytes], dict[SAKey, Record]] = {}
        self.marked = 0
        self.set_marks: dict[Mark, int] = {}
        self.spd = SPD()
        self.defaults = DefaultActions(PolicyAction.ALLOW, PolicyAction.ALLOW, PolicyAction.ALLOW)

    def put(self, record: Record) -> None:
        sa = record.sa
        key = sa.key
        self.records[key] = record
        self.by_spi.setdefault(sa.spi, {})[key] = record
        self.by_pair.setdefault((sa.source, sa.destination), {})[key] = record
        self.marked += _looks_at_mark(sa)
        if sa.set_mark is not None:
            self.set_marks[sa.set_mark] = self.set_marks.get(sa.set_mark, 0) + 1

    def pop(self, key: SAKey) -> Record | None:
        record = self.records.pop(key, None)
        if record is None:
            return None
        sa = record.sa
        _discard(self.by_spi, sa.spi, key)
        _discard(self.by_pair, (sa.source, sa.destination), key)
        self.marked -= _looks_at_mark(sa)
        if sa.set_mark is not None:
            self.set_marks[sa.set_mark] -= 1
            if not self.set_marks[sa.set_mark]:
                del self.set_marks[sa.set_mark]
        return record


def _looks_at_mark(sa: SA) -> bool:
    return bool(sa.mark.mask or sa.mark.value) and sa.direction is not Direction.OUT


def _discard(index: dict[_K, dict[SAKey, Record]], at: _K, key: SAKey) -> None:
    group = index[at]
    del group[key]
    if not group:
        del index[at]


class Mirror:
    """SAD and SPD, kept true by events. It starts out of sync.

    ``additions_matter`` is set by whoever drew a conclusion from the absence of an SA: then any
    addition changes the epoch. It falls back by itself when the epoch changes.
    """

    def __init__(self) -> None:
        self.epoch = 1
        self.synced = False
        self.resyncs = 0
        self.additions_matter = False
        self.always_bump = False
        self._tables = _Tables()
        self._staging: _Tables | None = None
        self._backlog: list[Event] = []
        # In order of burial, so in order of expiry.
        self._tombs: dict[int, Record] = {}
        self._tombs_by_spi: dict[int, list[Record]] = {}
        # When policies were added: each such moment matters once more, when they come of age.
        self._young: deque[float] = deque()
        self._awaited: set[int] = set()

    # Look-ups

    @property
    def spd(self) -> SPD:
        """The policies."""
        return self._tables.spd

    @property
    def defaults(self) -> DefaultActions:
        """What happens to traffic that no policy covers."""
        return self._tables.defaults

    def __len__(self) -> int:
        return len(self._tables.records)

    def sas(self) -> Iterator[SA]:
        """Yield the living SAs, larval ones too."""
        return (record.sa for record in self._tables.records.values())

    def get(self, key: SAKey) -> SA | None:
        """Return the living SA with this key."""
        record = self._tables.records.get(key)
        return None if record is None else record.sa

    def living(self, spi: int) -> Iterable[Record]:
        """Return the living SAs with this number, whatever their protocol."""
        group = self._tables.by_spi.get(spi)
        return () if group is None else group.values()

    def buried(self, spi: int) -> Iterable[Record]:
        """Return the tombstones with this number."""
        return self._tombs_by_spi.get(spi, ())

    def between(self, source: bytes, destination: bytes) -> Iterable[Record]:
        """Return the living SAs with these outer addresses, in the order in which they came."""
        group = self._tables.by_pair.get((source, destination))
        return () if group is None else group.values()

    def records(self) -> Iterable[Record]:
        """Return all living SAs."""
        return self._tables.records.values()

    def tombstones(self) -> Iterable[Record]:
        """Return all tombstones, oldest first."""
        return self._tombs.values()

    def policy(self, flow: Flow, direction: Direction) -> Policy | None:
        """Return the policy that the kernel applies first to this flow."""
        return self._tables.spd.lookup(flow, direction)

    def has_marked_inbound(self) -> bool:
        """Whether an inbound policy, or an SA that may be inbound, looks at packets' marks."""
        return self._tables.marked > 0 or self._tables.spd.marked_inbound

    @property
    def set_marks(self) -> frozenset[Mark]:
        """The marks that SAs write into packets."""
        return frozenset(self._tables.set_marks)

    def vouches(self, policy: Policy, now: float) -> bool:
        """Whether a policy is old enough for what is read now to have arrived under it."""
        return now - self._tables.spd.added(policy) >= POLICY_AGE

    def await_spi(self, spi: int) -> None:
        """Have the epoch change when an SA with this number is added."""
        if len(self._awaited) < AWAITED_LIMIT:
            self._awaited.add(spi)
        else:
            self.additions_matter = True

    # Time

    def next_deadline(self) -> float | None:
        """Return when :meth:`advance` has something to do, None for never."""
        deadlines: list[float] = []
        for record in self._tombs.values():
            deadlines.append((record.buried or 0.0) + TOMBSTONE_SECONDS)
            break
        if self._young:
            deadlines.append(self._young[0] + POLICY_AGE)
        return min(deadlines, default=None)

    def advance(self, now: float) -> None:
        """Let tombstones expire and policies come of age."""
        changed = False
        while self._tombs:
            record = next(iter(self._tombs.values()))
            if record.buried is None or now - record.buried < TOMBSTONE_SECONDS:
                break
            self._forget(record)
            changed = True
        while self._young and now - self._young[0] >= POLICY_AGE:
            self._young.popleft()
            changed = True
        if changed:
            self.bump()

    # Events

    def apply(self, event: Event, now: float) -> None:
        """Take in a live event."""
        if self._staging is not None:
            self._backlog.append(event)
            return
        self._play(event, now)

    def begin_resync(self, now: float) -> None:
        """Start again from a dump: what is known is no longer sure. May be called again."""
        del now
        self._staging = _Tables()
        self._backlog = []
        self.synced = False
        self.resyncs += 1
        self.bump()

    def load(self, event: Event, now: float) -> None:
        """Take in a record of a dump. Raises RuntimeError outside a resync."""
        if self._staging is None:
            raise RuntimeError("load() outside a resync")
        match event:
            case SAAdded(sa):
                self._staging.pop(sa.key)
                self._staging.put(Record(sa, now))
            case PolicyAdded(policy):
                self._staging.spd.load(policy, now)
            case DefaultActions():
                self._staging.defaults = event
            case _:
                raise ValueError(f"no record of a dump: {event!r}")

    def finish_resync(self, now: float) -> bool:
        """Swap the new tables in. False: more events waited than fit, and it must begin again."""
        staging, backlog = self._staging, self._backlog
        if staging is None:
            raise RuntimeError("finish_resync() outside a resync")
        if len(backlog) > BACKLOG_LIMIT:
            return False
        old = self._tables
        self._staging, self._backlog = None, []
        self._tables = staging
        staging.spd.restart(now)
        self._young = deque([now] if len(staging.spd) else [])
        for event in backlog:
            self._play(event, now)
        for key, record in old.records.items():
            current = self._tables.records.get(key)
            if current is None or not _same(current.sa, record.sa):
                self._bury(record, now)
        self.synced = True
        self.bump()
        return True

    def bump(self) -> None:
        """Change the epoch."""
        self.epoch += 1
        self._awaited.clear()
        self.additions_matter = False

    def _play(self, event: Event, now: float) -> None:
        match event:
            case SAAdded(sa):
                self._add(sa, now)
            case SADeleted(key):
                self._remove([key], now)
            case SAExpired(sa, hard):
                if hard:
                    self._remove([sa.key], now)
                elif sa.key in self._tables.records:
                    self._add(sa, now)
            case SAsFlushed(proto):
                self._remove(
                    [key for key in self._tables.records if _flushes(proto, key.proto)], now
                )
            case SAMapped():
                self._map(event, now)
            case SAMigrated():
                self._migrate(event, now)
            case PolicyAdded(policy):
                self._add_policy(policy, now)
            case PolicyDeleted(key, index):
                spd = self._tables.spd
                self._dropped(spd.remove_index(index) if key is None else spd.remove(key))
            case PolicyExpired(policy, hard):
                if hard:
                    self._dropped(self._tables.spd.remove(policy.key))
            case PoliciesFlushed(kind):
                if self._tables.spd.flush(kind):
                    self.bump()
            case DefaultActions():
                if event != self._tables.defaults:
                    self._tables.defaults = event
                    self.bump()

    def _add(self, sa: SA, now: float) -> None:
        tables = self._tables
        key = sa.key
        old = tables.records.get(key)
        if old is not None and _same(old.sa, sa):
            old.sa = sa
            return
        if old is not None:
            tables.pop(key)
            self._bury(old, now)
        tables.put(Record(sa, now))
        if (
            old is not None
            or self.always_bump
            or self.additions_matter
            or sa.spi in self._awaited
            or len(tables.by_spi[sa.spi]) > 1
            or sa.spi in self._tombs_by_spi
        ):
            self.bump()

    def _remove(self, keys: Iterable[SAKey], now: float) -> None:
        gone = [record for key in keys if (record := self._tables.pop(key)) is not None]
        for record in gone:
            self._bury(record, now)
        if gone:
            self.bump()

    def _map(self, event: SAMapped, now: float) -> None:
        record = self._tables.records.get(event.key)
        if record is None:
            return
        encapsulation = record.sa.encapsulation
        if encapsulation is not None:
            encapsulation = encapsulation._replace(source_port=event.new_port)
        self._add(replace(record.sa, source=event.new_source, encapsulation=encapsulation), now)

    def _migrate(self, event: SAMigrated, now: float) -> None:
        tables = self._tables
        moving = [
            record.sa
            for record in tables.by_pair.get((event.old_source, event.old_destination), {}).values()
            if record.sa.proto == event.proto
            and record.sa.mode == event.mode
            and event.reqid in (0, record.sa.reqid)
        ]
        for sa in moving:
            self._remove([sa.key], now)
            self._add(replace(sa, source=event.new_source, destination=event.new_destination), now)
        for policy in list(tables.spd):
            templates = tuple(
                replace(t, source=event.new_source, destination=event.new_destination)
                if t.proto == event.proto
                and t.mode == event.mode
                and event.reqid in (0, t.reqid)
                and (t.source, t.destination) == (event.old_source, event.old_destination)
                else t
                for t in policy.templates
            )
            if templates != policy.templates:
                self._add_policy(replace(policy, templates=templates), now)

    def _add_policy(self, policy: Policy, now: float) -> None:
        if self._tables.spd.add(policy, now):
            if not self._young or self._young[-1] != now:
                self._young.append(now)
            self.bump()

    def _dropped(self, policy: Policy | None) -> None:
        if policy is not None:
            self.bump()

    def _bury(self, record: Record, now: float) -> None:
        if record.sa.larval:
            return
        if len(self._tombs) >= TOMBSTONE_LIMIT:
            self._forget(next(iter(self._tombs.values())))
            self.bump()
        record.buried = now
        self._tombs[id(record)] = record
        self._tombs_by_spi.setdefault(record.sa.spi, []).append(record)

    def _forget(self, record: Record) -> None:
        del self._tombs[id(record)]
        group = self._tombs_by_spi[record.sa.spi]
        group.remove(record)
        if not group:
            del self._tombs_by_spi[record.sa.spi]


def _flushes(proto: int, sa_proto: int) -> bool:
    if proto == _IPSEC_PROTO_ANY:
        return sa_proto in _IPSEC_PROTOS
    return proto in (0, sa_proto)


def _same(one: SA, other: SA) -> bool:
    """Whether two SAs of one key protect alike: counters and lifetimes do not count."""
    return one is other or (
        replace(one, usage=_NO_USAGE, lifetime=other.lifetime) == replace(other, usage=_NO_USAGE)
    )
