"""Netlink framing: every length is checked, every walk ends."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipsec_aio.errors import CodecError
from ipsec_aio.wire import netlink as wire

NOOP = struct.pack("=IHHII", 16, wire.NLMSG_NOOP, 0, 7, 9)


def message(kind: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return struct.pack("=IHHII", 16 + len(payload), kind, flags, 1, 0) + payload


def only(data: bytes) -> wire.Message:
    (found,) = wire.messages(data, len(data))
    return found


def test_messages_are_told_by_position() -> None:
    data = NOOP + message(20, b"abcde") + bytes(3) + NOOP
    found = list(wire.messages(data, len(data)))
    assert [(m.kind, m.start, m.end) for m in found] == [(1, 16, 16), (20, 32, 37), (1, 56, 56)]
    assert (found[0].sequence, found[0].port) == (7, 9)


def test_a_last_message_need_not_be_padded() -> None:
    data = message(20, b"abcde")
    assert only(data).end == 21


def test_only_what_was_received_is_looked_at() -> None:
    assert list(wire.messages(bytearray(NOOP + b"\xff" * 64), 16)) == [only(NOOP)]
    assert not list(wire.messages(NOOP, 0))


@pytest.mark.parametrize("size", range(1, 16))
def test_cut_header(size: int) -> None:
    with pytest.raises(CodecError, match=f"^{size} bytes where a netlink header should be"):
        list(wire.messages(NOOP, size))


@pytest.mark.parametrize("size", [0, 1, 15, 17, 0xFFFFFFFF])
def test_wrong_message_length(size: int) -> None:
    data = struct.pack("=I", size) + NOOP[4:]
    with pytest.raises(CodecError, match="netlink message of"):
        list(wire.messages(data, 16))


def test_what_came_before_a_broken_message_is_still_told() -> None:
    walk = wire.messages(NOOP + b"\x01", 17)
    assert next(walk).kind == wire.NLMSG_NOOP
    with pytest.raises(CodecError):
        next(walk)


def test_interrupted() -> None:
    assert only(message(3, flags=wire.NLM_F_DUMP_INTR | wire.NLM_F_MULTI)).interrupted
    assert not only(message(3, flags=wire.NLM_F_MULTI)).interrupted


def test_attributes() -> None:
    data = wire.attribute(0x8001, b"abc") + wire.attribute(2, b"") + wire.attribute(0x4003, b"wxyz")
    found = [(kind, data[a:b]) for kind, a, b in wire.attributes(data, 0, len(data))]
    assert found == [(1, b"abc"), (2, b""), (3, b"wxyz")]


def test_a_last_attribute_need_not_be_padded() -> None:
    data = wire.attribute(1, b"abc")[:-1]
    assert list(wire.attributes(data, 0, len(data))) == [(1, 4, 7)]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_cut_attribute_header(size: int) -> None:
    with pytest.raises(CodecError, match="attribute's header"):
        list(wire.attributes(bytes(8), 0, size))


@pytest.mark.parametrize("size", [0, 3, 9, 0xFFFF])
def test_wrong_attribute_length(size: int) -> None:
    with pytest.raises(CodecError, match=f"attribute 5 of {size} bytes with 8 left"):
        list(wire.attributes(struct.pack("=HH", size, 5) + b"KEYS", 0, 8))


@pytest.mark.parametrize(
    ("kind", "payload", "code"),
    [
        (wire.NLMSG_ERROR, struct.pack("=i", -1) + bytes(16), 1),
        (wire.NLMSG_ERROR, struct.pack("=i", 0) + bytes(16), 0),
        (wire.NLMSG_DONE, b"", 0),
        (wire.NLMSG_DONE, struct.pack("=i", 0), 0),
        (wire.NLMSG_DONE, struct.pack("=i", -4), 4),
    ],
)
def test_error_numbers(kind: int, payload: bytes, code: int) -> None:
    data = message(kind, payload)
    assert wire.error_number(data, only(data)) == code


@pytest.mark.parametrize("payload", [b"", b"abc", struct.pack("=i", 1), struct.pack("=i", -4096)])
def test_errors_that_are_none(payload: bytes) -> None:
    data = message(wire.NLMSG_ERROR, payload)
    with pytest.raises(CodecError):
        wire.error_number(data, only(data))


def test_request() -> None:
    data = wire.request(0x12, wire.NLM_F_DUMP, 5, b"abcd")
    assert struct.unpack_from("=IHHII", data) == (20, 0x12, 0x301, 5, 0)
    assert data[16:] == b"abcd"


@given(st.binary(max_size=200))
def test_no_bytes_make_it_loop_or_fail_otherwise(data: bytes) -> None:
    found = []
    try:
        for m in wire.messages(data, len(data)):
            found.append(m)
            list(wire.attributes(data, m.start, m.end))
    except CodecError:
        pass
    assert len(found) <= len(data) // 16
    assert all(16 <= m.start <= m.end <= len(data) for m in found)


@given(st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=20)), max_size=8))
def test_attributes_round_trip(pairs: list[tuple[int, bytes]]) -> None:
    data = b"".join(wire.attribute(kind, payload) for kind, payload in pairs)
    assert [(k, data[a:b]) for k, a, b in wire.attributes(data, 0, len(data))] == pairs
