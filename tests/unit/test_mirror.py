"""The mirror, event by event, and against a model in any order."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sas import FAR, GATE, LOCAL, OTHER, PEER, ah, comp, esp, larval, null, protect, tunnel

from ipsec_aio import mirror as module
from ipsec_aio.enums import Direction, Mode, PolicyAction
from ipsec_aio.events import (
    DefaultActions,
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
from ipsec_aio.flow import Flow, Mark, Selector
from ipsec_aio.mirror import TOMBSTONE_SECONDS, Mirror
from ipsec_aio.policy import Template
from ipsec_aio.sa import IPPROTO_ESP, Encapsulation, Lifetime, Usage


@pytest.fixture
def mirror() -> Mirror:
    mirror = Mirror()
    mirror.begin_resync(0.0)
    assert mirror.finish_resync(0.0)
    return mirror


def spis(records) -> list[int]:
    return [record.sa.spi for record in records]


def bumps(mirror, *events, now=1.0) -> bool:
    before = mirror.epoch
    for event in events:
        mirror.apply(event, now)
    return mirror.epoch != before


def test_it_starts_out_of_sync():
    assert not Mirror().synced


def test_look_ups_by_key_number_and_addresses(mirror):
    one, two = esp(0x1), tunnel(0x1)
    mirror.apply(SAAdded(one), 1)
    mirror.apply(SAAdded(two), 1)
    assert mirror.get(one.key) == one
    assert [r.sa for r in mirror.sad.numbered(1)] == [one, two]
    assert [r.sa for r in mirror.sad.transports(PEER, LOCAL)] == [one]
    assert [r.sa for r in mirror.sad.between(FAR, GATE)] == [two]
    assert [r.sa for r in mirror.sad.tunnels()] == [two]
    assert list(mirror.sas()) == [one, two]
    assert len(mirror) == 2
    assert not list(mirror.sad.numbered(2))
    assert not list(mirror.sad.between(PEER, FAR))


def test_an_sa_of_any_source_is_found_for_every_peer(mirror):
    mirror.apply(SAAdded(esp(1, bytes(4))), 1)
    mirror.apply(SAAdded(esp(2, b"")), 1)
    assert sorted(spis(mirror.sad.transports(PEER, LOCAL))) == [1, 2]


def test_a_rekey_leaves_both_alive_and_keeps_the_epoch(mirror):
    mirror.apply(SAAdded(esp(1)), 1)
    assert not bumps(mirror, SAAdded(esp(2)))
    assert spis(mirror.sad.between(PEER, LOCAL)) == [1, 2]


def test_soft_expiry_is_a_note_and_hard_expiry_the_end(mirror):
    mirror.apply(SAAdded(esp(1)), 1)
    assert not bumps(mirror, SAExpired(esp(1, aead=None, usage=Usage(5, 5)), False))
    assert mirror.get(esp(1).key) == esp(1)
    assert not bumps(mirror, SAExpired(esp(9), False))
    assert mirror.get(esp(9).key) is None
    assert bumps(mirror, SAExpired(esp(1), True))
    assert mirror.get(esp(1).key) is None
    assert not bumps(mirror, SAExpired(esp(1), True))


def test_deleted_sas_are_remembered_for_a_while(mirror):
    mirror.apply(SAAdded(esp(1)), 1)
    assert bumps(mirror, SADeleted(esp(1).key), now=2)
    assert spis(mirror.graveyard.numbered(1)) == [1]
    assert mirror.next_deadline() == 2 + TOMBSTONE_SECONDS
    epoch = mirror.epoch
    mirror.advance(2 + TOMBSTONE_SECONDS - 0.01)
    assert (mirror.epoch, list(mirror.tombstones())) == (epoch, [esp(1)])
    mirror.advance(2 + TOMBSTONE_SECONDS)
    assert mirror.epoch != epoch
    assert not list(mirror.tombstones())
    assert not list(mirror.graveyard.numbered(1))
    assert mirror.next_deadline() is None


def test_tombstones_are_bounded_and_the_oldest_go_first(mirror, monkeypatch):
    monkeypatch.setattr(module, "TOMBSTONE_LIMIT", 3)
    for spi in range(1, 6):
        mirror.apply(SAAdded(esp(spi)), spi)
        mirror.apply(SADeleted(esp(spi).key), spi)
    assert [sa.spi for sa in mirror.tombstones()] == [3, 4, 5]
    assert not list(mirror.graveyard.numbered(1))


def test_an_unknown_deletion_changes_nothing(mirror):
    assert not bumps(mirror, SADeleted(esp(1).key))


def test_flush_is_by_protocol(mirror):
    for sa in (esp(1), ah(2), comp(3), replace(esp(4), proto=43)):
        mirror.apply(SAAdded(sa), 1)
    assert bumps(mirror, SAsFlushed(IPPROTO_ESP))
    assert [sa.spi for sa in mirror.sas()] == [2, 3, 4]
    assert not bumps(mirror, SAsFlushed(IPPROTO_ESP))
    mirror.apply(SAsFlushed(255), 1)
    assert [sa.spi for sa in mirror.sas()] == [4]
    mirror.apply(SAsFlushed(0), 1)
    assert not list(mirror.sas())


def test_larval_sas_leave_no_tombstone(mirror):
    mirror.apply(SAAdded(larval()), 1)
    mirror.apply(SADeleted(larval().key), 1)
    assert not list(mirror.tombstones())


def test_an_update_counts_only_where_it_changes_protection(mirror):
    mirror.apply(SAAdded(esp(1)), 1)
    counters = esp(1, usage=Usage(9, 9), lifetime=Lifetime(hard_bytes=5))
    assert not bumps(mirror, SAAdded(counters))
    assert mirror.get(esp(1).key) == counters
    assert bumps(mirror, SAAdded(null(1)))
    assert mirror.get(esp(1).key) == null(1)
    assert list(mirror.tombstones()) == [counters]


def test_an_update_by_deletion_and_addition(mirror):
    mirror.apply(SAAdded(tunnel(1)), 1)
    moved = replace(tunnel(1), source=OTHER)
    assert bumps(mirror, SADeleted(tunnel(1).key), SAAdded(moved))
    assert list(mirror.sas()) == [moved]


def test_an_addition_changes_the_epoch_where_it_matters(mirror):
    assert not bumps(mirror, SAAdded(esp(1)))
    assert bumps(mirror, SAAdded(comp(1))), "a collision"
    mirror.apply(SADeleted(esp(1).key), 1)
    mirror.apply(SADeleted(comp(1).key), 1)
    assert bumps(mirror, SAAdded(esp(1))), "a tombstone's number"
    mirror.await_spi(7)
    assert bumps(mirror, SAAdded(esp(7))), "awaited"
    mirror.await_spi(6)
    mirror.bump()
    assert not bumps(mirror, SAAdded(esp(6))), "whoever waited was told to ask again"
    assert not bumps(mirror, SAAdded(esp(8)))
    mirror.additions_matter = True
    assert bumps(mirror, SAAdded(esp(9)))
    assert not bumps(mirror, SAAdded(esp(10)))
    assert bumps(mirror, SAAdded(comp(11)))
    mirror.always_bump = True
    assert bumps(mirror, SAAdded(esp(12)))


def test_too_many_awaited_numbers_make_every_addition_matter(mirror, monkeypatch):
    monkeypatch.setattr(module, "AWAITED_LIMIT", 2)
    for spi in (1, 2, 3):
        mirror.await_spi(spi)
    assert bumps(mirror, SAAdded(esp(99)))


def test_a_mapping_moves_the_source(mirror):
    sa = esp(1, encapsulation=Encapsulation(2, 4500, 4500))
    plain = esp(2)
    mirror.apply(SAAdded(sa), 1)
    mirror.apply(SAAdded(plain), 1)
    assert bumps(mirror, SAMapped(sa.key, 0, PEER, OTHER, 4500, 1024))
    assert bumps(mirror, SAMapped(plain.key, 0, PEER, OTHER, 4500, 1024))
    assert not bumps(mirror, SAMapped(esp(3).key, 0, PEER, OTHER, 4500, 1024))
    assert mirror.get(sa.key).encapsulation.source_port == 1024
    assert spis(mirror.sad.between(OTHER, LOCAL)) == [1, 2]
    assert not list(mirror.sad.between(PEER, LOCAL))


def test_a_migration_moves_sas_and_templates(mirror):
    mine, shared = tunnel(1, reqid=5), tunnel(2, reqid=6)
    template = Template(mode=Mode.TUNNEL, source=FAR, destination=GATE, reqid=5)
    mirror.apply(SAAdded(mine), 1)
    mirror.apply(SAAdded(shared), 1)
    mirror.apply(PolicyAdded(protect(template, Template())), 1)
    mirror.apply(PolicyAdded(protect(priority=99, selector=Selector(proto=6))), 1)
    assert bumps(mirror, SAMigrated(IPPROTO_ESP, Mode.TUNNEL, 5, FAR, GATE, OTHER, LOCAL))
    assert spis(mirror.sad.between(OTHER, LOCAL)) == [1]
    assert spis(mirror.sad.between(FAR, GATE)) == [2]
    policy = mirror.policy(Flow(PEER, LOCAL), Direction.IN)
    assert (policy.templates[0].source, policy.templates[1]) == (OTHER, Template())
    assert spis(mirror.graveyard.between(FAR, GATE)) == [1]


def test_policies_come_and_go(mirror):
    flow = Flow(PEER, LOCAL)
    one = protect(index=8)
    assert bumps(mirror, PolicyAdded(one))
    assert not bumps(mirror, PolicyAdded(one))
    assert mirror.policy(flow, Direction.IN) == one
    assert bumps(mirror, PolicyDeleted(one.key))
    assert not bumps(mirror, PolicyDeleted(one.key))
    assert mirror.policy(flow, Direction.IN) is None
    mirror.apply(PolicyAdded(one), 1)
    assert bumps(mirror, PolicyDeleted(None, 8))
    mirror.apply(PolicyAdded(one), 1)
    assert not bumps(mirror, PolicyExpired(one, False))
    assert bumps(mirror, PolicyExpired(one, True))
    mirror.apply(PolicyAdded(one), 1)
    assert not bumps(mirror, PoliciesFlushed(1))
    assert bumps(mirror, PoliciesFlushed(0))
    assert not bumps(mirror, PolicyAdded(protect(index=8 | 4)))


def test_changes_of_policies_are_counted_and_time_is_not(mirror):
    one, changes = protect(), [mirror.changes]
    block = DefaultActions(PolicyAction.BLOCK, PolicyAction.ALLOW, PolicyAction.ALLOW)
    for event in (
        PolicyAdded(one),
        PolicyAdded(protect(priority=9)),
        PolicyAdded(protect(priority=1, selector=Selector(proto=6))),
        PolicyDeleted(protect(selector=Selector(proto=6)).key),
        block,
        PolicyExpired(one, True),
        PolicyAdded(one),
        PoliciesFlushed(0),
    ):
        mirror.apply(event, 5)
        changes.append(mirror.changes)
        mirror.apply(event, 6)
        assert mirror.changes == changes[-1], "it was known"
    assert changes == sorted(set(changes))
    mirror.apply(SAAdded(esp()), 6)
    mirror.apply(PolicyExpired(one, False), 6)
    assert mirror.changes == changes[-1]
    assert mirror.count_change() == mirror.changes == changes[-1] + 1
    assert mirror.next_deadline() is None
    assert not mirror.ages
    epoch = mirror.epoch
    mirror.advance(1000)
    assert (mirror.epoch, mirror.changes) == (epoch, changes[-1] + 1)


def test_default_actions(mirror):
    block = DefaultActions(PolicyAction.BLOCK, PolicyAction.ALLOW, PolicyAction.ALLOW)
    assert bumps(mirror, block)
    assert not bumps(mirror, block)
    assert mirror.defaults == block


def test_marks_are_seen_while_they_are_in_use(mirror):
    marked = esp(1, mark=Mark(5, 0xFF))
    writing = [esp(n, set_mark=Mark(7, 0xFFFFFFFF)) for n in (2, 3)]
    assert not mirror.has_marked_inbound()
    mirror.apply(SAAdded(esp(4, mark=Mark(5, 0xFF), direction=Direction.OUT)), 1)
    assert not mirror.has_marked_inbound()
    mirror.apply(SAAdded(marked), 1)
    assert mirror.has_marked_inbound()
    mirror.apply(SADeleted(marked.key), 1)
    assert not mirror.has_marked_inbound()
    mirror.apply(PolicyAdded(protect(mark=Mark(5, 0xFF))), 1)
    assert mirror.has_marked_inbound()
    for sa in writing:
        before = mirror.marks
        mirror.apply(SAAdded(sa), 1)
        assert mirror.marks != before
    before = mirror.marks
    mirror.apply(SAAdded(esp(9)), 1)
    mirror.apply(PolicyAdded(protect(index=99)), 1)
    assert mirror.marks == before
    mirror.apply(SADeleted(writing[0].key), 1)
    assert mirror.marks != before


# Resync


def test_a_resync_swaps_all_at_once(mirror):
    mirror.apply(SAAdded(esp(1)), 1)
    mirror.apply(SAAdded(esp(2)), 1)
    mirror.apply(SAAdded(esp(3)), 1)
    for _ in range(20):
        mirror.count_change()
    epoch, changes = mirror.epoch, mirror.changes
    mirror.begin_resync(2)
    assert not mirror.synced
    assert mirror.epoch != epoch
    mirror.load(SAAdded(esp(1)), 2)
    mirror.load(SAAdded(esp(1)), 2)
    mirror.load(SAAdded(null(2)), 2)
    mirror.load(PolicyAdded(protect()), 2)
    mirror.load(DefaultActions(*[PolicyAction.BLOCK] * 3), 2)
    mirror.apply(SAAdded(esp(4)), 2)
    mirror.apply(SADeleted(esp(1).key), 2)
    assert [sa.spi for sa in mirror.sas()] == [1, 2, 3], "the old tables stay for diagnostics"
    assert mirror.finish_resync(3)
    assert mirror.synced
    assert [sa.spi for sa in mirror.sas()] == [2, 4]
    assert sorted(sa.spi for sa in mirror.tombstones()) == [1, 1, 2, 3]
    assert mirror.defaults.inbound is PolicyAction.BLOCK
    flow = Flow(PEER, LOCAL)
    ties = mirror.spd.ties(flow, Direction.IN)
    assert mirror.changes > changes
    assert not mirror.spd.stood(ties, flow, changes)
    assert mirror.spd.stood(ties, flow, mirror.changes)


def test_of_forgotten_sas_it_is_known_when_their_numbers_went(mirror, monkeypatch):
    monkeypatch.setattr("ipsec_aio.mirror.FORGOTTEN_LIMIT", 2)
    gone = {}
    for spi in (1, 2, 1, 3):
        mirror.apply(SAAdded(esp(spi)), 1)
        mirror.apply(SADeleted(esp(spi).key), 1)
        gone[spi] = mirror.changes
    assert [mirror.forgotten(spi) for spi in (1, 2, 3)] == [0, 0, 0], "they are remembered"
    mirror.advance(1 + TOMBSTONE_SECONDS)
    assert [mirror.forgotten(spi) for spi in (1, 3)] == [gone[1], gone[3]]
    assert mirror.forgotten(2) == mirror.forgotten(4) == gone[2], "of these it may be any"


def test_a_resync_that_begins_again_forgets_what_was_loaded(mirror):
    mirror.begin_resync(1)
    mirror.load(SAAdded(esp(1)), 1)
    mirror.apply(SAAdded(esp(2)), 1)
    mirror.begin_resync(2)
    mirror.finish_resync(2)
    assert not list(mirror.sas())
    assert mirror.resyncs == 3


def test_misuse_of_a_resync(mirror):
    with pytest.raises(RuntimeError):
        mirror.load(SAAdded(esp(1)), 1)
    with pytest.raises(RuntimeError):
        mirror.finish_resync(1)
    mirror.begin_resync(1)
    with pytest.raises(ValueError, match="dump"):
        mirror.load(SADeleted(esp(1).key), 1)


def test_a_backlog_that_is_too_long_makes_it_begin_again(mirror, monkeypatch):
    monkeypatch.setattr(module, "BACKLOG_LIMIT", 3)
    mirror.begin_resync(1)
    for spi in range(1, 9):
        mirror.apply(SAAdded(esp(spi)), 1)
    assert not mirror.finish_resync(1)
    assert not mirror.synced
    mirror.begin_resync(1)
    assert mirror.finish_resync(1)


# Against a model

KEYS = st.integers(1, 4)
KINDS = st.sampled_from([esp, null, ah, comp, lambda spi: larval(spi), lambda spi: tunnel(spi)])


class MirrorModel(RuleBasedStateMachine):
    """A dict of SAs, a dict of policies, and a list of what is gone since when."""

    def __init__(self) -> None:
        super().__init__()
        self.mirror = Mirror()
        self.now = 0.0
        self.kernel: dict = {}
        self.policies: dict = {}
        self.told: dict = {}
        self.gone: list = []
        self.index = 0
        self.reading = False
        self.resync()

    def event(self, event, change) -> None:
        epoch, before = self.mirror.epoch, dict(self.kernel)
        policies = dict(self.policies)
        change()
        self.mirror.apply(event, self.now)
        if not self.reading:
            self.bury()
            weaker = any(self.kernel.get(key) != sa for key, sa in before.items())
            assert not weaker or self.mirror.epoch != epoch
            assert policies == self.policies or self.mirror.epoch != epoch

    def bury(self) -> None:
        for key, sa in self.told.items():
            if self.kernel.get(key) != sa and not sa.larval:
                self.gone.append((self.now, sa))
        self.told = dict(self.kernel)

    @rule(kind=KINDS, spi=KEYS)
    def add(self, kind, spi):
        sa = kind(spi)
        self.event(SAAdded(sa), lambda: self.kernel.__setitem__(sa.key, sa))

    @rule(kind=KINDS, spi=KEYS, expired=st.booleans())
    def delete(self, kind, spi, expired):
        sa = kind(spi)
        event = SAExpired(sa, True) if expired else SADeleted(sa.key)
        self.event(event, lambda: self.kernel.pop(sa.key, None))

    @rule(proto=st.sampled_from([0, 50, 51, 108, 255]))
    def flush(self, proto):
        def change():
            for key in [k for k in self.kernel if proto in (0, 255, k.proto)]:
                del self.kernel[key]

        self.event(SAsFlushed(proto), change)

    @rule(proto=st.integers(0, 3), priority=st.integers(1, 3), remove=st.booleans())
    def policy(self, proto, priority, remove):
        policy = protect(priority=priority, selector=Selector(proto=proto), index=8 * (proto + 1))
        if remove:
            change = PolicyDeleted(policy.key)
            self.event(change, lambda: self.policies.pop(policy.key, None))
        else:
            self.event(PolicyAdded(policy), lambda: self.policies.update({policy.key: policy}))

    @rule()
    def flush_policies(self):
        self.event(PoliciesFlushed(), self.policies.clear)

    @rule(step=st.sampled_from([0.1, 1.0, 6.0, TOMBSTONE_SECONDS]))
    def wait(self, step):
        self.now += step
        epoch = self.mirror.epoch
        deadline = self.mirror.next_deadline()
        self.mirror.advance(self.now)
        assert (self.mirror.epoch != epoch) == (deadline is not None and deadline <= self.now)

    @rule()
    def resync(self):
        self.mirror.begin_resync(self.now)
        for sa in self.kernel.values():
            self.mirror.load(SAAdded(sa), self.now)
        for policy in self.policies.values():
            self.mirror.load(PolicyAdded(policy), self.now)
        self.reading = True

    @precondition(lambda self: self.reading)
    @rule()
    def finish(self):
        self.mirror.finish_resync(self.now)
        self.reading = False
        self.bury()

    @precondition(lambda self: not self.reading)
    @rule(lost=KEYS)
    def lose(self, lost):
        """Something happens that is never told."""
        self.kernel = {k: sa for k, sa in self.kernel.items() if k.spi != lost}
        self.resync()

    @invariant()
    def agrees(self):
        assert self.mirror.synced != self.reading
        if self.reading:
            return
        mirror = self.mirror
        assert {sa.key: sa for sa in mirror.sas()} == self.kernel
        assert {p.key: p for p in mirror.spd} == self.policies
        for spi in range(1, 5):
            assert {r.sa for r in mirror.sad.numbered(spi)} == {
                sa for sa in self.kernel.values() if sa.spi == spi
            }
        remembered = set(mirror.tombstones())
        for time, sa in self.gone:
            if time + TOMBSTONE_SECONDS > self.now:
                assert sa in remembered
        assert not [
            t for t in mirror._tombs.values() if t.buried + 2 * TOMBSTONE_SECONDS < self.now
        ]


TestMirrorModel = MirrorModel.TestCase
TestMirrorModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_an_sa_that_was_added_anew_during_a_loss_is_another(mirror):
    old = replace(esp(), usage=Usage(add_time=1))
    mirror.apply(SAAdded(old), 1)
    for now, new in ((2, replace(old, usage=Usage(packets=5, add_time=1))), (3, esp())):
        mirror.begin_resync(now)
        mirror.load(SAAdded(new), now)
        mirror.finish_resync(now)
        buried = [record.sa for record in mirror.graveyard.numbered(old.spi)]
        assert len(buried) == (new.usage.add_time != 1)
