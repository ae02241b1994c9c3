"""The SPD against a scan of all policies, in the kernel's order."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipsec_aio.enums import Direction, PolicyAction
from ipsec_aio.flow import Flow, Mark, Selector, pack_address
from ipsec_aio.policy import Policy, PolicyKey, Template
from ipsec_aio.spd import GONE_LIMIT, SPD

A, B, C = (pack_address(f"192.0.2.{n}") for n in (1, 2, 3))
SIX = pack_address("2001:db8::1")


def policy(source=b"", s=0, destination=b"", d=0, *, index=8, family=2, **fields) -> Policy:
    names = ("source_port", "source_port_mask", "destination_port", "destination_port_mask")
    selector = {n: fields.pop(n) for n in (*names, "proto", "ifindex") if n in fields}
    return Policy(
        selector=Selector(
            source=source,
            destination=destination,
            source_prefix=s,
            destination_prefix=d,
            family=family,
            **selector,
        ),
        index=index,
        **fields,
    )


def test_the_lowest_number_wins():
    spd = SPD()
    wide = policy(priority=20)
    narrow = policy(A, 32, B, 32, priority=30)
    spd.add(wide)
    spd.add(narrow)
    assert spd.lookup(Flow(A, B), Direction.IN) == wide
    urgent = policy(A, 24, priority=10)
    spd.add(urgent)
    assert spd.lookup(Flow(A, B), Direction.IN) == urgent
    assert spd.lookup(Flow(A, B), Direction.OUT) is None


def test_among_equals_the_oldest_wins_and_a_replacement_keeps_its_place():
    spd = SPD()
    first, second = policy(A, 32), policy(destination=B, d=32)
    spd.add(first)
    spd.add(second)
    assert spd.lookup(Flow(A, B), Direction.IN) == first
    changed = policy(A, 32, templates=(Template(),))
    assert spd.add(changed)
    assert spd.lookup(Flow(A, B), Direction.IN) == changed
    assert spd.ties(Flow(A, B), Direction.IN) == [[changed, second]]
    later = policy(A, 32, priority=5)
    spd.add(later)
    spd.add(policy(A, 32))
    assert spd.lookup(Flow(A, B), Direction.IN) == second


def test_a_dump_is_newest_first():
    spd = SPD()
    old, new = policy(A, 32), policy(destination=B, d=32)
    spd.load(new)
    spd.load(old)
    spd.add(policy(A, 24, B, 24))
    assert spd.lookup(Flow(A, B), Direction.IN) == old


def test_an_update_of_counters_is_no_change():
    spd = SPD()
    one = policy(A, 32)
    assert spd.add(one)
    assert not spd.add(policy(A, 32, index=8, lifetime=one.lifetime))
    assert spd.changes == 1
    assert spd.add(policy(A, 32, action=PolicyAction.BLOCK))
    assert spd.changes == 3, "it went, and another came"


def test_sub_policies_come_first_and_main_ones_count_too():
    spd = SPD()
    main, sub = policy(priority=1), policy(priority=9, kind=1)
    spd.add(main)
    spd.add(sub)
    assert spd.lookup(Flow(A, B), Direction.IN) == sub
    assert spd.ties(Flow(A, B), Direction.IN) == [[sub], [main]]


def test_policies_of_sockets_are_no_policies_of_the_spd():
    spd = SPD()
    assert not spd.add(policy(index=8 | 4))
    assert len(spd) == 0


def test_marks_and_interfaces_are_seen_while_they_are_there():
    spd = SPD()
    marked = policy(A, 32, mark=Mark(5, 0xFF), index=8)
    bound = policy(A, 32, ifindex=3, index=16)
    out = policy(A, 24, mark=Mark(5, 0xFF), ifindex=3, direction=Direction.OUT, index=25)
    spd.add(out)
    assert not spd.marked_inbound
    assert not spd.names_interface(Direction.IN)
    assert spd.names_interface(Direction.OUT)
    spd.add(marked)
    spd.add(bound)
    assert spd.marked_inbound
    assert spd.names_interface(Direction.IN)
    assert spd.lookup(Flow(A, B, mark=0x105), Direction.IN) == marked
    assert spd.lookup(Flow(A, B, mark=6), Direction.IN) == bound, "for all that is known"
    spd.remove(marked.key)
    assert spd.remove_index(16) == bound
    assert not spd.marked_inbound
    assert not spd.names_interface(Direction.IN)


def test_a_mark_outside_its_mask_matches_nothing():
    spd = SPD()
    spd.add(policy(mark=Mark(0x105, 0xFF)))
    assert spd.lookup(Flow(A, B, mark=0x105), Direction.IN) is None


def test_removal_by_key_index_and_type():
    spd = SPD()
    one, two, sub = policy(A, 32), policy(B, 32, index=16), policy(C, 32, index=24, kind=1)
    for p in (one, two, sub):
        spd.add(p)
    assert spd.get(one.key) == one
    assert spd.remove(one.key) == one
    assert spd.remove(one.key) is None
    assert spd.get(one.key) is None
    assert spd.remove_index(16) == two
    assert spd.remove_index(16) is None
    assert spd.flush(0) == 0
    assert spd.flush(1) == 1
    assert list(spd) == []


def test_an_index_that_was_given_anew_is_another_policy():
    spd = SPD()
    spd.add(policy(A, 32, index=8))
    spd.add(policy(A, 32, index=16))
    assert spd.remove_index(8) is None
    spd.add(policy(B, 32, index=16))
    assert spd.remove(policy(A, 32).key)
    assert spd.remove_index(16) == policy(B, 32, index=16)


def test_selectors_of_any_family_and_contradictory_ones():
    spd = SPD()
    spd.add(policy(family=0))
    assert spd.lookup(Flow(A, B), Direction.IN)
    assert spd.lookup(Flow(SIX, SIX), Direction.IN)
    spd.flush(0)
    spd.add(policy(SIX, 128, family=2))
    spd.add(policy(SIX, 128, A, 32, family=0))
    assert spd.lookup(Flow(SIX, A), Direction.IN) is None
    assert spd.flush(0) == 2


addresses = st.sampled_from([b"", A, B, C, SIX, pack_address("2001:db8::2")])
prefixes = st.sampled_from([0, 1, 8, 24, 30, 31, 32])
ports = st.sampled_from([0, 53, 5000])
masks = st.sampled_from([0, 0xFFFF, 0xFF00])


@st.composite
def policies(draw) -> Policy:
    source, destination = draw(addresses), draw(addresses)
    size = {len(a) for a in (source, destination) if a}
    return Policy(
        selector=Selector(
            source=source,
            destination=destination,
            source_prefix=draw(prefixes) if source else 0,
            destination_prefix=draw(prefixes) if destination else 0,
            source_port=draw(ports),
            source_port_mask=draw(masks),
            destination_port=draw(ports),
            destination_port_mask=draw(masks),
            proto=draw(st.sampled_from([0, 6, 17])),
            family={4: 2, 16: 10}[size.pop()] if len(size) == 1 else 0,
            ifindex=draw(st.sampled_from([0, 0, 2])),
        ),
        direction=draw(st.sampled_from(Direction)),
        priority=draw(st.integers(0, 3)),
        mark=draw(st.sampled_from([Mark(), Mark(1, 1), Mark(2, 0xFFFFFFFF)])),
        if_id=draw(st.sampled_from([0, 0, 7])),
        kind=draw(st.sampled_from([0, 0, 1])),
        index=draw(st.integers(1, 30)) * 8,
        action=draw(st.sampled_from(PolicyAction)),
    )


flows = st.builds(
    Flow,
    st.sampled_from([A, B, C]),
    st.sampled_from([A, B, C]),
    st.sampled_from([6, 17]),
    ports,
    ports,
    st.integers(0, 3),
    st.sampled_from([0, 7]),
) | st.builds(Flow, st.just(SIX), st.just(pack_address("2001:db8::2")), st.just(17), ports, ports)


def scan(known: dict[PolicyKey, Policy], flow: Flow, direction: Direction) -> Policy | None:
    for kind in (1, 0):
        found = [
            p
            for p in known.values()
            if p.kind == kind
            and p.direction is direction
            and p.if_id == flow.if_id
            and p.mark.matches(flow.mark)
            and p.selector.matches(flow)
        ]
        if found:
            return min(found, key=lambda p: p.priority)
    return None


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(policies(), st.booleans()), max_size=25), st.lists(flows, max_size=8))
def test_a_lookup_finds_what_a_scan_finds(steps, questions):
    spd, known = SPD(), {}
    for p, add in steps:
        key = p.key
        if add:
            spd.add(p)
            if key in known and known[key].priority != p.priority:
                del known[key]
            known[key] = p
        else:
            assert (spd.remove(key) is None) == (known.pop(key, None) is None)
    assert set(spd) == set(known.values())
    for flow in questions:
        for direction in Direction:
            found = spd.lookup(flow, direction)
            assert found == scan(known, flow, direction)
            ties = spd.ties(flow, direction)
            assert (ties[0][0] if ties else None) == found
    for key in known:
        spd.remove(key)
    assert not spd._tables


def test_a_lookup_does_not_scan():
    spd = SPD()
    for n in range(20_000):
        spd.add(policy(A, 32, n.to_bytes(4, "big"), 32, index=n * 8))
    flow = Flow(A, (19_999).to_bytes(4, "big"))
    start = time.perf_counter()
    for _ in range(100):
        assert spd.lookup(flow, Direction.IN)
    assert time.perf_counter() - start < 0.1  # a scan takes ten times that and more


def test_asking_for_what_is_not_there_leaves_nothing_behind():
    spd = SPD()
    spd.add(policy(A, 32))
    (table,) = spd._tables.values()
    before = len(table.places._shapes)
    for prefix in range(1, 32):
        absent = policy(A, prefix, B, prefix)
        assert spd.get(absent.key) is None
        assert spd.remove(absent.key) is None
    assert len(table.places._shapes) == before


def test_what_is_crowded_is_not_scanned():
    spd = SPD()
    start = time.perf_counter()
    pairs = [
        policy(A, 32, n.to_bytes(4, "big"), 32, index=n * 8, proto=proto)
        for n in range(5_000)
        for proto in (6, 17)
    ]
    for p in pairs:
        spd.add(p)
    assert len(list(spd)) == len(spd) == 10_000
    for p in pairs:
        assert spd.get(p.key) is p
    for p in pairs[:-1]:
        assert spd.remove(p.key) is p
    assert list(spd) == pairs[-1:]
    assert spd.remove(pairs[-1].key)
    assert not spd._tables
    assert time.perf_counter() - start < 5  # a scan for each takes minutes


# Since when it applies

FLOW = Flow(A, B, 17, 4000, 5000)


def stood(spd: SPD, after: int, flow: Flow = FLOW) -> bool:
    return spd.stood(spd.ties(flow, Direction.IN), flow, after)


def test_what_comes_first_stands_since_it_was_added():
    spd = SPD()
    before = spd.changes
    spd.add(policy(A, 32, priority=5))
    assert not stood(spd, before)
    assert stood(spd, since := spd.changes)
    spd.add(policy(A, 24, priority=9))
    spd.add(policy(C, 32, priority=1))
    spd.add(policy(A, 32, proto=17, direction=Direction.OUT))
    assert stood(spd, since), "none of these comes first for this flow"
    spd.add(policy(A, 32, proto=17, priority=1))
    assert not stood(spd, since)
    assert stood(spd, spd.changes)


@pytest.mark.parametrize(
    ("gone", "matters"),
    [
        ({"priority": 4}, True),
        ({"priority": 5}, True),
        ({"priority": 6}, False),
        ({"priority": 4, "source": C, "s": 32}, False),
        ({"priority": 4, "direction": Direction.OUT}, False),
        ({"priority": 4, "if_id": 7}, False),
        ({"priority": 4, "source_port": 1, "source_port_mask": 0xFFFF}, False),
        # What the packet had of these is not known any more.
        ({"priority": 4, "mark": Mark(5, 0xFF)}, True),
        ({"priority": 4, "ifindex": 3}, True),
        ({"priority": 9, "kind": 1}, True),
    ],
)
@pytest.mark.parametrize("how", ["remove", "remove_index", "flush", "replace"])
def test_what_came_first_and_is_gone(gone, matters, how):
    spd = SPD()
    spd.add(policy(A, 32, priority=5, index=8))
    first = policy(**{"source": A, "s": 24, "index": 16} | gone)
    spd.add(first)
    before = spd.changes
    match how:
        case "remove":
            spd.remove(first.key)
        case "remove_index":
            spd.remove_index(16)
        case "flush":
            spd.flush(first.kind)
            spd.add(policy(A, 32, priority=5, index=8))
            assert stood(spd, spd.changes)
            assert not stood(spd, before), "there was a moment without"
            return
        case _:
            spd.add(replace(first, priority=99))
    assert stood(spd, before) is not matters
    assert stood(spd, spd.changes)


def test_where_no_policy_is_left_any_that_went_matters():
    spd = SPD()
    spd.add(policy(A, 32, priority=5))
    before = spd.changes
    spd.remove(policy(A, 32, priority=5).key)
    assert not stood(spd, before)
    assert stood(spd, before, Flow(C, B))
    assert stood(spd, spd.changes)


def test_what_is_not_remembered_is_in_doubt():
    spd = SPD()
    spd.add(policy(A, 32))
    before = spd.changes
    for n in range(GONE_LIMIT):
        other = policy(C, 32, index=(n + 2) * 8)
        spd.add(other)
        spd.remove(other.key)
    assert stood(spd, before)
    spd.add(other)
    spd.remove(other.key)
    assert not stood(spd, before)
    assert stood(spd, spd.changes)
    before = spd.changes
    spd.doubt()
    assert not stood(spd, before)
    assert stood(spd, spd.changes)
    spd.doubt(1000)
    assert spd.changes == 1001


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(policies(), st.booleans()), max_size=30), flows, st.integers(0, 30))
def test_what_stood_was_always_first(steps, flow, start):
    spd = SPD()
    history: dict[int, object] = {}

    def note() -> None:
        ties = spd.ties(flow, Direction.IN)
        history[spd.changes] = [[(p.key, p.action, p.priority) for p in group] for group in ties]

    note()
    for p, add in steps:
        if add:
            spd.add(p)
        else:
            spd.remove(p.key)
        note()
    now = spd.ties(flow, Direction.IN)
    after = sorted(history)[min(start, len(history) - 1)]
    if spd.stood(now, flow, after):
        assert all(then == history[spd.changes] for when, then in history.items() if when >= after)
