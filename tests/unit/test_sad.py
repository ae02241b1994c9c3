"""The SAD finds what a scan finds: by key, by number, by addresses and by selectors."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from sas import FAR, GATE, LOCAL, OTHER, PEER, ah, comp, esp, tunnel

from ipsec_aio.enums import Direction, Mode
from ipsec_aio.flow import Flow, Mark, Selector, pack_address
from ipsec_aio.protection import TUNNELS
from ipsec_aio.sa import SA, SAKey
from ipsec_aio.sad import SAD, Record

SIX, SEVEN = pack_address("2001:db8::6"), pack_address("2001:db8::7")
ADDRESSES = st.sampled_from([LOCAL, PEER, OTHER, FAR])


@st.composite
def selectors(draw: Any, ends: tuple[bytes, bytes]) -> Selector:
    kind = draw(st.sampled_from(["any", "ends", "some", "six", "odd"]))
    if kind == "any":
        return Selector(family=draw(st.sampled_from([0, 2])))
    if kind == "ends":
        return Selector(*ends, 32, 32, family=draw(st.sampled_from([0, 2])))
    if kind == "six":
        return Selector(SIX, SEVEN, draw(st.sampled_from([0, 64, 128])), 128, family=10)
    if kind == "odd":
        return Selector(SIX, draw(ADDRESSES), 8, 8, family=0)
    prefixes = st.sampled_from([0, 8, 24, 30, 32])
    return Selector(
        draw(ADDRESSES), draw(ADDRESSES), draw(prefixes), draw(prefixes),
        proto=draw(st.sampled_from([0, 17])), family=draw(st.sampled_from([0, 2])),
    )  # fmt: skip


@st.composite
def sas(draw: Any) -> SA:
    ends = draw(ADDRESSES), draw(st.sampled_from([LOCAL, GATE]))
    if draw(st.booleans()):
        ends = ends[1], ends[0]
    if draw(st.integers(0, 9)) == 0:
        ends = draw(st.sampled_from([b"", bytes(4)])), ends[1]
    return esp(
        draw(st.integers(1, 4)),
        *ends,
        mode=draw(st.sampled_from([Mode.TRANSPORT, Mode.TUNNEL, Mode.BEET])),
        selector=draw(selectors(ends)),
        direction=draw(st.sampled_from([None, *Direction])),
        mark=draw(st.sampled_from([Mark(), Mark(1, 3)])),
        if_id=draw(st.sampled_from([0, 0, 5])),
    )


FLOWS = st.builds(Flow, ADDRESSES, st.sampled_from([LOCAL, GATE, PEER]), st.sampled_from([6, 17]))


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(sas(), st.booleans()), max_size=30), st.lists(FLOWS, max_size=6))
def test_look_ups_find_what_a_scan_finds(steps: list[tuple[SA, bool]], flows: list[Flow]) -> None:
    sad, known = SAD(), {}
    for sa, add in steps:
        if add:
            sad.load(Record(sa, 0.0))
            known[sa.key] = sa
        else:
            record = sad.pop(sa.key)
            assert (record and record.sa) == known.pop(sa.key, None)
    living = set(known.values())
    assert len(sad) == len(known)
    assert {r.sa for r in sad} == living
    assert {r.sa for r in sad.tunnels()} == {sa for sa in living if sa.mode in TUNNELS}
    for spi in range(1, 5):
        assert {r.sa for r in sad.numbered(spi)} == {sa for sa in living if sa.spi == spi}
    for sa, _ in steps:
        for record in (sad.get(sa.key), sad.twin(sa)):
            assert (record and record.sa) == known.get(sa.key)
        ends = sa.source, sa.destination
        assert {r.sa for r in sad.between(*ends)} == {
            sa for sa in living if (sa.source, sa.destination) == ends
        }
        open_ends = (b"", bytes(4), bytes(16))
        assert {r.sa for r in sad.leading(*ends)} == {
            other
            for other in living
            if other.source in (ends[0], *open_ends) and other.destination in (ends[1], *open_ends)
        }
        assert {r.sa for r in sad.tunnels(sa.source)} == {
            other for other in living if other.source == sa.source and other.mode in TUNNELS
        }
    for flow in [*flows, Flow(SIX, SEVEN, 17)]:
        for direction in Direction:
            found = [r.sa for r in sad.admitting(flow.source, flow.destination, direction)]
            assert len(found) == len(set(found))
            assert {sa for sa in found if sa.selector.matches(flow)} >= {
                sa
                for sa in living
                if sa.direction in (None, direction) and sa.selector.matches(flow)
            }
    for key in known:
        assert sad.pop(key)
    assert not list(sad)
    assert not list(sad.admitting(PEER, LOCAL))
    assert not sad._crowded


# A number that many share


def crowd(count: int) -> list[SA]:
    return [
        esp(7, PEER, n.to_bytes(4, "big"), if_id=n % 3, mark=Mark(n % 2, 1))
        for n in range(1, count + 1)
    ]


def test_crowded_numbers_are_told_apart_by_key() -> None:
    sad = SAD()
    alike = [
        esp(7),
        ah(7),
        comp(7),
        esp(7, destination=OTHER),
        esp(7, mark=Mark(1, 1)),
        esp(7, if_id=2),
    ]
    for sa in alike:
        assert sad.get(sa.key) is None
        assert sad.twin(sa) is None
        sad.add(Record(sa, 0.0))
    assert [r.sa for r in sad.numbered(7)] == alike
    for sa in alike:
        for found in (sad.get(sa.key), sad.twin(replace(sa, reqid=9))):
            assert found
            assert found.sa is sa
    assert sad.get(SAKey(LOCAL, 50, 7, Mark(2, 2))) is None
    for left in range(len(alike) - 1, -1, -1):
        gone = sad.pop(alike[left].key)
        assert gone
        assert gone.sa is alike[left]
        assert sad.pop(alike[left].key) is None
        assert [r.sa for r in sad.numbered(7)] == alike[:left]
        assert len(sad) == left
        # Whoever is alone again needs no key of its own.
        assert len(sad._crowded) == (left if left > 1 else 0)
        for sa in alike[:left]:
            assert sad.get(sa.key)


def test_an_sa_that_is_loaded_twice_is_one() -> None:
    sad = SAD()
    for reqid in (1, 2):
        for sa in (esp(7, reqid=reqid), ah(7, reqid=reqid), esp(8, reqid=reqid)):
            sad.load(Record(sa, 0.0))
    assert len(sad) == 3
    assert {r.sa.reqid for r in sad} == {2}


def test_a_crowd_is_not_scanned() -> None:
    sad, sas = SAD(), crowd(20_000)
    start = time.perf_counter()
    for sa in sas:
        sad.load(Record(sa, 0.0))
    for sa in sas:
        found = sad.twin(sa)
        assert found
        assert found.sa is sa
    for sa in sas[::2]:
        assert sad.pop(sa.key)
    assert len(list(sad.numbered(7))) == len(sad) == 10_000
    assert time.perf_counter() - start < 5  # a scan for each takes minutes


def test_tunnels_for_others_are_not_scanned() -> None:
    sad = SAD()
    for n in range(20_000):
        inside = (0x0A000000 + (n << 8)).to_bytes(4, "big")
        sad.add(Record(tunnel(n + 1, selector=Selector(inside, LOCAL, 24, 32, family=2)), 0.0))
    start = time.perf_counter()
    for _ in range(100):
        assert not list(sad.admitting(PEER, LOCAL))
        assert len(list(sad.admitting((0x0A000102).to_bytes(4, "big"), LOCAL))) == 1
    assert time.perf_counter() - start < 0.1  # a scan takes ten times that and more
