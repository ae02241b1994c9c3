"""The stamp's table as it must be: what is sent to the kernel and what is expected back.

::

    table inet ipsec_aio {
        set ports { type inet_proto . inet_service }

        chain input { type filter hook input priority 1073741824; policy accept;
            meta nfproto ipv6 exthdr ah exists accept
            meta l4proto . th dport != @ports accept
            meta l4proto tcp meta ipsec missing socket mark != 0 drop
            meta l4proto tcp meta ipsec missing socket mark 0 meta mark set 0 accept
            meta l4proto tcp meta ipsec missing socket exists @ih,0,8 exists drop
            meta mark set 0
            meta ipsec exists meta mark set ipsec in spi
        }
        chain fragments { type filter hook prerouting priority -450; policy accept;
            meta nfproto ipv4 meta ipsec exists ip frag-off & 0x3fff != 0
                fib daddr type != unicast drop
            meta nfproto ipv6 meta ipsec exists exthdr frag exists
                fib daddr type != unicast drop
            meta nfproto ipv6 meta ipsec exists exthdr frag exists
                ip6 daddr & ff00:: == ff00:: drop
        }
    }

Rules:

* Ports that are not served keep their marks. What has no port that nft can find falls through and
  is cleared: a packet that reaches a served socket never keeps a mark that we did not write.
* Over IPv6 nft looks behind an AH header that is still to be checked; such a packet comes again
  when it has been.
* A connection is stamped by its SYN. Clear segments are kept off it once it has a full socket;
  while it is a request, which shows no mark, clear data is dropped and comes again: a bare ACK
  completes a handshake just as well.
* ``input`` comes last of all that could write marks: iptables' mangle is at -150, connection
  tracking's helpers at 300, and only the kernel's own confirmation (INT_MAX) must stay behind.
* ``fragments`` comes before defragmentation (-400). Fragments that are forwarded (unicast, not
  ours) pass. Linux fragments IPv6 datagrams inside a tunnel, before ESP: where large ones come in
  tunnel mode over IPv6, fragments must be kept. Without that chain they are: that is how readers
  know.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from ipsec_aio.errors import CodecError

from .nfnetlink import Attributes, be32, parse, text

__all__ = [
    "CHAINS",
    "FRAGMENTS",
    "INPUT",
    "INPUT_PRIORITY",
    "PORTS",
    "SET_TYPE",
    "TABLE",
    "Chain",
    "Rule",
    "same",
]

TABLE = "ipsec_aio"
PORTS = "ports"
INPUT_PRIORITY = 1 << 30
FRAGMENTS_PRIORITY = -450
HOOK_PREROUTING, HOOK_INPUT = 0, 1

# nftables' user-space type numbers inet_proto (12) and inet_service (13), six bits each.
SET_TYPE = 12 << 6 | 13
KEY_LENGTH = 8

_VERDICT, _REG, _REG_SECOND = 0, 1, 9
_MARK, _NFPROTO, _L4PROTO, _SECPATH = 3, 15, 16, 25
_EQ, _NEQ = 0, 1
_NETWORK, _TRANSPORT, _INNER = 1, 2, 3
_DROP, _ACCEPT = 0, 1
_IPV4, _IPV6 = b"\x02", b"\x0a"
_TCP = b"\x06"
_NEXTHDR_FRAGMENT, _NEXTHDR_AUTH = b"\x2c", b"\x33"
_NO, _YES = b"\0", b"\1"
_RTN_UNICAST = struct.pack("=I", 1)


def _expression(name: str, *data: tuple[int, bytes | Attributes]) -> tuple[int, Attributes]:
    return 1, ((1, text(name)), (2, data))


def _meta(key: int, register: int = _REG) -> tuple[int, Attributes]:
    return _expression("meta", (2, be32(key)), (1, be32(register)))


def _set_mark() -> tuple[int, Attributes]:
    return _expression("meta", (2, be32(_MARK)), (3, be32(_REG)))


def _compare(operator: int, value: bytes) -> tuple[int, Attributes]:
    return _expression("cmp", (1, be32(_REG)), (2, be32(operator)), (3, ((1, value),)))


def _payload(base: int, offset: int, length: int, register: int = _REG) -> tuple[int, Attributes]:
    return _expression(
        "payload", (1, be32(register)), (2, be32(base)), (3, be32(offset)), (4, be32(length))
    )


def _and(mask: bytes) -> tuple[int, Attributes]:
    return _expression(
        "bitwise",
        (1, be32(_REG)),
        (2, be32(_REG)),
        (3, be32(len(mask))),
        (6, be32(0)),
        (4, ((1, mask),)),
        (5, ((1, bytes(len(mask))),)),
    )


def _header_exists(kind: bytes) -> tuple[tuple[int, Attributes], ...]:
    return (
        _expression(
            "exthdr",
            (1, be32(_REG)),
            (2, kind),
            (3, be32(0)),
            (4, be32(1)),
            (5, be32(1)),
            (6, be32(0)),
        ),
        _compare(_EQ, _YES),
    )


def _verdict(code: int) -> tuple[int, Attributes]:
    return _expression("immediate", (1, be32(_VERDICT)), (2, ((2, ((1, be32(code)),)),)))


def _lookup_misses() -> tuple[int, Attributes]:
    return _expression("lookup", (1, text(PORTS)), (2, be32(_REG)), (5, be32(1)))


def _socket(key: int) -> tuple[int, Attributes]:
    return _expression("socket", (1, be32(key)), (2, be32(_REG)))


def _daddr_type() -> tuple[int, Attributes]:
    return _expression("fib", (1, be32(_REG)), (2, be32(3)), (3, be32(2)))


def _inbound_spi() -> tuple[int, Attributes]:
    return _expression("xfrm", (2, be32(6)), (3, _NO), (4, be32(0)), (1, be32(_REG)))


class Rule(NamedTuple):
    """A rule: what it is for, the kernel module that it needs beyond nf_tables, expressions."""

    purpose: str
    module: str
    expressions: Attributes


class Chain(NamedTuple):
    """A base chain of type filter with policy accept."""

    name: str
    hook: int
    priority: int
    rules: tuple[Rule, ...]


_SOCKET_TRANSPARENT, _SOCKET_MARK = 0, 1
_CLEAR_SEGMENT = (
    _meta(_L4PROTO),
    _compare(_EQ, _TCP),
    _meta(_SECPATH),
    _compare(_EQ, _NO),
)
_CLEAR_MARK = (_expression("immediate", (1, be32(_REG)), (2, ((1, bytes(4)),))), _set_mark())
_PROTECTED = (_meta(_SECPATH), _compare(_EQ, _YES))
_IS_IPV6 = (_meta(_NFPROTO), _compare(_EQ, _IPV6))

INPUT = Chain(
    "input",
    HOOK_INPUT,
    INPUT_PRIORITY,
    (
        Rule(
            "leave what AH is still to check",
            "nf_tables",
            (*_IS_IPV6, *_header_exists(_NEXTHDR_AUTH), _verdict(_ACCEPT)),
        ),
        Rule(
            "leave ports that are not served",
            "nf_tables",
            (
                _meta(_L4PROTO),
                _payload(_TRANSPORT, 2, 2, _REG_SECOND),
                _lookup_misses(),
                _verdict(_ACCEPT),
            ),
        ),
        Rule(
            "drop clear segments on stamped connections",
            "nft_socket",
            (
                *_CLEAR_SEGMENT,
                _socket(_SOCKET_MARK),
                _compare(_NEQ, bytes(4)),
                _verdict(_DROP),
            ),
        ),
        Rule(
            "pass clear segments on other connections",
            "nft_socket",
            (
                *_CLEAR_SEGMENT,
                _socket(_SOCKET_MARK),
                _compare(_EQ, bytes(4)),
                *_CLEAR_MARK,
                _verdict(_ACCEPT),
            ),
        ),
        Rule(
            "drop clear data that would complete a handshake",
            "nft_socket",
            (
                *_CLEAR_SEGMENT,
                _socket(_SOCKET_TRANSPARENT),
                _payload(_INNER, 0, 1),
                _verdict(_DROP),
            ),
        ),
        Rule("clear the mark", "nf_tables", _CLEAR_MARK),
        Rule("stamp with the SPI", "nft_xfrm", (*_PROTECTED, _inbound_spi(), _set_mark())),
    ),
)

FRAGMENTS = Chain(
    "fragments",
    HOOK_PREROUTING,
    FRAGMENTS_PRIORITY,
    (
        Rule(
            "drop decrypted IPv4 fragments",
            "nft_fib_inet",
            (
                _meta(_NFPROTO),
                _compare(_EQ, _IPV4),
                *_PROTECTED,
                _payload(_NETWORK, 6, 2),
                _and(b"\x3f\xff"),
                _compare(_NEQ, bytes(2)),
                _daddr_type(),
                _compare(_NEQ, _RTN_UNICAST),
                _verdict(_DROP),
            ),
        ),
        Rule(
            "drop decrypted IPv6 fragments",
            "nft_fib_inet",
            (
                *_IS_IPV6,
                *_PROTECTED,
                *_header_exists(_NEXTHDR_FRAGMENT),
                _daddr_type(),
                _compare(_NEQ, _RTN_UNICAST),
                _verdict(_DROP),
            ),
        ),
        Rule(
            "drop decrypted IPv6 multicast fragments",
            "nf_tables",
            (
                *_IS_IPV6,
                *_PROTECTED,
                *_header_exists(_NEXTHDR_FRAGMENT),
                _payload(_NETWORK, 24, 1),
                _compare(_EQ, b"\xff"),
                _verdict(_DROP),
            ),
        ),
    ),
)

CHAINS = {chain.name: chain for chain in (INPUT, FRAGMENTS)}


def same(meant: Attributes, found: bytes) -> bool:
    """Say whether bytes from the kernel hold exactly the attributes that were meant.

    Order within one level does not count, except that of equal types (expressions).
    """
    try:
        values = parse(found)
    except CodecError:
        return False
    if len(values) != len(meant):
        return False
    pairs = zip(
        sorted(meant, key=lambda item: item[0]),
        sorted(values, key=lambda item: item[0]),
        strict=True,
    )
    return all(
        kind == other and (same(value, data) if isinstance(value, tuple) else value == data)
        for (kind, value), (other, data) in pairs
    )
