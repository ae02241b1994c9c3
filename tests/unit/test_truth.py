"""Every way in which evidence could be made to lie, and what is told instead."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sas import (
    CBC,
    FAR,
    GATE,
    GMAC,
    LOCAL,
    NOW,
    OTHER,
    PEER,
    ah,
    comp,
    esp,
    larval,
    null,
    protect,
    seen,
    tunnel,
)

from ipsec_aio.enums import Assurance, Direction, Mode, PolicyAction
from ipsec_aio.events import (
    DefaultActions,
    PolicyAdded,
    PolicyDeleted,
    SAAdded,
    SADeleted,
    SAMigrated,
)
from ipsec_aio.evidence import IPPROTO_TCP, IPPROTO_UDP, NEVER
from ipsec_aio.flow import Mark, Selector, pack_address
from ipsec_aio.mirror import TOMBSTONE_SECONDS, Mirror
from ipsec_aio.policy import Template
from ipsec_aio.sa import SA, Offload
from ipsec_aio.truth import MISSING, TruthTable

EXACT, POLICY, NONE, UNKNOWN = (
    Assurance.EXACT,
    Assurance.POLICY,
    Assurance.NONE,
    Assurance.UNKNOWN,
)


class Bench:
    """A truth table over a mirror, at a time."""

    def __init__(self, *facts) -> None:
        self.now = 100.0
        self.mirror = Mirror()
        self.table = TruthTable(self.mirror)
        self.table.generation = 1
        self.asked: list = []
        self.answer: list | None = []
        self.table.lookup_missing = self.lookup
        self.mirror.begin_resync(0)
        self.mirror.finish_resync(0)
        self.tell(*facts)
        self.wait(2)

    def tell(self, *facts) -> None:
        for fact in facts:
            kind = SAAdded if isinstance(fact, SA) else PolicyAdded
            self.mirror.apply(kind(fact), self.now)

    def remove(self, sa) -> None:
        self.mirror.apply(SADeleted(sa.key), self.now)

    def wait(self, seconds) -> None:
        self.now += seconds
        self.mirror.advance(self.now)

    def lookup(self, key) -> bool:
        self.asked.append(key)
        if self.answer is None:
            return False
        for sa in self.answer:
            if sa.key == key:
                self.mirror.apply(SAAdded(sa), self.now)
        return True

    def judge(self, evidence):
        return self.table.judge(evidence).verdict

    def __call__(self, evidence):
        return self.judge(evidence).assurance


# By the stamp


@pytest.mark.parametrize("sa", [esp(), null(), ah(), tunnel(), esp(source=bytes(4))])
def test_a_stamp_names_its_sa(sa):
    verdict = Bench(sa).judge(seen(0x1001))
    assert verdict.assurance is EXACT
    assert verdict.protection.integrity is True
    assert verdict.protection.privacy is sa.encrypts
    assert verdict.ports is None


def test_no_security_path_is_clear():
    bench = Bench(esp())
    assert bench(seen(0)) is NONE
    bench.table.opaque_interfaces = True
    assert bench(seen(0)) is UNKNOWN
    assert bench(seen(0x1001)) is EXACT


@pytest.mark.parametrize("buried", [False, True])
@pytest.mark.parametrize("sa", [esp(), tunnel(), ah()])
def test_no_security_path_is_clear_only_while_the_stamp_stands(sa, buried):
    """Packets pass without it before anybody is told."""
    bench = Bench(sa)
    if buried:
        bench.remove(sa)
    stands = True
    bench.table.stamp_stands = lambda: stands
    assert bench(seen(0)) is NONE
    stands = False
    verdict = bench.judge(seen(0))
    assert verdict.assurance is UNKNOWN
    assert "just have been lost" in verdict.reason
    assert not bench.table.ignores_ports(seen(0))


def test_whom_no_sa_can_have_carried_is_clear_and_nobody_is_asked():
    bench = Bench(esp(source=OTHER), comp(), larval())
    bench.table.stamp_stands = lambda: pytest.fail("asked")
    assert bench(seen(0)) is NONE
    assert bench.table.ignores_ports(seen(0))


@pytest.mark.parametrize("ask", ["judge", "ignores_ports"])
def test_an_sa_that_comes_may_carry_what_none_did(ask):
    bench = Bench()
    getattr(bench.table, ask)(seen(0))
    epoch = bench.mirror.epoch
    bench.tell(esp())
    assert bench.mirror.epoch != epoch


def test_what_may_be_older_than_an_sa_that_is_forgotten_is_in_doubt():
    """A queue waits for its program, longer than removed SAs are remembered."""
    weak, good = null(), esp()
    bench = Bench(weak)
    before = bench.mirror.changes
    bench.remove(weak)
    gone = bench.mirror.changes
    bench.wait(TOMBSTONE_SECONDS)
    bench.tell(good)
    assert bench(seen(0x1001, after=before)) is UNKNOWN
    assert bench(seen(0x1001, after=gone)) is EXACT
    bench.tell(esp(0x1002))
    assert bench(seen(0x1002, after=before)) is EXACT, "of another number nothing went"


@pytest.mark.parametrize("late", [False, True])
def test_what_may_have_come_and_gone_while_tables_were_read_is_not_excluded(late):
    lasting, new = esp(0x1002), esp()
    bench = Bench(lasting)
    before = bench.mirror.changes
    bench.mirror.begin_resync(bench.now)
    for sa in (lasting,) if late else (lasting, new):
        bench.mirror.load(SAAdded(sa), bench.now)
    bench.mirror.finish_resync(bench.now)
    if late:
        bench.tell(new)
    assert bench(seen(0x1001, after=before)) is UNKNOWN
    assert bench(seen(0x1001, after=bench.mirror.changes)) is EXACT
    assert bench(seen(0x1002, after=before)) is EXACT, "that one had its number all the time"


def test_doubt_is_the_end_of_it():
    verdict = Bench(esp()).judge(seen(0x1001, doubt="truncated"))
    assert (verdict.assurance, verdict.reason) == (UNKNOWN, "truncated")


def test_nothing_holds_during_a_resync():
    bench = Bench(esp(), protect())
    bench.mirror.begin_resync(bench.now)
    for generation in (0, 1):
        assert bench(seen(0x1001, generation=generation)) is UNKNOWN
        assert bench(seen(0, generation=generation)) is UNKNOWN


def test_a_mark_that_another_stamp_wrote_proves_nothing():
    bench = Bench(esp())
    assert bench(seen(0x1001, generation=2)) is UNKNOWN
    bench.table.generation = 0
    assert bench(seen(0x1001)) is UNKNOWN
    assert bench(seen(0)) is UNKNOWN


def test_a_spoofed_mark_without_a_stamp_is_no_evidence():
    assert Bench(esp())(seen(0x1001, generation=0)) is UNKNOWN
    assert Bench()(seen(0x1001, generation=0)) is NONE


def test_a_mark_that_was_not_read_proves_nothing():
    assert Bench(esp())(seen(mark=None)) is UNKNOWN


@pytest.mark.parametrize(
    "sa",
    [
        esp(source=OTHER),
        esp(destination=OTHER),
        esp(direction=Direction.OUT),
        esp(direction=Direction.FWD),
        esp(source=LOCAL, destination=PEER),
        larval(0x1001),
        tunnel(selector=Selector(source=OTHER, source_prefix=32, family=2)),
        tunnel(selector=Selector(proto=IPPROTO_TCP)),
    ],
)
def test_an_sa_that_cannot_have_carried_it_is_not_taken(sa):
    verdict = Bench(sa).judge(seen(0x1001))
    assert verdict.assurance is UNKNOWN
    assert verdict.protection.integrity is None


def test_a_number_that_is_known_for_others_does_not_wait():
    bench = Bench(esp(source=OTHER))
    assert bench.judge(seen(0x1001)) is not MISSING.verdict
    epoch = bench.mirror.epoch
    bench.tell(tunnel())
    assert bench.mirror.epoch != epoch
    assert bench(seen(0x1001)) is EXACT


def test_selectors_that_match_are_no_hindrance():
    selector = Selector(
        source=PEER, source_prefix=32, destination_port=5000, destination_port_mask=0xFFFF, family=2
    )
    verdict = Bench(tunnel(selector=selector)).judge(seen(0x1001))
    assert verdict.assurance is EXACT
    assert verdict.ports == (17, 5000, 0)
    selector = Selector(source_port=40000, source_port_mask=0xFFFF)
    assert Bench(tunnel(selector=selector)).judge(seen(0x1001)).ports == (17, 0, 40000)


@pytest.mark.parametrize(
    ("twin", "privacy", "integrity", "tunnel_mode"),
    [
        (comp(), False, False, False),
        (replace(comp(mode=Mode.TUNNEL), proto=4), False, False, None),
        (null(mark=Mark(1, 1)), False, True, False),
        (ah(), False, True, False),
        (esp(encryption=CBC, if_id=3), True, False, False),
        (esp(aead=GMAC, mark=Mark(1, 1)), False, True, False),
        (tunnel(), True, True, None),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_of_several_the_weakest_counts(twin, privacy, integrity, tunnel_mode, order):
    verdict = Bench(*[esp(), twin][::order]).judge(seen(0x1001))
    p = verdict.protection
    assert verdict.assurance is EXACT
    assert (p.privacy, p.integrity, p.tunnel) == (privacy, integrity, tunnel_mode)
    assert len(p.groups) == 2


def test_a_larval_twin_and_one_for_others_do_not_count():
    bench = Bench(esp(), larval(0x1001, proto=51), null(destination=OTHER), ah(destination=OTHER))
    assert bench.judge(seen(0x1001)).protection.privacy is True


@pytest.mark.parametrize(("twin", "protected"), [(comp, False), (ah, True)])
def test_a_spoofed_source_does_not_borrow_another_s_strength(twin, protected):
    """The kernel finds an inbound SA without looking at the source of the packet."""
    for facts in ([esp(), twin(source=OTHER)], [twin(source=OTHER), esp()]):
        p = Bench(*facts).judge(seen(0x1001)).protection
        assert (p.privacy, p.integrity) == (False, protected)


def test_a_removed_sa_lends_nothing_to_its_successor_from_elsewhere():
    bench = Bench(esp(source=OTHER))
    bench.tell(null())
    p = bench.judge(seen(0x1001, peer=OTHER)).protection
    assert (p.privacy, p.integrity) == (False, True)
    bench.wait(TOMBSTONE_SECONDS)
    assert bench(seen(0x1001, peer=OTHER)) is UNKNOWN


def test_nat_between_own_addresses_makes_a_twin_possible():
    bench = Bench(esp(), comp(destination=OTHER), null(destination=pack_address("2001:db8::1")))
    assert bench.judge(seen(0x1001)).protection.integrity is True
    bench.table.is_own = lambda address: True
    p = bench.judge(seen(0x1001)).protection
    assert (p.privacy, p.integrity) == (False, False)
    assert len(p.groups) == 2, "of the other family it cannot have been"


def test_two_tunnels_with_one_number_are_told_apart_by_their_selectors_only():
    weak = replace(null(), source=OTHER, destination=GATE, mode=Mode.TUNNEL)
    assert Bench(tunnel(), weak).judge(seen(0x1001)).protection.privacy is False
    weak = replace(weak, selector=Selector(source=OTHER, source_prefix=32, family=2))
    assert Bench(tunnel(), weak).judge(seen(0x1001)).protection.privacy is True


def test_a_tunnel_that_leads_away_is_no_candidate_where_own_addresses_are_known():
    away = replace(null(), source=GATE, destination=FAR, mode=Mode.TUNNEL)
    bench = Bench(tunnel(), away)
    assert bench.judge(seen(0x1001)).protection.privacy is False
    bench.table.is_own = {GATE, LOCAL}.__contains__
    assert bench.judge(seen(0x1001)).protection.privacy is True
    assert Bench(away)(seen(0x1001)) is EXACT
    bench = Bench(away)
    bench.table.is_own = {GATE, LOCAL}.__contains__
    assert bench(seen(0x1001)) is UNKNOWN


@pytest.mark.parametrize("enforced", [None, Template()])
def test_whole_packets_from_hardware_may_be_merged(enforced):
    """Its SA is one of those that count: then others' packets may be in the same datagram."""
    offloaded = esp(0x1001, offload=Offload(3, inbound=True, packet=True))
    crypto = replace(offloaded, offload=Offload(3, inbound=True, packet=False))
    evidence = seen(0x1001, generation=0 if enforced else 1, enforced=enforced)
    for protocol in (IPPROTO_UDP, IPPROTO_TCP):
        evidence = replace(evidence, protocol=protocol)
        assert Bench(crypto).judge(evidence).protection.privacy is True
        verdict = Bench(ah(), offloaded).judge(evidence)
        assert "offload" in verdict.reason
        assert (verdict.assurance, verdict.protection.integrity) == (UNKNOWN, None)
        bench = Bench(offloaded)
        bench.remove(offloaded)
        assert "offload" in bench.judge(evidence).reason, "it may have been queued"


def test_compression_beside_is_no_longer_excluded():
    assert Bench(esp()).judge(seen(0x1001)).protection.compression is False
    assert Bench(esp(), comp(0x77)).judge(seen(0x1001)).protection.compression is None
    assert Bench(comp()).judge(seen(0x1001)).protection.compression is True


# Missing and removed SAs


def test_without_anybody_to_ask_it_waits():
    mirror = Mirror()
    mirror.begin_resync(0)
    mirror.finish_resync(0)
    table = TruthTable(mirror)
    table.generation = 1
    assert table.judge(seen(0x1001)) is MISSING


def test_a_missing_sa_is_asked_for_once_and_then_waited_for():
    bench = Bench()
    bench.answer = None
    assert bench.judge(seen(0x1001)) is MISSING.verdict
    assert {(k.destination, k.proto, k.spi) for k in bench.asked} == {
        (LOCAL, 50, 0x1001),
        (LOCAL, 51, 0x1001),
    }
    asked = len(bench.asked)
    assert bench.table.judge_again(seen(0x1001), bench.now + 2, bench.now) is MISSING
    assert len(bench.asked) == asked


def test_what_the_question_finds_counts_at_once():
    bench = Bench()
    bench.answer = [null()]
    assert bench.judge(seen(0x1001)).protection.privacy is False
    bench = Bench()
    bench.answer = []
    assert bench.judge(seen(0x1001)) is MISSING.verdict, "a tunnel cannot be asked for"


def test_a_removed_sa_speaks_for_what_was_queued():
    bench = Bench(esp())
    bench.remove(esp())
    assert bench(seen(0x1001)) is EXACT
    assert esp().key in bench.asked, "its number may be in use again"
    bench.wait(TOMBSTONE_SECONDS)
    assert bench(seen(0x1001)) is UNKNOWN


def test_a_removed_sa_does_not_speak_while_nobody_answers():
    bench = Bench(esp())
    bench.remove(esp())
    bench.answer = None
    assert bench.judge(seen(0x1001)) is MISSING.verdict


def test_a_number_that_is_in_use_again_without_our_knowledge():
    bench = Bench(esp())
    bench.remove(esp())
    bench.answer = [null()]
    assert bench.judge(seen(0x1001)).protection.privacy is False


@pytest.mark.parametrize(("first", "second"), [(esp(), null()), (null(), esp())])
def test_a_reused_number_is_as_weak_as_either_until_the_tombstone_is_gone(first, second):
    bench = Bench(first)
    bench.remove(first)
    bench.tell(second)
    assert bench.judge(seen(0x1001)).protection.privacy is False
    bench.wait(TOMBSTONE_SECONDS)
    assert bench.judge(seen(0x1001)).protection.privacy is second.encrypts


def test_an_update_in_place_is_as_weak_as_either():
    bench = Bench(null())
    bench.tell(esp())
    assert bench.judge(seen(0x1001)).protection.privacy is False


def test_what_came_after_the_deadline_does_not_count():
    bench = Bench()
    bench.answer = None
    deadline = bench.now + 2
    bench.wait(3)
    bench.tell(esp())
    again = bench.table.judge_again(seen(0x1001), deadline, bench.now).verdict
    assert (again.assurance, again is MISSING.verdict) == (UNKNOWN, False)


def test_at_the_deadline_a_tombstone_does_not_speak_alone():
    """It waited because nobody could say whether the number was in use again: it may have been."""
    bench = Bench(esp())
    bench.remove(esp())
    bench.answer = None
    evidence, deadline = seen(0x1001), bench.now + 2
    assert bench.judge(evidence) is MISSING.verdict
    assert bench.table.judge_again(evidence, deadline, bench.now) is MISSING
    bench.wait(2.1)
    assert bench.table.judge_again(evidence, deadline, bench.now).verdict.assurance is UNKNOWN
    bench.tell(null())
    assert bench.table.judge_again(evidence, deadline, bench.now).verdict.assurance is UNKNOWN


def test_what_is_known_at_the_deadline_is_as_weak_as_what_comes_later():
    bench = Bench()
    bench.answer = None
    evidence, deadline = seen(0x1001), bench.now + 2
    assert bench.judge(evidence) is MISSING.verdict
    bench.tell(esp())
    bench.wait(3)
    bench.tell(null(mark=Mark(1, 1)))
    p = bench.table.judge_again(evidence, deadline, bench.now).verdict.protection
    assert (p.privacy, p.integrity) == (False, True)
    bench.mirror.begin_resync(bench.now)
    assert bench.table.judge_again(evidence, deadline, bench.now).verdict.assurance is UNKNOWN


# By inference


def inferred(**fields):
    return seen(generation=0, **fields)


def test_a_policy_that_demands_protection_vouches_weakly():
    verdict = Bench(protect(), esp()).judge(inferred())
    assert verdict.assurance is POLICY
    assert verdict.protection.privacy is True
    assert verdict.protection.policy == "any → any priority 10"


def test_a_policy_speaks_only_for_what_came_after_it():
    bench = Bench(esp())
    queued = inferred(after=bench.mirror.changes)
    bench.tell(protect())
    bench.wait(3600)
    verdict = bench.judge(queued)
    assert (verdict.assurance, verdict.protection.integrity) == (UNKNOWN, None)
    assert "arrived before" in verdict.reason
    assert bench(inferred(after=NEVER)) is UNKNOWN
    later = inferred(after=bench.mirror.changes)
    assert bench(later) is POLICY
    bench.tell(protect(priority=9))
    assert bench(later) is UNKNOWN
    assert bench(inferred(after=bench.mirror.changes)) is POLICY


def test_what_a_bypass_let_in_is_not_lent_the_policy_behind_it():
    bypass = replace(protect(priority=1, index=16, selector=Selector(proto=17)), templates=())
    bench = Bench(protect(), bypass, esp())
    queued = inferred(after=bench.mirror.changes)
    assert bench(queued) is UNKNOWN
    bench.mirror.apply(PolicyDeleted(bypass.key), bench.now)
    bench.wait(3600)
    assert bench(queued) is UNKNOWN
    assert bench(inferred(after=bench.mirror.changes)) is POLICY


def test_properties_are_those_of_what_may_have_been_queued_too():
    bench = Bench(protect(), null())
    bench.remove(null())
    bench.tell(esp(0x1002))
    p = bench.judge(inferred()).protection
    assert (p.privacy, p.integrity) == (False, True)
    bench.wait(TOMBSTONE_SECONDS)
    assert bench.judge(inferred()).protection.privacy is True


def test_nor_what_a_policy_let_in_that_is_gone_called_clear():
    bench = Bench(protect())
    queued = inferred(after=bench.mirror.changes)
    bench.mirror.apply(PolicyDeleted(protect().key), bench.now)
    bench.wait(3600)
    assert bench(queued) is UNKNOWN
    assert bench(inferred(after=bench.mirror.changes)) is NONE
    bench.mirror.apply(DefaultActions(*[PolicyAction.BLOCK] * 3), bench.now)
    blocked = inferred(after=bench.mirror.changes)
    bench.mirror.apply(DefaultActions(*[PolicyAction.ALLOW] * 3), bench.now)
    assert bench(blocked) is UNKNOWN


def test_changes_for_others_are_no_matter():
    bench = Bench(protect(), esp())
    queued = inferred(after=bench.mirror.changes)
    other = protect(priority=1, selector=Selector(OTHER, source_prefix=32, family=2), index=16)
    bench.tell(other, protect(priority=99, selector=Selector(proto=17)))
    bench.mirror.apply(PolicyDeleted(other.key), bench.now)
    assert bench(queued) is POLICY


def test_after_a_resync_policies_speak_of_what_comes_then():
    bench = Bench(protect(), esp())
    queued = inferred(after=bench.mirror.changes)
    bench.mirror.begin_resync(bench.now)
    bench.mirror.load(PolicyAdded(protect()), bench.now)
    bench.mirror.load(SAAdded(esp()), bench.now)
    bench.mirror.finish_resync(bench.now)
    assert bench(queued) is UNKNOWN
    assert bench(inferred(after=bench.mirror.changes)) is POLICY


@pytest.mark.parametrize("enforced", [None, Template()])
def test_an_interface_that_went_may_have_hidden_what_is_queued(enforced):
    bench = Bench(esp(), protect())
    fields = {"enforced": enforced, "after": bench.mirror.changes}
    bench.table.opaque_interfaces = True
    bench.mirror.count_change()
    bench.table.opaque_interfaces = False
    bench.table.links_until = bench.mirror.count_change()
    queued = [seen(0, **fields), inferred(**fields)]
    assert [bench(each) for each in queued] == [UNKNOWN, UNKNOWN]
    assert bench(seen(0x1001, **fields)) is EXACT
    fields["after"] = bench.mirror.changes
    assert bench(seen(0, **fields)) is NONE
    assert bench(inferred(**fields)) is (Assurance.ENFORCED if enforced else POLICY)


def test_an_address_that_went_may_have_been_the_sender_s():
    bench = Bench(protect(), esp(), comp(destination=OTHER))
    after = bench.mirror.changes
    bench.table.links_until = bench.mirror.count_change()
    assert bench(inferred(after=after)) is UNKNOWN
    assert bench(inferred(after=bench.mirror.changes)) is POLICY
    assert bench.judge(seen(0x1001, after=after)).protection.integrity is False
    assert bench.judge(seen(0x1001, after=bench.mirror.changes)).protection.integrity is True
    away = replace(null(), source=GATE, destination=FAR, mode=Mode.TUNNEL)
    bench = Bench(tunnel(), away)
    bench.table.is_own = {GATE, LOCAL}.__contains__
    assert bench.judge(seen(0x1001)).protection.privacy is True
    bench.table.links_until = NOW + 1
    assert bench.judge(seen(0x1001)).protection.privacy is False


@pytest.mark.parametrize(
    "policy",
    [
        protect(Template(optional=True)),
        protect(Template(proto=108)),
        replace(protect(), templates=()),
        protect(action=PolicyAction.BLOCK),
        protect(direction=Direction.OUT),
        protect(direction=Direction.FWD),
        protect(index=8 | 4),
        protect(if_id=7),
        protect(selector=Selector(proto=IPPROTO_TCP)),
        protect(selector=Selector(destination_port=53, destination_port_mask=0xFFFF)),
    ],
)
def test_a_policy_that_demands_nothing_of_it_does_not_vouch(policy):
    assert Bench(policy, esp())(inferred()) is UNKNOWN


def test_without_anything_that_could_carry_it_it_is_clear():
    assert Bench()(inferred()) is NONE
    assert Bench(protect(Template(optional=True)))(inferred()) is NONE
    assert Bench(esp(source=OTHER), comp(), larval())(inferred()) is NONE
    assert Bench(tunnel())(inferred()) is UNKNOWN
    bench = Bench(esp())
    bench.remove(esp())
    assert bench(inferred()) is UNKNOWN


def test_such_a_conclusion_is_drawn_anew_after_an_addition():
    bench = Bench()
    assert bench(inferred()) is NONE
    epoch = bench.mirror.epoch
    bench.tell(esp())
    assert bench.mirror.epoch != epoch


def test_a_passing_policy_of_lower_number_wins():
    bypass = replace(protect(priority=1), templates=())
    assert Bench(protect(), bypass)(inferred()) is NONE


def test_policies_with_one_number_must_agree():
    other = Selector(source=PEER, source_prefix=32, family=2)
    same = Bench(protect(), protect(selector=other, index=16), esp())
    assert same(inferred()) is POLICY
    bypass = replace(protect(selector=other, index=16), templates=())
    assert Bench(protect(), bypass)(inferred()) is UNKNOWN
    block = replace(bypass, action=PolicyAction.BLOCK)
    assert Bench(protect(), block)(inferred()) is UNKNOWN


def test_sub_policies_add_to_main_ones():
    sub = replace(protect(kind=1, index=16), templates=())
    assert Bench(protect(), sub)(inferred()) is POLICY
    assert Bench(sub)(inferred()) is NONE
    blocking = replace(sub, action=PolicyAction.BLOCK)
    assert Bench(protect(), blocking)(inferred()) is UNKNOWN


def test_where_the_default_blocks_something_else_let_it_in():
    bench = Bench()
    bench.mirror.apply(DefaultActions(*[PolicyAction.BLOCK] * 3), bench.now)
    assert bench(inferred()) is UNKNOWN


def test_interfaces_that_hide_security_paths_spoil_inference():
    bench = Bench(protect(), esp())
    bench.table.opaque_interfaces = True
    assert bench(inferred()) is UNKNOWN
    assert Bench()(inferred()) is NONE


def test_what_a_host_sends_to_itself_meets_no_policy():
    bench = Bench(protect(), esp(source=LOCAL))
    assert bench(inferred(peer=LOCAL)) is UNKNOWN
    assert bench(inferred()) is POLICY
    bench.table.is_own = {PEER}.__contains__
    assert bench(inferred()) is UNKNOWN


def test_marks_that_matter_must_be_known():
    marked = protect(mark=Mark(5, 0xFF))
    bench = Bench(marked, esp())
    assert bench(inferred(mark=None)) is UNKNOWN
    assert bench(inferred(mark=5)) is POLICY
    assert bench(inferred(mark=5, protocol=IPPROTO_TCP)) is UNKNOWN
    bypass = replace(protect(priority=1, mark=Mark(5, 0xFF)), templates=())
    assert Bench(protect(), bypass)(inferred(mark=5)) is NONE


@pytest.mark.parametrize(
    "bound",
    [
        protect(priority=1, selector=Selector(ifindex=3)),
        replace(protect(priority=1, selector=Selector(ifindex=1)), templates=()),
        protect(priority=99, selector=Selector(ifindex=1)),
        esp(2, selector=Selector(ifindex=3)),
    ],
)
def test_which_interface_is_compared_is_not_known(bound):
    """The kernel takes the route's device, such as lo, and not the one that a packet came by."""
    bench = Bench(protect(), esp())
    assert bench(inferred()) is POLICY
    bench.tell(bound)
    verdict = bench.judge(inferred())
    assert (verdict.assurance, verdict.protection.integrity) == (UNKNOWN, None)
    assert "interfaces" in verdict.reason
    assert Bench(bound)(inferred()) is UNKNOWN, "nor is it known to be clear"
    assert bench(seen(0x1001)) is EXACT


def test_where_nothing_inbound_names_an_interface_inference_stands():
    bound = Selector(ifindex=3)
    bench = Bench(protect(), esp())
    bench.tell(protect(direction=Direction.OUT, selector=bound), protect(index=12, selector=bound))
    bench.tell(esp(2, LOCAL, PEER, direction=Direction.OUT, selector=bound))
    assert bench(inferred()) is POLICY
    late = esp(2, selector=bound)
    bench.tell(late)
    assert bench(inferred()) is UNKNOWN
    bench.remove(late)
    assert bench(inferred()) is POLICY


def test_a_tunnel_whose_selector_names_an_interface_may_have_carried_it():
    weak = tunnel(0x1001, mark=Mark(1, 1), encryption=CBC, selector=Selector(ifindex=3))
    assert Bench(tunnel(), weak).judge(seen(0x1001)).protection.integrity is False


def test_properties_are_the_weakest_of_what_meets_the_template():
    p = (
        Bench(protect(Template(reqid=1)), esp(reqid=1), null(2, reqid=1))
        .judge(inferred())
        .protection
    )
    assert (p.privacy, p.integrity) == (False, True)
    p = (
        Bench(protect(Template(reqid=1)), esp(reqid=1), null(2, reqid=2))
        .judge(inferred())
        .protection
    )
    assert p.privacy is True
    p = Bench(protect()).judge(inferred()).protection
    assert (p.privacy, p.integrity, p.tunnel) == (None, None, False)


@pytest.mark.parametrize(
    "template",
    [
        Template(proto=51),
        Template(mode=Mode.TUNNEL),
        Template(reqid=9),
        Template(spi=9),
    ],
)
def test_sas_that_do_not_meet_the_template_lend_it_nothing(template):
    assert Bench(protect(template), esp(reqid=1)).judge(inferred()).protection.privacy is None


@pytest.mark.parametrize(
    ("source", "destination", "privacy"),
    [
        (FAR, GATE, True),
        (FAR, OTHER, True),
        (FAR, b"", True),
        (b"", GATE, True),
        (b"", b"", True),
        (OTHER, GATE, None),
    ],
)
def test_templates_of_tunnels_name_outer_addresses(source, destination, privacy):
    template = Template(mode=Mode.TUNNEL, source=source, destination=destination)
    verdict = Bench(protect(template), tunnel()).judge(inferred())
    assert (verdict.protection.privacy, verdict.protection.tunnel) == (privacy, True)


def test_several_demanded_templates_add_up():
    p = Bench(protect(Template(proto=51), Template()), ah(1), esp(2)).judge(inferred()).protection
    assert (p.privacy, p.integrity, p.ipoptions) == (True, True, True)
    assert len(p.groups) == 2
    p = Bench(protect(Template(proto=51), Template()), ah(1)).judge(inferred()).protection
    assert (p.privacy, p.integrity) == (None, True)


def test_marks_that_sas_write_tell_them_apart():
    writes = [null(1, set_mark=Mark(1, 0xFFFFFFFF)), esp(2, set_mark=Mark(2, 0xFFFFFFFF))]
    bench = Bench(protect(), *writes)
    assert bench.judge(inferred(mark=2)).protection.privacy is True
    assert bench.judge(inferred(mark=1)).protection.privacy is False
    assert bench.judge(inferred(mark=None)).protection.privacy is False
    partly = null(3, set_mark=Mark(1, 0xFF))
    assert Bench(protect(), partly).judge(inferred(mark=2)).protection.privacy is False


def test_ports_belong_to_the_channel_where_the_policy_names_them():
    selector = Selector(destination_port=5000, destination_port_mask=0xFFFF, proto=17)
    assert Bench(protect(selector=selector), esp()).judge(inferred()).ports == (17, 5000, 0)


def test_a_migration_does_not_lend_protection():
    bench = Bench(protect(), esp())
    bench.mirror.apply(SAMigrated(50, Mode.TRANSPORT, 0, PEER, LOCAL, OTHER, LOCAL), bench.now)
    assert bench.judge(seen(0x1001)).assurance is EXACT, "a tombstone, for what was queued"
    bench.wait(TOMBSTONE_SECONDS)
    assert bench(seen(0x1001)) is UNKNOWN
    assert bench(seen(0x1001, peer=OTHER)) is EXACT


def test_removing_the_policy_ends_the_inference():
    bench = Bench(protect(), esp())
    bench.mirror.apply(PolicyDeleted(protect().key), bench.now)
    assert bench(inferred()) is UNKNOWN


# In general

SIX = pack_address("2001:db8::1")
facts = st.lists(
    st.sampled_from(
        [
            esp(),
            null(),
            ah(),
            comp(),
            larval(0x1001),
            tunnel(),
            esp(encryption=CBC),
            esp(0x1002),
            esp(source=OTHER),
            esp(direction=Direction.OUT),
            esp(source=LOCAL, destination=PEER),
            protect(),
            protect(Template(optional=True)),
            protect(action=PolicyAction.BLOCK, priority=1),
            replace(protect(priority=1), templates=()),
        ]
    ),
    max_size=6,
)


@settings(max_examples=400, deadline=None)
@given(
    facts,
    st.sampled_from([0, 0x1001, 0x1002, 0x1003]),
    st.sampled_from([0, 1, 2]),
    st.sampled_from([PEER, OTHER, LOCAL]),
    st.booleans(),
    st.booleans(),
)
def test_no_claim_without_proof(known, spi, generation, peer, synced, opaque):
    """Whatever the tables hold: a claim of protection needs an SA that protects, for this pair."""
    bench = Bench(*known)
    bench.table.opaque_interfaces = opaque
    if not synced:
        bench.mirror.begin_resync(bench.now)
    verdict = bench.judge(seen(spi, generation=generation, peer=peer))
    p = verdict.protection
    if verdict.assurance is EXACT:
        assert synced
        assert generation == 1
        assert spi
        assert p.groups
    if verdict.assurance is NONE:
        assert not opaque
        assert p[:5] == (False,) * 5
    if verdict.assurance is UNKNOWN:
        assert p[:5] == (None,) * 5
        assert verdict.reason
    if p.integrity:
        assert verdict.assurance in (EXACT, POLICY)
        suitable = [
            sa
            for sa in (*bench.mirror.sas(), *bench.mirror.tombstones())
            if sa.authenticates
            and sa.direction is None
            and (sa.mode is Mode.TUNNEL or (sa.source, sa.destination) == (peer, LOCAL))
            and (generation == 0 or sa.spi == spi)
        ]
        assert suitable
        if p.privacy:
            assert any(sa.encrypts for sa in suitable)
        if generation:
            # Whatever the source says, none of those with this number may be weaker.
            assert all(
                sa.authenticates and (sa.encrypts or not p.privacy)
                for sa in bench.mirror.sas()
                if sa.spi == spi
                and sa.destination == LOCAL
                and sa.direction is None
                and not sa.larval
            )


# Ports


def _ported(**fields) -> Selector:
    return Selector(PEER, LOCAL, 32, 32, family=2, **fields)


_selectors = [
    Selector(),
    _ported(),
    _ported(source_port=40000, source_port_mask=0xFFFF),
    _ported(destination_port=5000, destination_port_mask=0xFFFF),
]


def test_ports_are_ignored_where_no_sa_with_the_number_asks_for_them():
    asking = Selector(source_port=40000, source_port_mask=0xFFFF)
    bench = Bench(esp(), tunnel(0x1002, selector=asking), tunnel(0x1003, selector=_ported()))
    ignores = bench.table.ignores_ports
    assert ignores(seen(0x1001))
    assert ignores(seen(0x1003))
    assert not ignores(seen(0x1002))
    # Policies may ask for ports, too.
    assert not ignores(seen(0x1001, generation=0))
    bench.remove(tunnel(0x1002, selector=asking))
    assert not ignores(seen(0x1002))


@given(
    st.lists(
        st.builds(
            lambda make, spi, selector: make(spi, selector=selector),
            st.sampled_from([esp, ah, comp, tunnel]),
            st.sampled_from([0x1001, 0x1002]),
            st.sampled_from(_selectors),
        ),
        max_size=4,
    ),
    st.lists(st.integers(0, 3), max_size=2),
    st.sampled_from([0, 0x1001, 0x1002]),
    st.sampled_from([0, 1, 2]),
)
def test_what_ignores_ports_is_judged_alike_with_others(known, gone, spi, generation):
    bench = Bench(*known)
    for index in gone:
        if index < len(known):
            bench.remove(known[index])
    bench.answer = None
    evidence = seen(spi, generation=generation)
    if bench.table.ignores_ports(evidence):
        other = replace(evidence, peer_port=40001, local_port=5001)
        assert bench.table.judge(evidence) == bench.table.judge(other)
