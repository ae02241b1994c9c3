"""Control messages: what the kernel writes is read, anything else is a doubt, nothing raises."""

from __future__ import annotations

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipsec_aio.flow import pack_address
from ipsec_aio.wire.cmsg import Ancillary, ControlMessage, parse, source, split

MARK = (socket.SOL_SOCKET, 36, struct.pack("=I", 0x01100000))
PKTINFO = (
    socket.IPPROTO_IP,
    socket.IP_PKTINFO if hasattr(socket, "IP_PKTINFO") else 8,
    struct.pack("=i4s4s", 3, bytes([10, 0, 0, 9]), bytes([10, 0, 0, 1])),
)
PKTINFO6 = (
    socket.IPPROTO_IPV6,
    socket.IPV6_PKTINFO,
    struct.pack("=16sI", socket.inet_pton(socket.AF_INET6, "2001:db8::1"), 4),
)
FRAGMENT = (socket.IPPROTO_IP, 25, struct.pack("=i", 1280))
FRAGMENT6 = (socket.IPPROTO_IPV6, 77, struct.pack("=i", 1280))

MESSAGES = [MARK, PKTINFO, PKTINFO6, FRAGMENT, FRAGMENT6, (17, 104, struct.pack("=i", 100))]


def test_nothing_came() -> None:
    assert parse([]) == Ancillary()


def test_the_mark_is_the_hosts_number() -> None:
    assert parse([MARK]).mark == 0x01100000


def test_the_local_address_is_the_ip_headers() -> None:
    told = parse([PKTINFO])
    assert told.local == bytes([10, 0, 0, 1])
    told = parse([PKTINFO6])
    assert told.local == PKTINFO6[2][:16]


def test_a_mapped_local_address_is_unmapped() -> None:
    mapped = socket.inet_pton(socket.AF_INET6, "::ffff:10.0.0.1")
    told = parse([(PKTINFO6[0], PKTINFO6[1], struct.pack("=16sI", mapped, 4))])
    assert told.local == bytes([10, 0, 0, 1])


@pytest.mark.parametrize("message", [FRAGMENT, FRAGMENT6])
def test_fragments(message: tuple[int, int, bytes]) -> None:
    assert parse([message, MARK]) == Ancillary(mark=0x01100000, reassembled=True)


def test_merged_datagrams_are_a_doubt() -> None:
    assert "UDP_GRO" in parse([MARK, MESSAGES[-1]]).doubt


def test_other_peoples_messages_are_passed_over() -> None:
    assert parse([(0, 2, b"\x40\0\0\0"), MARK, (1, 29, bytes(16))]).mark == 0x01100000


@pytest.mark.parametrize("message", [MARK, PKTINFO, PKTINFO6])
def test_what_comes_twice_is_a_doubt(message: tuple[int, int, bytes]) -> None:
    told = parse([message, message])
    assert told.doubt
    assert told.mark is None


@pytest.mark.parametrize("message", [MARK, PKTINFO, PKTINFO6])
@pytest.mark.parametrize("change", [-1, 1, -100])
def test_each_length_is_checked(message: tuple[int, int, bytes], change: int) -> None:
    level, kind, data = message
    data = data[: max(0, len(data) + change)] if change < 0 else data + bytes(change)
    assert parse([(level, kind, data)]).doubt


@given(
    st.lists(
        st.one_of(
            st.sampled_from(MESSAGES),
            st.tuples(
                st.sampled_from([0, 1, 17, 41, 255]),
                st.sampled_from([2, 8, 25, 36, 50, 77, 104]),
                st.binary(max_size=32),
            ),
        ),
        max_size=6,
    )
)
def test_no_bytes_make_it_raise_or_claim(messages: list[tuple[int, int, bytes]]) -> None:
    told = parse(messages)
    if told.doubt:
        assert told == Ancillary(doubt=told.doubt)
    else:
        assert (told.mark is None) == (not any(m[:2] == (1, 36) for m in messages))
        assert len(told.local) in (0, 4, 16)


def written(messages: list[ControlMessage]) -> bytes:
    """As the kernel writes them: aligned to the size of a long."""
    buffer = b""
    for level, kind, data in messages:
        size = 16 + len(data)
        buffer += struct.pack("@Nii", size, level, kind) + data + bytes(-size % 8)
    return buffer


MESSAGE = st.tuples(st.integers(0, 300), st.integers(0, 300), st.binary(max_size=50))


@given(st.lists(MESSAGE, max_size=6), st.integers(0, 40))
def test_a_buffer_is_cut_into_its_messages(messages: list[ControlMessage], zeros: int) -> None:
    assert split(written(messages) + bytes(zeros)) == messages


@given(st.lists(MESSAGE, min_size=1, max_size=4), st.data())
def test_a_cut_buffer_has_only_whole_messages(
    messages: list[ControlMessage], data: st.DataObject
) -> None:
    buffer = written(messages)
    cut = split(buffer[: data.draw(st.integers(0, len(buffer)))])
    assert cut == messages[: len(cut)]


@given(st.binary(max_size=300))
def test_any_buffer_can_be_cut(buffer: bytes) -> None:
    for level, kind, data in split(buffer):
        assert struct.pack("@ii", level, kind) + data in buffer


@pytest.mark.parametrize(
    ("address", "ipv6", "expected"),
    [
        ("192.0.2.1", False, (0, 8, bytes(4) + bytes([192, 0, 2, 1]) + bytes(4))),
        ("192.0.2.1", True, (41, 50, bytes(10) + b"\xff\xff" + bytes([192, 0, 2, 1]) + bytes(4))),
        ("2001:db8::1", True, (41, 50, bytes.fromhex("20010db8" + 23 * "0" + "1") + bytes(4))),
    ],
)
def test_a_datagram_says_from_where_it_is_sent(address, ipv6, expected):
    assert source(pack_address(address), ipv6=ipv6) == expected
