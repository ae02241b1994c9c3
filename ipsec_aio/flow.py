"""Addresses, selectors and flows.

Rules:

* An address is its packed network-order ``bytes``: 4 for IPv4, 16 for IPv6. An IPv4-mapped IPv6
  address is always unmapped first: the kernel looks up such traffic in its IPv4 tables.
* A flow is seen from the packet: *source* sent it, *destination* receives it. For inbound traffic
  the destination is local.
* A flow has no interface. The kernel compares a selector's with the device of the packet's route,
  which for what is delivered here is lo, or a VRF, and never the one that it came in by; of what is
  sent, nobody knows it beforehand. Who asks whether a selector matches has to ask besides whether
  any names an interface.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_address
from typing import NamedTuple

__all__ = ["Flow", "Mark", "Selector", "format_address", "map4", "pack_address", "unmap"]

_V4_MAPPED = bytes(10) + b"\xff\xff"


def unmap(packed: bytes) -> bytes:
    """Return the IPv4 address inside an IPv4-mapped IPv6 address, any other address as it is."""
    if len(packed) == 16 and packed.startswith(_V4_MAPPED):
        return packed[12:]
    return packed


def map4(packed: bytes) -> bytes:
    """Return the IPv4-mapped IPv6 address of a packed IPv4 address (RFC 4291 2.5.5.2)."""
    return _V4_MAPPED + packed


def pack_address(text: str) -> bytes:
    """Pack ``"192.0.2.1"``, ``"2001:db8::1"`` or ``"fe80::1%eth0"`` (the scope is not kept).

    Raises ValueError for anything that is no IP address.
    """
    try:
        packed = bytes(map(int, text.split(".", 4)))
    except ValueError:
        packed = b""
    # ipaddress takes 10 µs, and each connection and each new peer comes this way.
    if len(packed) == 4 and ".".join(map(str, packed)) == text:
        return packed
    return _pack(text)


@lru_cache(4096)
def _pack(text: str) -> bytes:
    return unmap(ip_address(text.partition("%")[0]).packed)


def format_address(packed: bytes) -> str:
    """Write a packed address as text; the empty address is ``"*"``."""
    if len(packed) == 4:
        return ".".join(map(str, packed))
    return str(ip_address(packed)) if packed else "*"


class Mark(NamedTuple):
    """A firewall mark and the bits of it that count (``struct xfrm_mark``).

    A value with bits outside its mask fits nothing.
    """

    value: int = 0
    mask: int = 0

    def matches(self, mark: int) -> bool:
        """Say whether a packet's mark fits, as the kernel compares it."""
        return mark & self.mask == self.value


@dataclass(frozen=True, slots=True)
class Flow:
    """What a policy is looked up by. ``proto`` is an IP protocol number."""

    source: bytes
    destination: bytes
    proto: int = 0
    source_port: int = 0
    destination_port: int = 0
    mark: int = 0
    if_id: int = 0


class Selector(NamedTuple):
    """``struct xfrm_selector`` (linux/xfrm.h): which traffic an SA or a policy is for.

    ``family`` is AF_INET (2), AF_INET6 (10) or 0 for any. Under prefix length 0 any address will
    do. Ports count only under their masks. ``proto`` 0 is any.
    """

    source: bytes = b""
    destination: bytes = b""
    source_prefix: int = 0
    destination_prefix: int = 0
    source_port: int = 0
    source_port_mask: int = 0
    destination_port: int = 0
    destination_port_mask: int = 0
    proto: int = 0
    family: int = 0
    ifindex: int = 0
    user: int = 0

    @property
    def names_ports(self) -> bool:
        """Whether the selector singles out ports."""
        return bool(self.source_port_mask or self.destination_port_mask)

    def matches(self, flow: Flow) -> bool:
        """Say whether a flow is this selector's, as ``xfrm_selector_match()`` does.

        The interface is left out: where the selector names one, the flow may be its.
        """
        return (
            (not self.family or (self.family == 2) == (len(flow.destination) == 4))
            and (not self.proto or self.proto == flow.proto)
            and not (flow.source_port ^ self.source_port) & self.source_port_mask
            and not (flow.destination_port ^ self.destination_port) & self.destination_port_mask
            and _in_prefix(flow.source, self.source, self.source_prefix)
            and _in_prefix(flow.destination, self.destination, self.destination_prefix)
        )

    def __str__(self) -> str:
        def end(address: bytes, prefix: int, port: int, mask: int) -> str:
            text = f"{format_address(address)}/{prefix}" if prefix else "any"
            return (
                f"{text}:{port}/{mask:#x}"
                if mask not in (0, 0xFFFF)
                else (f"{text}:{port}" if mask else text)
            )

        source = end(self.source, self.source_prefix, self.source_port, self.source_port_mask)
        destination = end(
            self.destination,
            self.destination_prefix,
            self.destination_port,
            self.destination_port_mask,
        )
        return f"{source} → {destination}" + (f" proto {self.proto}" if self.proto else "")


def _in_prefix(address: bytes, network: bytes, prefix: int) -> bool:
    if not prefix:
        return True
    if len(address) != len(network):
        return False
    shift = len(network) * 8 - prefix
    return int.from_bytes(address) >> shift == int.from_bytes(network) >> shift
