"""What a backend tells the mirror: dumps and events alike, as immutable values.

An update is told as SAAdded or PolicyAdded with the same key; strongSwan's address update is a
deletion and an addition.
"""

from __future__ import annotations

from dataclasses import dataclass

from .enums import PolicyAction
from .policy import Policy, PolicyKey
from .sa import SA, SAKey

__all__ = [
    "DefaultActions",
    "Event",
    "PoliciesFlushed",
    "PolicyAdded",
    "PolicyDeleted",
    "PolicyExpired",
    "SAAdded",
    "SADeleted",
    "SAExpired",
    "SAMapped",
    "SAMigrated",
    "SAsFlushed",
]


@dataclass(frozen=True, slots=True)
class SAAdded:
    """NEWSA or UPDSA.

    ``updated``: it is an UPDSA of the kernel's, which says what was asked for; of an SA that was
    valid before, the kernel took over limits, selector, encapsulation and little else.
    """

    sa: SA
    updated: bool = False


@dataclass(frozen=True, slots=True)
class SADeleted:
    """DELSA."""

    key: SAKey


@dataclass(frozen=True, slots=True)
class SAExpired:
    """EXPIRE. ``hard``: it is gone; soft: it should be rekeyed and still works."""

    sa: SA
    hard: bool


@dataclass(frozen=True, slots=True)
class SAsFlushed:
    """FLUSHSA. ``proto`` 0 (or 255, IPSEC_PROTO_ANY) is every protocol."""

    proto: int


@dataclass(frozen=True, slots=True)
class SAMapped:
    """MAPPING: the peer's NAT moved it to another address or port."""

    key: SAKey
    reqid: int
    old_source: bytes
    new_source: bytes
    old_port: int
    new_port: int


@dataclass(frozen=True, slots=True)
class SAMigrated:
    """MIGRATE, one of its address pairs: SAs with these old addresses move to the new ones."""

    proto: int
    mode: int
    reqid: int
    old_source: bytes
    old_destination: bytes
    new_source: bytes
    new_destination: bytes


@dataclass(frozen=True, slots=True)
class PolicyAdded:
    """NEWPOLICY or UPDPOLICY."""

    policy: Policy


@dataclass(frozen=True, slots=True)
class PolicyDeleted:
    """DELPOLICY, by key or, with ``key`` None, by the kernel's index."""

    key: PolicyKey | None
    index: int = 0


@dataclass(frozen=True, slots=True)
class PolicyExpired:
    """POLEXPIRE. ``hard``: it is gone."""

    policy: Policy
    hard: bool


@dataclass(frozen=True, slots=True)
class PoliciesFlushed:
    """FLUSHPOLICY. ``kind`` is the policy type that was flushed."""

    kind: int = 0


@dataclass(frozen=True, slots=True)
class DefaultActions:
    """GETDEFAULT or SETDEFAULT: what happens to traffic that no policy covers."""

    inbound: PolicyAction
    forward: PolicyAction
    outbound: PolicyAction


Event = (
    SAAdded
    | SADeleted
    | SAExpired
    | SAsFlushed
    | SAMapped
    | SAMigrated
    | PolicyAdded
    | PolicyDeleted
    | PolicyExpired
    | PoliciesFlushed
    | DefaultActions
)
