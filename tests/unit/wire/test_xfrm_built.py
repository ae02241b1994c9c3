"""The messages that the tests build say what a real kernel's did, byte by byte."""

from __future__ import annotations

from functools import partial

import pytest
import xfrm_messages as m
from test_xfrm_recorded import STEPS, decode

from ipsec_aio.wire import netlink as wire
from ipsec_aio.wire.netlink import attribute

HEADS = {
    **dict.fromkeys((m.NEWSA, m.UPDSA), 224),
    **dict.fromkeys((m.NEWPOLICY, m.UPDPOLICY), 168),
    **dict.fromkeys((m.DELPOLICY, m.MIGRATE, m.MAPPING), 64),
    **dict.fromkeys((m.FLUSHSA, m.GETDEFAULT), 4),
    m.DELSA: 24,
    m.EXPIRE: 232,
    m.POLEXPIRE: 176,
    m.FLUSHPOLICY: 0,
}
# Where the times of struct xfrm_lifetime_cur are, and what the kernel counts by itself.
TIMES = {
    **dict.fromkeys((m.NEWSA, m.UPDSA, m.EXPIRE), slice(176, 192)),
    **dict.fromkeys((m.NEWPOLICY, m.UPDPOLICY, m.POLEXPIRE), slice(136, 152)),
}
INDEX = slice(156, 160)
# Not built: XFRMA_ALG_AUTH beside _AUTH_TRUNC, _REPLAY_VAL, _REPLAY_ESN_VAL.
UNTOLD = {1, 10, 23}

SHA = m.algorithm(20, "hmac(sha256)", 256, 128)
CBC = m.algorithm(2, "cbc(aes)", 128)
NULL = m.algorithm(2, "ecb(cipher_null)", 0)
GMAC = m.algorithm(18, "rfc4543(gcm(aes))", 160, 128)
MARK = m.mark(5, 0xFF)
V4, V6 = (m.selector(b"", b"", family=family) for family in (2, 10))
SOFT, HARD = (m.lifetime(seconds=times) for times in ((1, 0, 0, 0), (0, 1, 0, 0)))

sa = partial(m.sa_info, sel=V4, replay_window=0)
sa6 = partial(m.sa_info, m.A6, m.B6, sel=V6, replay_window=0, family=10)
host = partial(m.selector, family=2, source_prefix=32, destination_prefix=32)
UDP = host(proto=17, ports=(5000, 0xFFFF, 1000, 0xFFFF))
MAIN, SUB = m.policy_type(), m.policy_type(1)


def nets(source: int, destination: int) -> bytes:
    """A selector between two networks 10.N.0.0/16."""
    addresses = (bytes([10, number, 0, 0]) for number in (source, destination))
    return m.selector(*addresses, family=2, source_prefix=16, destination_prefix=16)


def net6(*numbers: int) -> list[bytes]:
    return [bytes.fromhex(f"20010db8{number:04x}") + bytes(10) for number in numbers]


def templates(*built: bytes) -> bytes:
    return attribute(5, b"".join(built))


FIRST = sa(spi=0x1001, reqid=7, replay_window=32) + m.GCM
MARKED = sa(spi=0x100A) + m.GCM + MARK
WITH_ID = sa(spi=0x100B, mode=1) + m.GCM + m.if_id(0x2A)
SOFT_SA, HARD_SA = sa(spi=0x1013, limits=SOFT), sa(spi=0x1014, limits=HARD)
SOFT_MARK = m.mark(7, 0xFFFFFFFF)
REPLACED = m.policy_info(UDP, priority=2) + templates(m.template(reqid=8)) + MAIN
EXPIRING = m.policy_info(nets(10, 11), limits=HARD) + MAIN + m.mark(3, 0xFFFFFFFF)
COMP = m.template(m.A, m.B, proto=108, reqid=1, mode=1, optional=1)
IN_TUNNEL = m.template(m.A, m.B, spi=0x77, reqid=2, mode=1)
AH6 = m.template(m.A6, m.B6, proto=51, family=10, mode=1)
NETS6 = m.selector(*net6(1, 2), family=10, source_prefix=48, destination_prefix=64)

BUILT: dict[str, list[tuple[int, bytes]]] = {
    "gcm transport": [(m.NEWSA, FIRST)],
    "gcm updated": [(m.UPDSA, sa(spi=0x1001, reqid=8) + m.GCM)],
    "gcm deleted": [(m.DELSA, m.sa_deletion(FIRST))],
    "null encryption": [(m.NEWSA, sa(spi=0x1004) + SHA + NULL)],
    "ah": [(m.NEWSA, sa(spi=0x1005, proto=51) + SHA)],
    "v6 transport": [(m.NEWSA, sa6(spi=0x1009) + SHA + CBC)],
    "mark": [(m.NEWSA, MARKED)],
    "mark deleted": [(m.DELSA, m.sa_deletion(MARKED))],
    "if_id": [(m.NEWSA, WITH_ID)],
    "if_id deleted": [(m.DELSA, m.sa_deletion(WITH_ID))],
    "output mark": [(m.NEWSA, sa(spi=0x100D) + m.GCM + m.u32(29, 0x10) + m.u32(30, 0xF0))],
    "gmac": [(m.NEWSA, sa(spi=0x1010) + GMAC)],
    "soft expiry": [
        (m.NEWSA, SOFT_SA + m.GCM + SOFT_MARK),
        (m.EXPIRE, m.expire(SOFT_SA + SOFT_MARK, hard=False)),
    ],
    "hard expiry": [
        (m.NEWSA, HARD_SA + m.GCM + m.if_id(9)),
        (m.EXPIRE, m.expire(HARD_SA + m.if_id(9), hard=True)),
    ],
    "flushed esp": [(m.FLUSHSA, b"\x32")],
    "flushed all": [(m.FLUSHSA, b"\0")],
    "policy in": [
        (m.NEWPOLICY, m.policy_info(UDP, priority=3) + templates(m.template(reqid=7)) + MAIN)
    ],
    "policy updated": [(m.UPDPOLICY, REPLACED)],
    "policy deleted": [(m.DELPOLICY, m.policy_deletion(REPLACED))],
    "policy templates": [
        (
            m.NEWPOLICY,
            m.policy_info(nets(1, 2), priority=100) + templates(COMP, IN_TUNNEL) + MAIN,
        )
    ],
    "policy v6 marked": [
        (m.NEWPOLICY, m.policy_info(NETS6, direction=2) + templates(AH6) + MAIN + m.mark(6, 15))
    ],
    "policy if_id": [
        (
            m.NEWPOLICY,
            m.policy_info(nets(3, 4)) + templates(m.template(mode=4)) + MAIN + m.if_id(0x2A),
        )
    ],
    "policy block": [(m.NEWPOLICY, m.policy_info(nets(5, 6), action=1, priority=1) + MAIN)],
    "policy sub": [(m.NEWPOLICY, m.policy_info(nets(8, 9)) + templates(m.template()) + SUB)],
    "policy expiry": [
        (m.NEWPOLICY, EXPIRING),
        (m.POLEXPIRE, m.policy_expire(EXPIRING, hard=True)),
    ],
    "policies flushed": [(m.FLUSHPOLICY, MAIN)],
    "sub policies flushed": [(m.FLUSHPOLICY, SUB)],
    "defaults": [(m.GETDEFAULT, bytes([1, 2, 1]))],
    "defaults back": [(m.GETDEFAULT, bytes([2, 2, 2]))],
}


def only(data: bytes) -> wire.Message:
    (found,) = wire.messages(data, len(data))
    return found


def taken_apart(data: bytes, like: bytes | None = None) -> tuple[int, bytes, dict[int, bytes]]:
    """Return type, head and attributes; times, and a policy's index, are those of ``like``."""
    message = only(data)
    kind, size = message.kind, HEADS[message.kind]
    head = bytearray(data[message.start : message.start + size])
    told = {
        number: data[start:end]
        for number, start, end in wire.attributes(data, message.start + size, message.end)
    }
    if like is not None:
        theirs = like[16 : 16 + size]
        for place in (TIMES.get(kind), INDEX if size in (168, 176) else None):
            if place is not None:
                head[place] = theirs[place]
    return kind, bytes(head), told


def same_life(attributes: dict[int, bytes]) -> dict[int, bytes]:
    """Leave out the times and the index of a record inside a deletion."""
    blanks = {6: (slice(176, 192),), 7: (slice(136, 152), INDEX)}
    told = dict(attributes)
    for number in told.keys() & blanks:
        body = bytearray(told[number])
        for place in blanks[number]:
            body[place] = bytes(place.stop - place.start)
        told[number] = bytes(body)
    return told


@pytest.mark.parametrize("step", BUILT)
def test_what_is_built_is_what_was_recorded(step: str) -> None:
    recorded = STEPS[step].messages
    assert len(recorded) == len(BUILT[step])
    for real, (kind, payload) in zip(recorded, BUILT[step], strict=True):
        built = m.message(kind, payload)
        found_kind, found_head, found = taken_apart(built, real)
        real_kind, real_head, told = taken_apart(real)
        assert (found_kind, found_head.hex()) == (real_kind, real_head.hex())
        assert same_life(found) == same_life({n: told[n] for n in told.keys() & found.keys()})
        assert told.keys() - found.keys() <= UNTOLD
        assert kinds(decode(built)) == kinds(decode(real))


def kinds(events: list[object]) -> list[type]:
    return [type(event) for event in events]


def test_each_kind_of_message_that_changes_a_table_is_compared() -> None:
    compared = {kind for built in BUILT.values() for kind, _ in built}
    assert compared >= {
        *(m.NEWSA, m.UPDSA, m.DELSA, m.EXPIRE, m.FLUSHSA),
        *(m.NEWPOLICY, m.UPDPOLICY, m.DELPOLICY, m.POLEXPIRE, m.FLUSHPOLICY, m.GETDEFAULT),
    }
