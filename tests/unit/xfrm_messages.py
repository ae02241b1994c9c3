"""Messages as the kernel builds them, for the tests of whatever reads them."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from ipsec_aio.wire.netlink import attribute

INF = 2**64 - 1
NEWSA, DELSA, GETSA, NEWPOLICY, DELPOLICY, GETPOLICY = range(0x10, 0x16)
ACQUIRE, EXPIRE, UPDPOLICY, UPDSA, POLEXPIRE, FLUSHSA, FLUSHPOLICY, NEWAE = range(0x17, 0x1F)
REPORT, MIGRATE, MAPPING, SETDEFAULT, GETDEFAULT = 0x20, 0x21, 0x26, 0x27, 0x28
A, B = bytes([192, 0, 2, 1]), bytes([192, 0, 2, 2])
A6, B6 = bytes.fromhex("20010db8" + "00" * 11 + "01"), bytes.fromhex("20010db8" + "00" * 11 + "02")
KEY = b"KEY-OF-THE-TESTS-NOT-A-SECRET-0123456789ABCDEFGHIJKLMNOPQRSTUVWX"


def message(kind: int, payload: bytes = b"", *, sequence: int = 0, flags: int = 0) -> bytes:
    body = struct.pack("=IHHII", 16 + len(payload), kind, flags, sequence, 0) + payload
    return body + bytes(-len(body) % 4)


def selector(
    source: bytes = A,
    destination: bytes = B,
    *,
    family: int = 0,
    source_prefix: int = 0,
    destination_prefix: int = 0,
    ports: tuple[int, int, int, int] = (0, 0, 0, 0),
    proto: int = 0,
    ifindex: int = 0,
    user: int = 0,
) -> bytes:
    """``ports`` are destination, its mask, source, its mask."""
    return (
        destination.ljust(16, b"\0")
        + source.ljust(16, b"\0")
        + struct.pack(">4H", *ports)
        + struct.pack("=HBBB3x", family, destination_prefix, source_prefix, proto)
        + struct.pack("=iI", ifindex, user)
    )


def lifetime(*, amounts: Iterable[int] = (INF,) * 4, seconds: Iterable[int] = (0,) * 4) -> bytes:
    return struct.pack("=8Q", *amounts, *seconds)


def sa_info(
    source: bytes = A,
    destination: bytes = B,
    *,
    spi: int = 0x1001,
    proto: int = 50,
    family: int = 2,
    mode: int = 0,
    reqid: int = 0,
    replay_window: int = 32,
    flags: int = 0,
    limits: bytes = lifetime(),
    usage: tuple[int, int, int, int] = (0, 0, 0, 0),
    sel: bytes = selector(b"", b""),
) -> bytes:
    info = (
        sel
        + destination.ljust(16, b"\0")
        + struct.pack(">IB3x", spi, proto)
        + source.ljust(16, b"\0")
        + limits
        + struct.pack("=4Q", *usage)
        + struct.pack("=III", 0, 0, 0)
        + struct.pack("=IIHBBB7x", 0, reqid, family, mode, replay_window, flags)
    )
    assert len(info) == 224
    return info


def sa_id(destination: bytes = B, *, spi: int = 0x1001, proto: int = 50, family: int = 2) -> bytes:
    return (
        destination.ljust(16, b"\0") + struct.pack(">I", spi) + struct.pack("=HBx", family, proto)
    )


def sa_deletion(info: bytes) -> bytes:
    """What DELSA says of an SA: its id, then all of it; ``info`` is what NEWSA said."""
    family, proto = info[212], info[76]
    named = sa_id(info[56:72], spi=int.from_bytes(info[72:76]), proto=proto, family=family)
    return named + attribute(6, info[:224]) + info[224:]


def expire(info: bytes, *, hard: bool) -> bytes:
    """What EXPIRE says of an SA: all but what it does; ``info`` is ``sa_info()`` and its key."""
    return info[:224] + struct.pack("=B7x", hard) + info[224:]


def policy_info(
    sel: bytes = selector(family=2, source_prefix=32, destination_prefix=32),
    *,
    priority: int = 0,
    index: int = 8,
    direction: int = 0,
    action: int = 0,
    flags: int = 0,
    share: int = 0,
    limits: bytes = lifetime(),
    usage: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> bytes:
    info = (
        sel
        + limits
        + struct.pack("=4Q", *usage)
        + struct.pack("=IIBBBB4x", priority, index, direction, action, flags, share)
    )
    assert len(info) == 168
    return info


def policy_id(sel: bytes = selector(family=2), *, index: int = 0, direction: int = 0) -> bytes:
    return sel + struct.pack("=IB3x", index, direction)


def policy_deletion(info: bytes) -> bytes:
    """What DELPOLICY says of a policy: its selector and direction, then all of it."""
    return policy_id(info[:56], direction=info[160]) + attribute(7, info[:168]) + info[168:]


def policy_expire(info: bytes, *, hard: bool) -> bytes:
    """What POLEXPIRE says of a policy."""
    return info[:168] + struct.pack("=B7x", hard) + info[168:]


def policy_type(kind: int = 0) -> bytes:
    return attribute(16, struct.pack("=BxHBx", kind, 0, 0))


def template(
    source: bytes = bytes(4),
    destination: bytes = bytes(4),
    *,
    spi: int = 0,
    proto: int = 50,
    family: int = 2,
    reqid: int = 0,
    mode: int = 0,
    share: int = 0,
    optional: int = 0,
    algorithms: tuple[int, int, int] = (0xFFFFFFFF,) * 3,
) -> bytes:
    return (
        destination.ljust(16, b"\0")
        + struct.pack(">IB3x", spi, proto)
        + struct.pack("=H2x", family)
        + source.ljust(16, b"\0")
        + struct.pack("=IBBBx3I", reqid, mode, share, optional, *algorithms)
    )


def algorithm(kind: int, name: str, key_bits: int, icv_bits: int | None = None) -> bytes:
    header = name.encode().ljust(64, b"\0") + struct.pack("=I", key_bits)
    if icv_bits is not None:
        header += struct.pack("=I", icv_bits)
    return attribute(kind, header + KEY[: (key_bits + 7) // 8])


GCM = algorithm(18, "rfc4106(gcm(aes))", 160, 128)


def u32(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def mark(value: int, mask: int) -> bytes:
    return attribute(21, struct.pack("=II", value, mask))


def if_id(value: int) -> bytes:
    return u32(31, value)
