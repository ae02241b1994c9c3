"""The kernel's SAD and SPD in memory, kept true by events.

Rules:

* Time is an argument: monotonic seconds, never going back.
* ``epoch`` changes whenever an answer that was drawn from the mirror may no longer hold.
* ``changes`` grows with what packets are judged by as they arrive, and when an SA goes, so that who
  knows when a queue was last empty can tell what its packets were judged by. No time is long enough
  for that: a queue waits for its program.
* Removed SAs stay for a while as tombstones, for packets that were queued when they went. Of those
  that are forgotten the numbers are known for longer, as far as there is room, and when they went.
* Resync: from :meth:`Mirror.begin_resync` on nothing is sure (``synced`` is False, the old tables
  stay for diagnostics). Dump records go into new tables by :meth:`Mirror.load`, live events wait.
  :meth:`Mirror.finish_resync` swaps the tables and plays the events on them. What lived before
  and does not live after becomes a tombstone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from operator import attrgetter
from typing import TypeVar

from .compact import own, shared
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
from .flow import Flow
from .policy import Policy, Template
from .sa import IPPROTO_AH, IPPROTO_COMP, IPPROTO_ESP, SA, SAKey
from .sad import SAD, Index, Record
from .spd import SPD

__all__ = [
    "AWAITED_LIMIT",
    "BACKLOG_LIMIT",
    "FORGOTTEN_LIMIT",
    "TOMBSTONE_LIMIT",
    "TOMBSTONE_SECONDS",
    "Mirror",
    "Record",
]

TOMBSTONE_SECONDS = 10.0
"""How long a removed SA is remembered."""
TOMBSTONE_LIMIT = 8192
"""How many removed SAs are remembered; the oldest are forgotten first."""
FORGOTTEN_LIMIT = 16384
"""Of how many SPIs it is known when SAs that are forgotten went; past it, it may be any's."""
AWAITED_LIMIT = 4096
"""How many missing SPIs are told apart; past it every addition changes the epoch."""
BACKLOG_LIMIT = 1_000_000
"""How many live events wait for the end of a resync."""

_IPSEC_PROTO_ANY = 255
_IPSEC_PROTOS = (IPPROTO_ESP, IPPROTO_AH, IPPROTO_COMP)
_ALLOWED = DefaultActions(PolicyAction.ALLOW, PolicyAction.ALLOW, PolicyAction.ALLOW)
_T = TypeVar("_T", SA, Template)
# What of an SA's own matters; most others share the rest with their kind.
_own = attrgetter(*(name for name in own(SA) if name != "usage"))
_lasting = attrgetter(*(f.name for f in fields(SA) if f.name not in ("usage", "lifetime")))


class _Tables:
    """One generation of SAD and SPD."""

    __slots__ = ("defaults", "sad", "spd")

    def __init__(self) -> None:
        self.sad = SAD()
        self.spd = SPD()
        self.defaults = _ALLOWED


class Mirror:
    """SAD and SPD, kept true by events. It starts out of sync.

    ``resyncs`` counts the resyncs that began. ``additions_matter`` is set by whoever drew a
    conclusion from the absence of an SA: then any addition changes the epoch; it falls back by
    itself when the epoch changes. With ``always_bump`` every change of an SA changes the epoch.
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
        # By what `changes` came to when they went, in the order of burial, so of expiry.
        self._tombs: dict[int, Record] = {}
        self._graveyard = Index()
        # By SPI, what `changes` came to when the last one went of those that are forgotten; and of
        # those whose numbers are not known any more.
        self._forgotten: dict[int, int] = {}
        self._oblivion = 0
        # What it came to when the tables were last read.
        self._read = 0
        self._awaited: set[int] = set()

    # Look-ups

    @property
    def sad(self) -> SAD:
        """The living SAs, larval ones too."""
        return self._tables.sad

    @property
    def spd(self) -> SPD:
        """The policies."""
        return self._tables.spd

    @property
    def graveyard(self) -> Index:
        """The tombstones."""
        return self._graveyard

    @property
    def defaults(self) -> DefaultActions:
        """What happens to traffic that no policy covers."""
        return self._tables.defaults

    def __len__(self) -> int:
        return len(self._tables.sad)

    def sas(self) -> Iterator[SA]:
        """Yield the living SAs, larval ones too."""
        return (record.sa for record in self._tables.sad)

    def tombstones(self) -> Iterator[SA]:
        """Yield the removed SAs that are remembered, oldest first."""
        return (record.sa for record in self._tombs.values())

    def get(self, key: SAKey) -> SA | None:
        """Return the living SA with this key."""
        record = self._tables.sad.get(key)
        return None if record is None else record.sa

    def policy(self, flow: Flow, direction: Direction) -> Policy | None:
        """Return the policy that the kernel applies first to this flow."""
        return self._tables.spd.lookup(flow, direction)

    def has_marked_inbound(self) -> bool:
        """Whether an inbound policy, or an SA that may be inbound, looks at packets' marks."""
        return self._tables.sad.marked or self._tables.spd.marked_inbound

    def names_interface_inbound(self) -> bool:
        """Whether an inbound policy, or an SA that may be inbound, names an interface."""
        return self._tables.sad.names_interface or self._tables.spd.names_interface(Direction.IN)

    @property
    def marks(self) -> object:
        """Equal to what it was as long as nothing changed that looks at marks, or writes them."""
        sad, spd = self._tables.sad, self._tables.spd
        return sad, sad.mark_changes, spd.mark_changes

    @property
    def changes(self) -> int:
        """Counts the changes of policies, and what else :meth:`count_change` was told of."""
        return self._tables.spd.changes

    def count_change(self) -> int:
        """Count a change in ``changes``, and return what that is then."""
        self._tables.spd.changes += 1
        return self._tables.spd.changes

    def forgotten(self, spi: int) -> int:
        """Return what ``changes`` came to when an SA with this SPI may have gone that is forgotten:
        what came before that may have come under it.
        """
        return self._forgotten.get(spi, self._oblivion)

    def await_spi(self, spi: int) -> None:
        """Have the epoch change when an SA with this number is added."""
        if len(self._awaited) < AWAITED_LIMIT:
            self._awaited.add(spi)
        else:
            self.additions_matter = True

    # Time

    def next_deadline(self) -> float | None:
        """Return when :meth:`advance` has something to do, None for never."""
        return next((_forgotten(record) for record in self._oldest()), None)

    @property
    def ages(self) -> bool:
        """Whether :meth:`advance` will have something to do."""
        return bool(self._tombs)

    def advance(self, now: float) -> None:
        """Let tombstones expire."""
        changed = False
        while any(_forgotten(record) <= now for record in self._oldest()):
            self._forget_oldest()
            changed = True
        if changed:
            self.bump()

    def bump(self) -> None:
        """Change the epoch."""
        self.epoch += 1
        self._awaited.clear()
        self.additions_matter = False

    # Resync

    def begin_resync(self, now: float) -> None:
        """Start again from a dump: what is known is no longer sure. May be called again."""
        del now
        self._staging = _Tables()
        self._backlog = []
        self.synced = False
        self.resyncs += 1
        self.bump()

    def load(self, event: Event, now: float) -> None:
        """Take in a record of a dump. Raises RuntimeError outside a resync, ValueError for an
        event that no dump contains.
        """
        staging = self._staging
        if staging is None:
            raise RuntimeError("load() outside a resync")
        if isinstance(event, SAAdded):
            staging.sad.load(Record(event.sa, now))
        elif isinstance(event, PolicyAdded):
            staging.spd.load(event.policy)
        elif isinstance(event, DefaultActions):
            staging.defaults = event
        else:
            raise ValueError(f"not a record of a dump: {event!r}")

    def finish_resync(self, now: float) -> bool:
        """Swap the new tables in; False where too many events waited, and it must begin again.

        Policies count as new from here on: nobody knows what was in force meanwhile.
        """
        staging, backlog = self._staging, self._backlog
        if staging is None:
            raise RuntimeError("finish_resync() outside a resync")
        if len(backlog) > BACKLOG_LIMIT:
            return False
        old, self._tables = self._tables, staging
        self._staging, self._backlog = None, []
        staging.spd.doubt(old.spd.changes)
        self._read = staging.spd.changes
        for record in staging.sad:
            record.known_since = self._read
        for event in backlog:
            self._play(event, now)
        for record in old.sad:
            current = staging.sad.twin(record.sa)
            if (
                current is None
                or not _same(current.sa, record.sa)
                or current.sa.usage.add_time != record.sa.usage.add_time
            ):
                self._bury(record, now)
            else:
                current.known_since = record.known_since
        self.synced = True
        self.bump()
        return True

    # Events

    def apply(self, event: Event, now: float) -> None:
        """Take in a live event."""
        if self._staging is None:
            self._play(event, now)
        elif len(self._backlog) <= BACKLOG_LIMIT:
            self._backlog.append(event)

    def _play(self, event: Event, now: float) -> None:
        match event:
            case SAAdded(sa):
                self._add(sa, now)
            case SADeleted(key):
                self._remove([key], now)
            case SAExpired(sa, True):
                self._remove([sa.key], now)
            case SAExpired():
                pass  # soft: it still works, and the kernel's notice leaves its algorithms out
            case SAsFlushed(proto):
                keys = [sa.key for sa in self.sas() if _flushes(proto, sa.proto)]
                self._remove(keys, now)
            case SAMapped():
                self._map(event, now)
            case SAMigrated():
                self._migrate(event, now)
            case PolicyAdded(policy):
                self._add_policy(policy)
            case PolicyDeleted(key, index):
                spd = self.spd
                self._dropped(spd.remove_index(index) if key is None else spd.remove(key))
            case PolicyExpired(policy, hard):
                if hard:
                    self._dropped(self.spd.remove(policy.key))
            case PoliciesFlushed(kind):
                if self.spd.flush(kind):
                    self.bump()
            case _:
                if event != self._tables.defaults:
                    self._tables.defaults = event
                    self.spd.doubt()
                    self.bump()

    def _add(self, sa: SA, now: float) -> None:
        sad = self._tables.sad
        old = sad.get(sa.key)
        if old is not None and _same(old.sa, sa):
            old.sa = sa
            return
        collides = any(True for _ in sad.numbered(sa.spi)) or any(
            True for _ in self._graveyard.numbered(sa.spi)
        )
        if old is not None:
            sad.pop(sa.key)
            self._bury(old, now)
        sad.add(Record(sa, now, alone=not collides, known_since=self._read))
        if (
            collides
            or self.always_bump
            or self.additions_matter
            or sa.spi in self._awaited
            # Tokens say whether there is compression.
            or sa.proto == IPPROTO_COMP
        ):
            self.bump()

    def _remove(self, keys: Iterable[SAKey], now: float) -> None:
        gone = [record for key in keys if (record := self._tables.sad.pop(key)) is not None]
        for record in gone:
            self._bury(record, now)
        if gone:
            self.bump()

    def _map(self, event: SAMapped, now: float) -> None:
        sa = self.get(event.key)
        if sa is None:
            return
        encapsulation = sa.encapsulation
        if encapsulation is not None:
            encapsulation = encapsulation._replace(source_port=event.new_port)
        self._add(replace(sa, source=event.new_source, encapsulation=encapsulation), now)

    def _migrate(self, event: SAMigrated, now: float) -> None:
        pair = self._tables.sad.between(event.old_source, event.old_destination)
        moving = [record.sa for record in pair if _migrates(event, record.sa)]
        for sa in moving:
            self._remove([sa.key], now)
            self._add(_moved(event, sa), now)
        for policy in list(self.spd):
            templates = tuple(
                _moved(event, t) if _migrates(event, t) else t for t in policy.templates
            )
            if templates != policy.templates:
                self._add_policy(replace(policy, templates=templates))

    def _add_policy(self, policy: Policy) -> None:
        if self.spd.add(policy):
            self.bump()

    def _dropped(self, policy: Policy | None) -> None:
        if policy is not None:
            self.bump()

    # Tombstones

    def _oldest(self) -> list[Record]:
        return [next(iter(self._tombs.values()))] if self._tombs else []

    def _bury(self, record: Record, now: float) -> None:
        if record.sa.larval:
            return
        if len(self._tombs) >= TOMBSTONE_LIMIT:
            self._forget_oldest()
            self.bump()
        record.buried = now
        self._tombs[self.count_change()] = record
        self._graveyard.add(record)

    def _forget_oldest(self) -> None:
        gone = next(iter(self._tombs))
        record = self._tombs.pop(gone)
        self._graveyard.remove(record)
        self._forgotten.pop(record.sa.spi, None)
        self._forgotten[record.sa.spi] = gone
        if len(self._forgotten) > FORGOTTEN_LIMIT:
            self._oblivion = self._forgotten.pop(next(iter(self._forgotten)))


def _forgotten(record: Record) -> float:
    return record.buried + TOMBSTONE_SECONDS


def _flushes(proto: int, sa_proto: int) -> bool:
    """Compare as ``xfrm_id_proto_match()`` does."""
    if proto == _IPSEC_PROTO_ANY:
        return sa_proto in _IPSEC_PROTOS
    return proto in (0, sa_proto)


def _migrates(event: SAMigrated, item: SA | Template) -> bool:
    return (
        item.proto == event.proto
        and item.mode == event.mode
        and event.reqid in (0, item.reqid)
        and (item.source, item.destination) == (event.old_source, event.old_destination)
    )


def _moved(event: SAMigrated, item: _T) -> _T:
    return replace(item, source=event.new_source, destination=event.new_destination)


def _same(one: SA, other: SA) -> bool:
    """Whether two SAs of one key protect alike: counters and lifetimes do not count."""
    return _own(one) == _own(other) and (shared(one, other) or _lasting(one) == _lasting(other))
