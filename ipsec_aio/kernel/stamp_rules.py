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

* Ports that are not served keep their marks. What has no port that nft can find (later fragments
  of IPv6, what is cut short) falls through and is cleared: a packet that reaches a served socket
  never keeps a mark that we did not write.
* Over IPv6 nft looks behind an AH header that is still to be checked; such a packet comes again
  when it has been.
* A connection is stamped by its SYN. Clear segments are kept off it once it has a full socket;
  while it is a request, which shows no mark, clear data is dropped and comes again: a bare ACK
  completes a handshake just as well.
* ``input`` comes last of all that could write marks: iptables' mangle is at -150, connection
  tracking's helpers at 300, and only the kernel's own confirmation (INT_MAX) must stay behind.
* ``fragments`` comes before defragmentation (-400) and drops every decrypted fragment to an
  address of this namespace, of whatever protocol and port, also while the set is empty: only first
  fragments have a port, and one that already waits for the others would mix with clear ones as
  soon as its port is served. Fragments that are forwarded (unicast, not ours) pass. Linux
  fragments IPv6 datagrams inside a tunnel, before ESP, gateways may do so with IPv4: where such
  come in, fragments must be kept. Without that chain they are: that is how readers know.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from .nfnetlink import Expression, Request, data, expression, flags, nft, schema, sent, verdict

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
]

TABLE = "ipsec_aio"
PORTS = "ports"
INPUT_PRIORITY = 1 << 30
FRAGMENTS_PRIORITY = -450
HOOK_PREROUTING, HOOK_INPUT = 0, 1

SET_TYPE: int = nft.DATA_TYPE_INET_PROTOCOL << 6 | nft.DATA_TYPE_INET_SERVICE
"""nftables' user-space number of inet_proto . inet_service, six bits each."""
KEY_LENGTH = 8

# Attributes stand in the order in which the kernel dumps them.
_REG, _REG_SECOND = nft.Regs.NFT_REG_1, nft.Regs.NFT_REG32_01
_MARK, _SECPATH = nft.Meta.NFT_META_MARK, nft.Meta.NFT_META_SECPATH
_NFPROTO, _L4PROTO = nft.Meta.NFT_META_NFPROTO, nft.Meta.NFT_META_L4PROTO
_EQ, _NEQ = nft.Cmp.NFT_CMP_EQ, nft.Cmp.NFT_CMP_NEQ
_NETWORK, _TRANSPORT, _INNER = 1, 2, 3
_DROP, _ACCEPT = 0, 1
_IPV4, _IPV6 = b"\x02", b"\x0a"
_TCP = b"\x06"
_NEXTHDR_FRAGMENT, _NEXTHDR_AUTH = 44, 51
_NO, _YES = b"\0", b"\1"
_RTN_UNICAST = struct.pack("=I", 1)
_INBOUND, _OUTERMOST, _SPI = 0, 0, 6
_FIB_DADDR, _FIB_ADDRTYPE = 2, 3


def _meta(key: int, register: int = _REG) -> Expression:
    return expression("meta", key=key, dreg=register)


def _set_mark() -> Expression:
    return expression("meta", key=_MARK, sreg=_REG)


def _compare(operator: int, value: bytes) -> Expression:
    return expression("cmp", sreg=_REG, op=operator, data=data(value))


def _payload(base: int, offset: int, length: int, register: int = _REG) -> Expression:
    return expression("payload", dreg=register, base=base, offset=offset, len=length)


def _and(mask: bytes) -> Expression:
    length = len(mask)
    return expression(
        "bitwise", sreg=_REG, dreg=_REG, len=length, op=0, mask=data(mask), xor=data(bytes(length))
    )


def _header_exists(kind: int) -> tuple[Expression, ...]:
    present = flags(schema("exthdr").exthdr_flags, 1)
    return (
        expression("exthdr", dreg=_REG, type=kind, offset=0, len=1, flags=present, op=0),
        _compare(_EQ, _YES),
    )


def _lookup_misses() -> Expression:
    return expression("lookup", set=PORTS, sreg=_REG, flags=flags(schema("lookup").lookup_flags, 1))


def _socket(key: int) -> Expression:
    return expression("socket", key=key, dreg=_REG)


def _daddr_type() -> Expression:
    kind = schema("fib")
    result, of = flags(kind.fib_result, _FIB_ADDRTYPE), flags(kind.fib_flags, _FIB_DADDR)
    return expression("fib", dreg=_REG, result=result, flags=of)


def _inbound_spi() -> Expression:
    return expression("xfrm", dreg=_REG, key=_SPI, dir=_INBOUND, spnum=_OUTERMOST)


@dataclass(frozen=True, eq=False)
class Rule:
    """A rule: what it is for, the kernel module that it needs beyond nf_tables, expressions."""

    purpose: str
    module: str
    expressions: tuple[Expression, ...]

    @cached_property
    def encoded(self) -> bytes:
        """The expressions as the kernel gets them, and as it has to give them back."""
        name = "NFTA_RULE_EXPRESSIONS"
        return sent(Request(nft.NFT_MSG_NEWRULE, [(name, self.expressions)]))[name]


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
_CLEAR_MARK = (expression("immediate", dreg=_REG, data=data(bytes(4))), _set_mark())
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
            (*_IS_IPV6, *_header_exists(_NEXTHDR_AUTH), verdict(_ACCEPT)),
        ),
        Rule(
            "leave ports that are not served",
            "nf_tables",
            (
                _meta(_L4PROTO),
                _payload(_TRANSPORT, 2, 2, _REG_SECOND),
                _lookup_misses(),
                verdict(_ACCEPT),
            ),
        ),
        Rule(
            "drop clear segments on stamped connections",
            "nft_socket",
            (
                *_CLEAR_SEGMENT,
                _socket(_SOCKET_MARK),
                _compare(_NEQ, bytes(4)),
                verdict(_DROP),
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
                verdict(_ACCEPT),
            ),
        ),
        Rule(
            "drop clear data that would complete a handshake",
            "nft_socket",
            (
                *_CLEAR_SEGMENT,
                _socket(_SOCKET_TRANSPARENT),
                _payload(_INNER, 0, 1),
                verdict(_DROP),
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
                verdict(_DROP),
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
                verdict(_DROP),
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
                verdict(_DROP),
            ),
        ),
    ),
)

CHAINS = {chain.name: chain for chain in (INPUT, FRAGMENTS)}
