"""What rtnetlink tells of interfaces, local addresses and policy routing (rtnetlink(7))."""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from ..errors import CodecError
from .netlink import NLM_F_DUMP, Buffer, Message, attribute, attributes, request

__all__ = [
    "GROUPS",
    "NETLINK_ROUTE",
    "RULE_GROUPS",
    "Link",
    "MarkRule",
    "changes_addresses",
    "decode_link",
    "decode_mark_rule",
    "dump_links",
    "dump_rules",
    "get_route",
    "is_local_route",
    "removes_address",
]

NETLINK_ROUTE = 0
GROUPS = (1, 5, 9)
"""RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR and RTNLGRP_IPV6_IFADDR."""
RULE_GROUPS = (8, 19)
"""RTNLGRP_IPV4_RULE and RTNLGRP_IPV6_RULE."""

_NEWLINK = 16
_DELLINK = 17
_GETLINK = 18
_NEWADDR = 20
_DELADDR = 21
_NEWROUTE = 24
_GETROUTE = 26
_NEWRULE = 32
_GETRULE = 34
_IFLA_LINKINFO = 18
_IFLA_INFO_KIND = 1
_RTA_DST = 1
_RTN_LOCAL = 2
_FRA_PRIORITY = 6
_FRA_FWMARK = 10
_FRA_FWMASK = 16
_AF_UNSPEC = 0
_AF_INET = 2
_AF_INET6 = 10

_INTERFACE = Struct("=BxHiII")
_ROUTE = Struct("=8BI")
_RULE = Struct("=B11x")
_U32 = Struct("=I")


class Link(NamedTuple):
    """An interface that is there, or that went away. ``kind`` is ``""`` for plain ones."""

    ifindex: int
    kind: str
    gone: bool


class MarkRule(NamedTuple):
    """A policy-routing rule that looks at the mark (linux/fib_rules.h)."""

    family: int
    priority: int
    mark: int
    mask: int

    def __str__(self) -> str:
        ip = "ip -6 rule" if self.family == _AF_INET6 else "ip rule"
        return f"{ip} {self.priority}: fwmark {self.mark:#x}/{self.mask:#x}"


def decode_link(buffer: Buffer, message: Message) -> Link | None:
    """Read RTM_NEWLINK or RTM_DELLINK; other messages are None. Raises CodecError."""
    if message.kind not in (_NEWLINK, _DELLINK):
        return None
    start, end = message.start, message.end
    if end - start < _INTERFACE.size:
        raise CodecError(f"link message has {end - start} bytes, {_INTERFACE.size} expected")
    family, _, ifindex, _, _ = _INTERFACE.unpack_from(buffer, start)
    if family != _AF_UNSPEC:
        return None  # a bridge tells of its ports, not of interfaces
    kind = ""
    for found, place, stop in attributes(buffer, start + _INTERFACE.size, end):
        if found == _IFLA_LINKINFO:
            kind = _kind(buffer, place, stop)
    return Link(ifindex, kind, message.kind == _DELLINK)


def decode_mark_rule(buffer: Buffer, message: Message) -> MarkRule | None:
    """Read RTM_NEWRULE of IPv4 or IPv6; None where it looks at no mark. Raises CodecError."""
    if message.kind != _NEWRULE:
        return None
    start, end = message.start, message.end
    if end - start < _RULE.size:
        raise CodecError(f"routing rule has {end - start} bytes, {_RULE.size} expected")
    (family,) = _RULE.unpack_from(buffer, start)
    told = {_FRA_PRIORITY: 0, _FRA_FWMARK: 0, _FRA_FWMASK: 0}
    for found, place, stop in attributes(buffer, start + _RULE.size, end):
        if found in told:
            if stop - place != _U32.size:
                raise CodecError(f"attribute {found} of a routing rule is no number of 32 bits")
            (told[found],) = _U32.unpack_from(buffer, place)
    if family not in (_AF_INET, _AF_INET6) or not told[_FRA_FWMASK]:
        return None
    return MarkRule(family, told[_FRA_PRIORITY], told[_FRA_FWMARK], told[_FRA_FWMASK])


def changes_addresses(message: Message) -> bool:
    """Whether a message tells that an address came or went."""
    return message.kind in (_NEWADDR, _DELADDR)


def removes_address(message: Message) -> bool:
    """Whether a message tells that an address went."""
    return message.kind == _DELADDR


def is_local_route(buffer: Buffer, message: Message) -> bool:
    """Whether an answer to :func:`get_route` says "this host". Raises CodecError."""
    if message.kind != _NEWROUTE:
        return False
    if message.end - message.start < _ROUTE.size:
        raise CodecError(f"route has {message.end - message.start} bytes, {_ROUTE.size} expected")
    return bool(_ROUTE.unpack_from(buffer, message.start)[7] == _RTN_LOCAL)


def dump_links(sequence: int) -> bytes:
    """Build the request for all interfaces."""
    return request(_GETLINK, NLM_F_DUMP, sequence, bytes(_INTERFACE.size))


def dump_rules(sequence: int) -> bytes:
    """Build the request for all policy-routing rules."""
    return request(_GETRULE, NLM_F_DUMP, sequence, bytes(_RULE.size))


def get_route(address: bytes, sequence: int) -> bytes:
    """Build the request for the route to a packed address.

    Raises ValueError for anything else.
    """
    if len(address) not in (4, 16):
        raise ValueError("an address is 4 or 16 bytes")
    family = _AF_INET if len(address) == 4 else _AF_INET6
    header = _ROUTE.pack(family, len(address) * 8, 0, 0, 0, 0, 0, 0, 0)
    return request(_GETROUTE, 0, sequence, header + attribute(_RTA_DST, address))


def _kind(buffer: Buffer, start: int, end: int) -> str:
    for found, place, stop in attributes(buffer, start, end):
        if found == _IFLA_INFO_KIND:
            return bytes(buffer[place:stop]).rstrip(b"\0").decode("ascii", "replace")
    return ""
