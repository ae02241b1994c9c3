"""What pyroute2 makes of the stamp, against the numbers of linux/netfilter/nf_tables.h."""

from __future__ import annotations

import struct

import pytest

from ipsec_aio.kernel import stamp_table
from ipsec_aio.kernel.nfnetlink import Request, nft, sent
from ipsec_aio.kernel.stamp_rules import CHAINS, FRAGMENTS, INPUT, Rule
from ipsec_aio.kernel.stamp_table import Port
from ipsec_aio.wire.netlink import attribute

Tree = tuple[tuple[int, "bytes | int | str | Tree"], ...]


def encode(tree: Tree) -> bytes:
    """Big-endian numbers, strings with their zero, attributes within attributes."""
    parts: list[bytes] = []
    for kind, value in tree:
        if isinstance(value, int):
            value = struct.pack(">i", value)
        elif isinstance(value, str):
            value = value.encode() + b"\0"
        elif isinstance(value, tuple):
            value = encode(value)
        parts.append(attribute(kind, value))
    return b"".join(parts)


def meta(key: int, register: int = 1) -> Tree:
    return (1, "meta"), (2, ((2, key), (1, register)))


def cmp(operator: int, value: bytes) -> Tree:
    return (1, "cmp"), (2, ((1, 1), (2, operator), (3, ((1, value),))))


def payload(base: int, offset: int, length: int, register: int = 1) -> Tree:
    return (1, "payload"), (2, ((1, register), (2, base), (3, offset), (4, length)))


def header(kind: int) -> Tree:
    data: Tree = ((1, 1), (2, bytes([kind])), (3, 0), (4, 1), (5, 1), (6, 0))
    return (1, "exthdr"), (2, data)


def socket(key: int) -> Tree:
    return (1, "socket"), (2, ((1, key), (2, 1)))


def verdict(code: int) -> Tree:
    return (1, "immediate"), (2, ((1, 0), (2, ((2, ((1, code),)),))))


EQ, NEQ = 0, 1
ACCEPT, DROP = verdict(1), verdict(0)
NO, YES = cmp(EQ, b"\0"), cmp(EQ, b"\1")
SECPATH, NFPROTO, L4PROTO = meta(25), meta(15), meta(16)
IPV4, IPV6, TCP = cmp(EQ, b"\2"), cmp(EQ, b"\x0a"), cmp(EQ, b"\x06")
ZERO: Tree = ((1, "immediate"), (2, ((1, 1), (2, ((1, bytes(4)),)))))
SET_MARK: Tree = ((1, "meta"), (2, ((2, 3), (3, 1))))
UNSERVED: Tree = ((1, "lookup"), (2, ((1, "ports"), (2, 1), (5, 1))))
SPI: Tree = ((1, "xfrm"), (2, ((1, 1), (2, 6), (3, b"\0"), (4, 0))))
DADDR_TYPE: Tree = ((1, "fib"), (2, ((1, 1), (2, 3), (3, 2))))
NOT_UNICAST = cmp(NEQ, struct.pack("=I", 1))
MASK: Tree = ((1, b"\x3f\xff"),)
OFFSET: Tree = (
    (1, "bitwise"),
    (2, ((1, 1), (2, 1), (3, 2), (6, 0), (4, MASK), (5, ((1, bytes(2)),)))),
)
CLEAR = (L4PROTO, TCP, SECPATH, NO)
FRAGMENT = (NFPROTO, IPV6, SECPATH, YES, header(44), YES)

MEANT: dict[str, list[tuple[Tree, ...]]] = {
    "input": [
        (NFPROTO, IPV6, header(51), YES, ACCEPT),
        (L4PROTO, payload(2, 2, 2, 9), UNSERVED, ACCEPT),
        (*CLEAR, socket(1), cmp(NEQ, bytes(4)), DROP),
        (*CLEAR, socket(1), cmp(EQ, bytes(4)), ZERO, SET_MARK, ACCEPT),
        (*CLEAR, socket(0), payload(3, 0, 1), DROP),
        (ZERO, SET_MARK),
        (SECPATH, YES, SPI, SET_MARK),
    ],
    "fragments": [
        (
            *(NFPROTO, IPV4, SECPATH, YES, payload(1, 6, 2), OFFSET, cmp(NEQ, bytes(2))),
            *(DADDR_TYPE, NOT_UNICAST, DROP),
        ),
        (*FRAGMENT, DADDR_TYPE, NOT_UNICAST, DROP),
        (*FRAGMENT, payload(1, 24, 1), cmp(EQ, b"\xff"), DROP),
    ],
}


def body(request: Request) -> Tree:
    """A request's attributes by number, in their order, without those of padding."""
    names = [entry[0] for entry in nft.AsyncNFTSocket.policy[request.kind].nla_map]
    return tuple((names.index(name), value) for name, value in sent(request).items())


@pytest.mark.parametrize(
    ("chain", "rule", "meant"),
    [
        pytest.param(name, rule, meant, id=rule.purpose)
        for name, chain in CHAINS.items()
        for rule, meant in zip(chain.rules, MEANT[name], strict=True)
    ],
)
def test_rules(chain: str, rule: Rule, meant: tuple[Tree, ...]) -> None:
    expressions = encode(tuple((1, expression) for expression in meant))
    table, name = b"ipsec_aio\0", chain.encode() + b"\0"
    made = stamp_table._rule(CHAINS[chain], rule)
    assert body(made) == ((1, table), (2, name), (4, expressions))
    assert made.flags == 0xC00


def test_everything_else() -> None:
    table, rest = b"ipsec_aio\0", stamp_table._whole([Port(17, 5000)], True, False, "héllo")
    number = struct.Struct(">i").pack
    comment = b"\0\x07h\xc3\xa9llo\0"
    assert body(rest[0]) == ((1, table), (2, number(2)), (6, comment))
    plain = ((1, table), (2, b"ports\0"), (3, number(0)), (4, number(12 << 6 | 13)))
    assert body(rest[1]) == (*plain, (5, number(8)), (10, number(1)))
    element = encode(((1, ((1, ((1, bytes.fromhex("1100000013880000")),)),)),))
    assert body(rest[2]) == ((1, table), (2, b"ports\0"), (3, element))
    assert [request.flags for request in rest[:4]] == [0x600, 0x600, 0, 0x600]
    for chain, hook, priority in ((INPUT, 1, 1 << 30), (FRAGMENTS, 0, -450)):
        (made,) = (r for r in rest if r.kind == 3 and ("NFTA_CHAIN_NAME", chain.name) in r[1])
        place = encode(((1, hook), (2, priority)))
        name = chain.name.encode() + b"\0"
        assert body(made) == (
            (1, table),
            (3, name),
            (4, place),
            (5, number(1)),
            (7, b"filter\0"),
        )
