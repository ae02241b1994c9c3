"""What real charons said: decoded, encoded again, and compared with the PyPI codec."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vici.protocol import FiniteStream
from vici.protocol import Message as Oracle

from ipsec_aio.wire.vici import PacketReader, PacketType, decode_packet, encode_packet

RECORDED = Path(__file__).parent / "recorded"


def packets(host):
    for exchange in json.loads((RECORDED / f"{host}.json").read_text()):
        for direction in ("sent", "received"):
            for packet in exchange[direction]:
                yield exchange["step"], direction, bytes.fromhex(packet)


@pytest.fixture(params=["initiator", "responder"])
def recorded(request):
    return list(packets(request.param))


def test_every_packet_comes_out_as_it_went_in(recorded):
    for step, _, data in recorded:
        packet = decode_packet(data[4:])
        assert encode_packet(packet.type, packet.name, packet.message) == data, step


def test_the_oracle_reads_the_same(recorded):
    for step, _, data in recorded:
        packet = decode_packet(data[4:])
        name = 1 + len(packet.name) if packet.name else 0
        assert Oracle.deserialize(FiniteStream(data[5 + name :])) == packet.message, step


def test_a_whole_stream_in_odd_pieces(recorded):
    stream = b"".join(data for _, direction, data in recorded if direction == "received")
    reader, count = PacketReader(), 0
    for start in range(0, len(stream), 1021):
        count += len(reader.feed(stream[start : start + 1021]))
    reader.eof()
    assert count == sum(direction == "received" for _, direction, _ in recorded)


def test_all_types_of_answers_were_recorded(recorded):
    types = {data[4] for _, direction, data in recorded if direction == "received"}
    assert types == {
        PacketType.CMD_RESPONSE,
        PacketType.CMD_UNKNOWN,
        PacketType.EVENT_CONFIRM,
        PacketType.EVENT_UNKNOWN,
        PacketType.EVENT,
    }
