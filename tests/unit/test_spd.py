"""The SPD against a scan of all policies, in the kernel's order."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipsec_aio.enums import Direction, PolicyAction
from ipsec_aio.flow import Flow, Mark, Selector, pack_address
from ipsec_aio.policy import Policy, PolicyKey, Template
from ipsec_aio.spd import SPD

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
    spd.add(wide, 0)
    spd.add(narrow, 0)
    assert spd.lookup(Flow(A, B), Direction.IN) == wide
    urgent = policy(A, 24, priority=10)
    spd.add(urgent, 0)
    assert spd.lookup(Flow(A, B), Direction.IN) == urgent
    assert spd.lookup(Flow(A, B), Direction.OUT) is None


def test_among_equals_the_oldest_wins_and_a_replacement_keeps_its_place():
    spd = SPD()
    first, second = policy(A, 32), policy(destination=B, d=32)
    spd.add(first, 0)
    spd.add(second, 0)
    assert spd.lookup(Flow(A, B), Direction.IN) == first
    changed = policy(A, 32, templates=(Template(),))
    assert spd.add(changed, 1)
    assert spd.lookup(Flow(A, B), Direction.IN) == changed
    assert spd.ties(Flow(A, B), Direction.IN) == [[changed, second]]
    later = policy(A, 32, priority=5)
    spd.add(later, 2)
    spd.add(policy(A, 32), 3)
    assert spd.lookup(Flow(A, B), Direction.IN) == second


def test_a_dump_is_newest_first():
    spd = SPD()
    old, new = policy(A, 32), policy(destination=B, d=32)
    spd.load(new, 0)
    spd.load(old, 0)
    spd.add(policy(A, 24, B, 24), 1)
    assert spd.lookup(Flow(A, B), Direction.IN) == old


def test_an_update_of_counters_is_no_change():
    spd = SPD()
    one = policy(A, 32)
    assert spd.add(one, 1)
    assert not spd.add(policy(A, 32, index=8, lifetime=one.lifetime), 5)
    assert spd.added(one) == 1
    assert spd.add(policy(A, 32, action=PolicyAction.BLOCK), 6)
    assert spd.added(one) == 6


def test_sub_policies_come_first_and_main_ones_count_too():
    spd = SPD()
    main, sub = policy(priority=1), policy(priority=9, kind=1)
    spd.add(main, 0)
    spd.add(sub, 0)
    assert spd.lookup(Flow(A, B), Direction.IN) == sub
    assert spd.ties(Flow(A, B), Direction.IN) == [[sub], [main]]


def test_policies_of_sockets_are_no_policies_of_the_spd():
    spd = SPD()
    assert not spd.add(policy(index=8 | 4), 0)
    assert len(spd) == 0


def test_marks_and_interfaces_are_seen_while_they_are_there():
    spd = SPD()
    marked = policy(A, 32, mark=Mark(5, 0xFF), index=8)
    bound = policy(A, 32, ifindex=3, index=16)
    out = policy(A, 24, mark=Mark(5, 0xFF), ifindex=3, direction=Direction.OUT, index=25)
    spd.add(out, 0)
    assert not spd.marked_inbound
    assert not spd.names_interface(Direction.IN)
    assert spd.names_interface(Direction.OUT)
    spd.add(marked, 0)
    spd.add(bound, 0)
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
    spd.add(policy(mark=Mark(0x105, 0xFF)), 0)
    assert spd.lookup(Flow(A, B, mark=0x105), Direction.IN) is None


def test_removal_by_key_index_and_type():
    spd = SPD()
    one, two, sub = policy(A, 32), policy(B, 32, index=16), policy(C, 32, index=24, kind=1)
    for p in (one, two, sub):
        spd.add(p, 0)
    assert spd.get(one.key) == one
    assert spd.remove(one.key) == one
    assert spd.remove(one.key) is None
    assert spd.get(one.key) is None
    assert spd.remove_index(16) == two
    assert spd.remove_index(16) is None
    assert spd.flush(0) == 0
    assert spd.flush(1) == 1
    assert list(spd) == []
    with pytest.raises(KeyError):
        spd.added(one)


def test_an_index_that_was_given_anew_is_another_policy():
    spd = SPD()
    spd.add(policy(A, 32, index=8), 0)
    spd.add(policy(A, 32, index=16), 0)
    assert spd.remove_index(8) is None
    spd.add(policy(B, 32, index=16), 0)
    assert spd.remove(policy(A, 32).key)
    assert spd.remove_index(16) == policy(B, 32, index=16)


def test_selectors_of_any_family_and_contradictory_ones():
    spd = SPD()
    spd.add(policy(family=0), 0)
    assert spd.lookup(Flow(A, B), Direction.IN)
    assert spd.lookup(Flow(SIX, SIX), Direction.IN)
    spd.flush(0)
    spd.add(policy(SIX, 128, family=2), 0)
    spd.add(policy(SIX, 128, A, 32, family=0), 0)
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
            spd.add(p, 0)
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
        spd.add(policy(A, 32, n.to_bytes(4, "big"), 32, index=n * 8), 0)
    flow = Flow(A, (19_999).to_bytes(4, "big"))
    start = time.perf_counter()
    for _ in range(100):
        assert spd.lookup(flow, Direction.IN)
    assert time.perf_counter() - start < 0.1  # a scan takes ten times that and more


def test_asking_for_what_is_not_there_leaves_nothing_behind():
    spd = SPD()
    spd.add(policy(A, 32), 0)
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
        spd.add(p, 0)
    assert len(list(spd)) == len(spd) == 10_000
    for p in pairs:
        assert spd.get(p.key) is p
    for p in pairs[:-1]:
        assert spd.remove(p.key) is p
    assert list(spd) == pairs[-1:]
    assert spd.remove(pairs[-1].key)
    assert not spd._tables
    assert time.perf_counter() - start < 5  # a scan for each takes minutes
