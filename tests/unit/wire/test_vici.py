"""The VICI codec: every length check, both directions, against the PyPI codec."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vici.protocol import FiniteStream
from vici.protocol import Message as Oracle
from vici.protocol import Packet as OraclePacket

from ipsec_aio.errors import CodecError
from ipsec_aio.wire.vici import (
    MAX_DEPTH,
    MAX_PACKET,
    Packet,
    PacketReader,
    PacketType,
    decode_message,
    decode_packet,
    encode_message,
    encode_packet,
)

# The example of strongSwan's README.
README = {
    "key1": b"value1",
    "section1": {"sub-section": {"key2": b"value2"}, "list1": [b"item1", b"item2"]},
}
README_BYTES = (
    b"\x03\x04key1\x00\x06value1"
    b"\x01\x08section1"
    b"\x01\x0bsub-section"
    b"\x03\x04key2\x00\x06value2"
    b"\x02"
    b"\x04\x05list1\x05\x00\x05item1\x05\x00\x05item2\x06"
    b"\x02"
)

names = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=60
)
values = st.binary(max_size=300)
messages = st.recursive(
    st.dictionaries(names, values | st.lists(values, max_size=4), max_size=5),
    lambda inner: st.dictionaries(names, values | inner, max_size=4),
    max_leaves=12,
)


@st.composite
def near_messages_(draw):
    """Bytes that are a message but for a few of them."""
    data = bytearray(draw(messages.map(encode_message)))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(data)


elements = st.lists(
    st.sampled_from(
        [
            b"\x01\x01s",
            b"\x02",
            b"\x03\x01k\0\1v",
            b"\4\1l",
            b"\5\0\1i",
            b"\6",
            b"\7\1e",
            b"\1",
            b"\0",
        ]
    ),
    max_size=10,
).map(b"".join)
near_messages = near_messages_() | st.binary(max_size=40) | elements


def stream(*packets: bytes) -> list[Packet]:
    return PacketReader().feed(b"".join(packets))


def nested(depth: int) -> bytes:
    return b"\x01\x01s" * depth + b"\x02" * depth


class TestMessages:
    def test_the_readme_example(self):
        assert decode_message(README_BYTES) == README
        assert encode_message(README) == README_BYTES

    def test_nothing_is_an_empty_message(self):
        assert decode_message(b"") == {}
        assert encode_message({}) == b""

    def test_order_is_kept(self):
        message = dict.fromkeys("zaybxc", b"")
        assert list(decode_message(encode_message(message))) == list("zaybxc")

    def test_empty_lists_sections_values_and_names(self):
        message = {"l": [], "s": {}, "v": b"", "": b"x"}
        assert decode_message(encode_message(message)) == message

    def test_text_numbers_and_bools_become_bytes(self):
        encoded = encode_message({"t": "ü", "n": -1, "y": True, "x": False, "l": ("a", 2, b"b")})
        assert decode_message(encoded) == {
            "t": "ü".encode(),
            "n": b"-1",
            "y": b"yes",
            "x": b"no",
            "l": [b"a", b"2", b"b"],
        }

    def test_names_that_are_not_utf8_survive(self):
        data = b"\x03\x02\xff\xfe\x00\x00"
        message = decode_message(data)
        assert list(message) == ["\udcff\udcfe"]
        assert encode_message(message) == data

    def test_the_longest_name_and_value(self):
        message = {"n" * 255: b"v" * 0xFFFF}
        assert decode_message(encode_message(message)) == message

    def test_the_deepest_sections(self):
        message = decode_message(nested(MAX_DEPTH))
        assert encode_message(message) == nested(MAX_DEPTH)

    @pytest.mark.parametrize(
        ("data", "says"),
        [
            (b"\x00", "element type 0"),
            (b"\x07", "element type 7"),
            (b"\x05\x00\x00", "element type 5"),
            (b"\x06", "element type 6"),
            (b"\x02", "end of no section"),
            (b"\x01\x01s\x02\x02", "end of no section"),
            (b"\x01\x01s", "1 sections without an end"),
            (b"\x03", "length of a name is missing"),
            (b"\x03\x05abcd", "a name ends 1 bytes after"),
            (b"\x03\x01k", "length of a value is missing"),
            (b"\x03\x01k\x00", "length of a value is missing"),
            (b"\x03\x01k\x00\x02v", "a value ends 1 bytes after"),
            (b"\x03\x02k\x00\x00\x00", "a name with a NUL"),
            (b"\x04\x01l", "a list without an end"),
            (b"\x04\x01l\x05\x00\x01i", "a list without an end"),
            (b"\x04\x01l\x05", "length of a value is missing"),
            (b"\x04\x01l\x05\x00\x01", "a value ends 1 bytes after"),
            (b"\x04\x01l\x03\x01k\x00\x00\x06", "element type 3 in a list"),
            (b"\x04\x01l\x04\x01m\x06\x06", "element type 4 in a list"),
            (b"\x03\x01k\x00\x00\x03\x01k\x00\x00", "'k' twice"),
            (b"\x03\x01k\x00\x00\x01\x01k\x02", "'k' twice"),
            (b"\x04\x01k\x06\x04\x01k\x06", "'k' twice"),
            (nested(MAX_DEPTH + 1), "sections more than 32 deep"),
        ],
    )
    def test_refused_bytes(self, data, says):
        with pytest.raises(CodecError, match=says):
            decode_message(data)

    def test_the_same_name_in_two_sections_is_fine(self):
        assert decode_message(b"\x01\x01s\x03\x01k\x00\x00\x02\x03\x01k\x00\x00") == {
            "s": {"k": b""},
            "k": b"",
        }

    @pytest.mark.parametrize(
        ("message", "says"),
        [
            ([], "list is no section"),
            ({1: b""}, "a name is text, not int"),
            ({"k": None}, "NoneType is no value"),
            ({"k": 1.5}, "float is no value"),
            ({"k": [[]]}, "list is no value"),
            ({"k": [{}]}, "dict is no value"),
            ({"n" * 256: b""}, "a name of 256 bytes"),
            ({"k\0": b""}, "a name with a NUL"),
            ({"k": b"v" * 0x10000}, "a value of 65536 bytes"),
            ({"k": "\ud800"}, "no UTF-8"),
            ({"\ud800": b""}, "no UTF-8"),
        ],
    )
    def test_what_has_no_encoding(self, message, says):
        with pytest.raises(CodecError, match=says):
            encode_message(message)

    def test_too_deep_to_encode(self):
        message = {}
        for _ in range(MAX_DEPTH + 1):
            message = {"s": message}
        with pytest.raises(CodecError, match="deep"):
            encode_message(message)

    def test_a_section_that_holds_itself_ends(self):
        message = {}
        message["self"] = message
        with pytest.raises(CodecError, match="deep"):
            encode_message(message)


class TestPackets:
    @pytest.mark.parametrize(
        ("packet", "data"),
        [
            (Packet(PacketType.CMD_REQUEST, "stats"), b"\x00\x05stats"),
            (Packet(PacketType.CMD_REQUEST, "x", {"k": b"v"}), b"\x00\x01x\x03\x01k\x00\x01v"),
            (Packet(PacketType.CMD_RESPONSE), b"\x01"),
            (Packet(PacketType.CMD_RESPONSE, "", {"k": b"v"}), b"\x01\x03\x01k\x00\x01v"),
            (Packet(PacketType.CMD_UNKNOWN), b"\x02"),
            (Packet(PacketType.EVENT_REGISTER, "log"), b"\x03\x03log"),
            (Packet(PacketType.EVENT_UNREGISTER, "log"), b"\x04\x03log"),
            (Packet(PacketType.EVENT_CONFIRM), b"\x05"),
            (Packet(PacketType.EVENT_UNKNOWN), b"\x06"),
            (Packet(PacketType.EVENT, "log"), b"\x07\x03log"),
            (Packet(PacketType.EVENT, "log", {"msg": b"m"}), b"\x07\x03log\x03\x03msg\x00\x01m"),
        ],
    )
    def test_each_type(self, packet, data):
        assert decode_packet(data) == packet
        framed = encode_packet(packet.type, packet.name, packet.message)
        assert framed == len(data).to_bytes(4) + data
        assert stream(framed) == [packet]

    @pytest.mark.parametrize(
        ("data", "says"),
        [
            (b"", "an empty packet"),
            (b"\x08", "unknown packet type 8"),
            (b"\xff", "unknown packet type 255"),
            (b"\x00", "length of a name is missing"),
            (b"\x00\x00", "CMD_REQUEST without a name"),
            (b"\x07\x04log", "a name ends 1 bytes after"),
            (b"\x03\x03log\x00", "1 bytes too many after EVENT_REGISTER"),
            (b"\x02\x00", "1 bytes too many after CMD_UNKNOWN"),
            (b"\x05\x03", "1 bytes too many after EVENT_CONFIRM"),
            (b"\x01\x03", "length of a name is missing"),
            (bytes(MAX_PACKET + 1), "a packet of 524289 bytes"),
        ],
    )
    def test_refused_bytes(self, data, says):
        with pytest.raises(CodecError, match=says):
            decode_packet(data)

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ((PacketType.CMD_REQUEST,), "CMD_REQUEST without a name"),
            ((PacketType.CMD_RESPONSE, "x"), "CMD_RESPONSE with a name"),
            ((PacketType.EVENT_REGISTER, "x", {"k": b""}), "EVENT_REGISTER with a message"),
            ((PacketType.CMD_REQUEST, "x" * 256), "a name of 256 bytes"),
            ((PacketType.CMD_RESPONSE, "", {"k": [b"v" * 0xFFFF] * 9}), "a packet of 5"),
        ],
    )
    def test_what_has_no_encoding(self, arguments, says):
        with pytest.raises(CodecError, match=says):
            encode_packet(*arguments)

    def test_the_longest_packet(self):
        overhead = len(encode_message({"l": [b"", b""]}))
        items = [b"v" * 0xFFFF] * 7
        rest = MAX_PACKET - 1 - overhead - sum(len(item) + 3 for item in items)
        message = {"l": [*items, b"w" * (rest // 2), b"w" * (rest - rest // 2)]}
        framed = encode_packet(PacketType.CMD_RESPONSE, "", message)
        assert len(framed) == 4 + MAX_PACKET
        assert stream(framed)[0].message == message


class TestReader:
    def test_bytes_one_by_one(self):
        reader = PacketReader()
        data = encode_packet(PacketType.EVENT, "log", README) + b"\0\0\0\1\5"
        packets = [packet for byte in data for packet in reader.feed(bytes((byte,)))]
        assert packets == [
            Packet(PacketType.EVENT, "log", README),
            Packet(PacketType.EVENT_CONFIRM),
        ]
        reader.eof()

    def test_an_end_inside_a_packet(self):
        reader = PacketReader()
        assert reader.feed(b"\0\0\0\2\1") == []
        with pytest.raises(CodecError, match="5 bytes into a packet"):
            reader.eof()

    @pytest.mark.parametrize("length", [0, MAX_PACKET + 1, 0xFFFFFFFF])
    def test_a_bad_length_is_refused_as_soon_as_it_is_read(self, length):
        reader = PacketReader()
        with pytest.raises(CodecError, match=f"a packet of {length} bytes"):
            reader.feed(length.to_bytes(4))

    def test_a_length_is_not_judged_before_it_is_whole(self):
        reader = PacketReader()
        assert reader.feed(b"\xff\xff\xff") == []

    def test_broken_stays_broken_and_holds_nothing(self):
        reader = PacketReader()
        with pytest.raises(CodecError):
            reader.feed(b"\0\0\0\1\x63" + encode_packet(PacketType.EVENT_CONFIRM))
        with pytest.raises(CodecError, match="the stream is broken"):
            reader.feed(encode_packet(PacketType.EVENT_CONFIRM))
        reader.eof()

    def test_memoryviews_and_bytearrays(self):
        data = encode_packet(PacketType.EVENT_CONFIRM)
        assert PacketReader().feed(memoryview(data)) == PacketReader().feed(bytearray(data))


class TestProperties:
    @given(messages)
    def test_what_was_encoded_decodes(self, message):
        decoded = decode_message(encode_message(message))
        assert decoded == message
        assert list(decoded) == list(message)

    @given(messages)
    def test_the_oracle_encodes_alike(self, message):
        assert encode_message(message) == Oracle.serialize(message)

    @given(messages)
    def test_the_oracle_decodes_alike(self, message):
        data = encode_message(message)
        assert Oracle.deserialize(FiniteStream(data)) == decode_message(data)

    @given(near_messages)
    def test_any_bytes_decode_or_are_refused(self, data):
        try:
            message = decode_message(data)
        except CodecError:
            return
        assert encode_message(message) == data
        try:
            oracle = Oracle.deserialize(FiniteStream(data))
        except UnicodeDecodeError:
            return
        assert oracle == message

    @given(near_messages)
    def test_any_bytes_are_packets_or_are_refused(self, data):
        try:
            packet = decode_packet(data)
        except CodecError:
            return
        assert encode_packet(packet.type, packet.name, packet.message)[4:] == data
        oracle = OraclePacket.parse(data)
        assert oracle.response_type == packet.type
        if packet.type is PacketType.EVENT:
            assert oracle.event_type == packet.name.encode("utf-8", "surrogateescape")

    @given(st.binary(max_size=64))
    def test_any_stream_ends_in_packets_or_an_error(self, data):
        try:
            PacketReader().feed(data)
        except CodecError:
            return

    @given(names, messages)
    def test_the_oracle_requests_alike(self, name, message):
        request = OraclePacket.request(name, Oracle.serialize(message))
        assert encode_packet(PacketType.CMD_REQUEST, name, message)[4:] == request

    @given(st.lists(st.tuples(names, messages), max_size=4), st.data())
    def test_cuts_do_not_matter(self, content, data):
        packets = [Packet(PacketType.EVENT, name[:60], message) for name, message in content]
        raw = b"".join(encode_packet(p.type, p.name, p.message) for p in packets)
        cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
        reader, got = PacketReader(), []
        for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
            got += reader.feed(raw[start:end])
        assert got == packets
        reader.eof()
