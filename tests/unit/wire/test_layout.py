"""Attributes are found as a walk finds them, wherever the last message had them."""

from __future__ import annotations

import gc
import struct
from struct import Struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xfrm_messages import GCM, KEY, algorithm, mark

from ipsec_aio.errors import CodecError
from ipsec_aio.wire.layout import Cutter
from ipsec_aio.wire.netlink import attribute, attributes

CUTS = {1: Struct("4s"), 2: Struct("2x2s"), 3: None, 4: Struct("8s")}
KINDS = st.integers(1, 5)
ATTRIBUTES = st.lists(st.tuples(KINDS, st.binary(max_size=9)), max_size=5)


def walked(data: bytes, cuts: dict[int, Struct | None]) -> dict[int, bytes] | None:
    """Return what is cut out by looking at each attribute, None where one is too short."""
    found: dict[int, bytes] = {}
    for kind, start, stop in attributes(data, 0, len(data)):
        if kind in cuts:
            cut = cuts[kind]
            if cut is None:
                found[kind] = data[start:stop]
            elif stop - start < cut.size:
                return None
            else:
                (found[kind],) = cut.unpack_from(data, start)
    return found


@given(st.lists(ATTRIBUTES, min_size=1, max_size=8), st.binary(max_size=3))
def test_a_cutter_finds_what_a_walk_finds(
    areas: list[list[tuple[int, bytes]]], before: bytes
) -> None:
    cutter = Cutter(CUTS, (3, 4))
    for area in areas:
        data = b"".join(attribute(kind, payload) for kind, payload in area)
        expected = walked(data, CUTS)
        place = len(before), len(before) + len(data)
        if expected is None:
            with pytest.raises(CodecError, match="expected"):
                cutter.cut(before + data, *place)
            continue
        layout, values = cutter.cut(before + data, *place)
        parts = dict(zip(layout.kinds, values, strict=True))
        apart = layout.set_apart(before + data, place[0])
        assert parts | apart == expected == cutter.parts(before + data, *place)
        assert not parts.keys() & {3, 4}
        assert apart.keys() <= {3, 4}


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=6))
def test_arbitrary_bytes_give_codec_errors_only(areas: list[bytes]) -> None:
    cutter = Cutter(CUTS, (4,))
    for area in areas:
        found: Any
        try:
            found = cutter.parts(area, 0, len(area))
        except CodecError:
            found = None
        try:
            expected = walked(area, CUTS)
        except CodecError:
            expected = None
        assert found == expected


def test_equal_lengths_are_no_equal_places() -> None:
    cutter = Cutter(CUTS)
    first = attribute(1, b"aaaa") + attribute(4, b"12345678")
    second = attribute(4, b"87654321") + attribute(1, b"bbbb")
    third = attribute(5, b"cccccccc") + attribute(1, b"dddd")
    for _ in range(2):
        assert cutter.parts(first, 0, 20) == {1: b"aaaa", 4: b"12345678"}
        assert cutter.parts(second, 0, 20) == {1: b"bbbb", 4: b"87654321"}
        assert cutter.parts(third, 0, 20) == {1: b"dddd"}


def test_a_length_that_is_wrong_is_noticed_in_every_message() -> None:
    cutter = Cutter(CUTS)
    good = attribute(5, b"xxxx") + attribute(1, b"aaaa")
    cutter.cut(good, 0, len(good))
    for size, error in ((6, "attribute 1 has 2 bytes"), (12, "of 12 bytes"), (3, "of 3 bytes")):
        bad = bytearray(good)
        struct.pack_into("=H", bad, 8, size)
        with pytest.raises(CodecError, match=error):
            cutter.cut(bad, 0, len(bad))


def test_layouts_are_bounded_and_work_past_that() -> None:
    cutter = Cutter({1: None})
    for size in range(100):
        data = attribute(1, bytes(size))
        assert cutter.parts(data, 0, 4 + size) == {1: bytes(size)}
    assert cutter._count == sum(map(len, cutter._known.values())) == 64


def test_no_layout_holds_what_lies_behind_a_cut() -> None:
    cutter = Cutter({18: Struct("72s"), 20: Struct("72s")}, (21,))
    for data in (GCM + mark(1, 1), algorithm(20, "hmac(sha1)", 160, 96) + mark(1, 1)):
        cutter.cut(data, 0, len(data))
    todo: list[Any] = [cutter]
    seen: set[int] = set()
    while todo:
        thing = todo.pop()
        if id(thing) not in seen and not isinstance(thing, type):
            seen.add(id(thing))
            assert not isinstance(thing, bytes) or KEY[:4] not in thing
            todo.extend(gc.get_referents(thing))
