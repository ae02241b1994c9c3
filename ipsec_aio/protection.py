"""What SAs do for packets: values that tokens are made of.

Rules:

* Each property is True, False or None for unknown; an algorithm that is not known proves nothing.
* Where several SAs may have carried a packet, the weakest of their properties count; where they
  differ in kind (tunnel or not), the answer is unknown.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from .algorithms import AEADS, AUTHENTICATORS, CIPHERS
from .enums import Assurance, Mode
from .flow import Mark, format_address
from .sa import IPPROTO_AH, IPPROTO_COMP, IPPROTO_ESP, SA, Algorithm

__all__ = [
    "CLEAR",
    "PROTECTING",
    "TUNNELS",
    "UNKNOWN",
    "Group",
    "Protection",
    "Strength",
    "Verdict",
    "both",
    "group_of",
    "protection_of",
    "unknown",
    "weakest",
]

PROTECTING: Final = (IPPROTO_ESP, IPPROTO_AH)
TUNNELS: Final = (Mode.TUNNEL, Mode.BEET, Mode.IPTFS)
# These carry the whole inner packet, its IP options with it.
_WHOLE: Final = (Mode.TUNNEL, Mode.IPTFS)
_PROTO_NAMES = {IPPROTO_ESP: "esp", IPPROTO_AH: "ah", IPPROTO_COMP: "comp"}


class Strength(NamedTuple):
    """What SAs do, without what singles out one peer."""

    proto: int
    mode: Mode
    aead: Algorithm | None
    encryption: Algorithm | None
    authentication: Algorithm | None
    compression: Algorithm | None


class Group(NamedTuple):
    """SAs that may replace each other without making another channel."""

    proto: int
    mode: Mode
    aead: Algorithm | None
    encryption: Algorithm | None
    authentication: Algorithm | None
    compression: Algorithm | None
    reqid: int
    mark: Mark
    if_id: int
    source: bytes
    destination: bytes

    @property
    def strength(self) -> Strength:
        """The group without what singles out one peer."""
        return Strength(*self[:6])

    def __str__(self) -> str:
        algorithms = "+".join(
            str(a) for a in (self.aead, self.encryption, self.authentication) if a is not None
        )
        name = _PROTO_NAMES.get(self.proto, f"proto-{self.proto}")
        text = f"{name}/{self.mode.name.lower()}" + (f"({algorithms})" if algorithms else "")
        if self.mode in TUNNELS:
            text += f"[{format_address(self.source)}-{format_address(self.destination)}]"
        return text + (f" reqid {self.reqid}" if self.reqid else "")


class Protection(NamedTuple):
    """What was done for a packet, by which groups of SAs, under which policy.

    ``others`` are strengths of SAs of other addresses under which it may have come as well.
    """

    privacy: bool | None
    integrity: bool | None
    compression: bool | None
    tunnel: bool | None
    ipoptions: bool | None
    groups: tuple[Group, ...] = ()
    policy: str | None = None
    others: tuple[Strength, ...] = ()


class Verdict(NamedTuple):
    """What is known of a channel: how surely, and why not more.

    ``ports`` are (IP protocol, local port, peer port) where selectors name any, 0 for those that
    they do not name; None where ports do not tell channels apart.
    """

    assurance: Assurance
    protection: Protection
    reason: str = ""
    ports: tuple[int, int, int] | None = None


UNKNOWN: Final = Protection(None, None, None, None, None)
CLEAR: Final = Verdict(Assurance.NONE, Protection(False, False, False, False, False))


def unknown(reason: str) -> Verdict:
    """Return the verdict that nothing is known."""
    return Verdict(Assurance.UNKNOWN, UNKNOWN, reason)


def group_of(sa: SA) -> Group:
    """Return the group that an SA belongs to."""
    return Group(
        sa.proto,
        sa.mode,
        sa.aead,
        sa.encryption,
        sa.authentication,
        sa.compression,
        sa.reqid,
        sa.mark,
        sa.if_id,
        sa.source,
        sa.destination,
    )


def protection_of(sa: SA) -> Protection:
    """Return what an SA does for the packets that it carries."""
    privacy: bool | None = sa.encrypts
    integrity: bool | None = sa.authenticates
    if privacy and not (_known(sa.aead, AEADS) and _known(sa.encryption, CIPHERS)):
        privacy = None
    if integrity and not (_known(sa.aead, AEADS) and _known(sa.authentication, AUTHENTICATORS)):
        integrity = None
    # AH covers the header in front of it.
    covers_options = sa.proto == IPPROTO_AH or sa.mode in _WHOLE
    return Protection(
        privacy=privacy,
        integrity=integrity,
        compression=sa.proto == IPPROTO_COMP,
        tunnel=sa.mode in TUNNELS,
        ipoptions=integrity if covers_options else False,
        groups=(group_of(sa),),
    )


def _known(algorithm: Algorithm | None, names: dict[str, tuple[int, int]]) -> bool:
    return algorithm is None or algorithm.name in names


def _weaker(one: bool | None, other: bool | None) -> bool | None:
    if one is False or other is False:
        return False
    return True if one and other else None


def _stronger(one: bool | None, other: bool | None) -> bool | None:
    if one or other:
        return True
    return False if one is False and other is False else None


def both(one: Protection, other: Protection) -> Protection:
    """Return what holds of a packet for which both were done."""
    return Protection(
        _stronger(one.privacy, other.privacy),
        _stronger(one.integrity, other.integrity),
        _stronger(one.compression, other.compression),
        _stronger(one.tunnel, other.tunnel),
        _stronger(one.ipoptions, other.ipoptions),
        one.groups + other.groups,
        one.policy,
        one.others + other.others,
    )


def weakest(protections: Iterable[Protection]) -> Protection:
    """Return what holds whichever of them was done; nothing, where there is none."""
    result: Protection | None = None
    for p in protections:
        if result is None or result == p:
            result = p
        else:
            result = Protection(
                _weaker(result.privacy, p.privacy),
                _weaker(result.integrity, p.integrity),
                result.compression if result.compression == p.compression else None,
                result.tunnel if result.tunnel == p.tunnel else None,
                _weaker(result.ipoptions, p.ipoptions),
                # A fixed order, so that equal sets make equal channels.
                tuple(sorted({*result.groups, *p.groups}, key=repr)),
                result.policy if result.policy == p.policy else None,
                tuple(sorted({*result.others, *p.others}, key=repr)),
            )
    return UNKNOWN if result is None else result
