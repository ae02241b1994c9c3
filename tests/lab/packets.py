"""IP packets by hand, for what no honest host sends (RFC 791, 8200, 768, 9293, 3173).

Send them with ``mallory.inject(packet, bob)``, past everything, or ``alice.send_packet(packet,
address)``, under her policies. Addresses are text.
"""

from __future__ import annotations

import struct
import zlib
from ipaddress import ip_address

TCP, UDP, FRAGMENT, COMP = 6, 17, 44, 108
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16


def packet(source: str, destination: str, proto: int, payload: bytes) -> bytes:
    """An IPv4 or IPv6 packet."""
    one, two = ip_address(source).packed, ip_address(destination).packed
    if len(one) == 16:
        return struct.pack("!IHBB", 6 << 28, len(payload), proto, 64) + one + two + payload
    return _ipv4(one, two, proto, payload, 0, 0)


def udp(source: str, destination: str, ports: tuple[int, int], data: bytes) -> bytes:
    """A UDP datagram in its packet; ``ports`` are (source, destination)."""
    header = struct.pack("!HHHH", *ports, 8 + len(data), 0)
    total = _sum(source, destination, UDP, header + data) or 0xFFFF
    return packet(source, destination, UDP, header[:6] + struct.pack("!H", total) + data)


def tcp(
    source: str,
    destination: str,
    ports: tuple[int, int],
    data: bytes = b"",
    *,
    seq: int = 0,
    ack: int = 0,
    flags: int = ACK | PSH,
) -> bytes:
    """A TCP segment in its packet."""
    header = struct.pack("!HHIIBBHHH", *ports, seq, ack, 0x50, flags, 0xFFFF, 0, 0)
    total = _sum(source, destination, TCP, header + data)
    return packet(
        source, destination, TCP, header[:16] + struct.pack("!H", total) + header[18:] + data
    )


def fragments(whole: bytes, size: int, identification: int = 0x5EED) -> list[bytes]:
    """Cut a packet into fragments of ``size`` bytes of payload (a multiple of 8)."""
    version6 = whole[0] >> 4 == 6
    start = 40 if version6 else 20
    payload = whole[start:]
    cuts = []
    for offset in range(0, len(payload), size):
        piece = payload[offset : offset + size]
        more = offset + size < len(payload)
        if version6:
            header = struct.pack("!BBHI", whole[6], 0, offset | more, identification)
            cut = struct.pack("!IHB", 6 << 28, 8 + len(piece), FRAGMENT) + whole[7:40]
            cuts.append(cut + header + piece)
        else:
            place = offset // 8 | more << 13
            cuts.append(_ipv4(whole[12:16], whole[16:20], whole[9], piece, identification, place))
    return cuts


def half_forged(source: str, destination: str, ports: tuple[int, int]) -> tuple[list[bytes], bytes]:
    """A UDP datagram in two fragments, of which the second is to be forged, and what it says."""
    data = b"good" * 10 + b"evil" * 10
    return fragments(udp(source, destination, ports, data), 48), data


def compressed(inner: bytes, cpi: int) -> bytes:
    """The same packet with its payload under IPComp (deflate), in clear."""
    version6 = inner[0] >> 4 == 6
    start = 40 if version6 else 20
    squeeze = zlib.compressobj(wbits=-11)
    data = squeeze.compress(inner[start:]) + squeeze.flush()
    payload = struct.pack("!BBH", inner[6 if version6 else 9], 0, cpi) + data
    addresses = inner[8:40] if version6 else inner[12:20]
    half = len(addresses) // 2
    source, destination = (str(ip_address(a)) for a in (addresses[:half], addresses[half:]))
    return packet(source, destination, COMP, payload)


def _ipv4(
    source: bytes, destination: bytes, proto: int, payload: bytes, identification: int, place: int
) -> bytes:
    header = struct.pack(
        "!BBHHHBBH", 0x45, 0, 20 + len(payload), identification, place, 64, proto, 0
    )
    header += source + destination
    return header[:10] + struct.pack("!H", _checksum(header)) + header[12:] + payload


def _sum(source: str, destination: str, proto: int, segment: bytes) -> int:
    ends = ip_address(source).packed + ip_address(destination).packed
    return _checksum(ends + struct.pack("!II", len(segment), proto) + segment)


def _checksum(data: bytes) -> int:
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
