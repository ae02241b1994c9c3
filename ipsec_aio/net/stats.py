"""Counts of what came in and what was refused, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

__all__ = ["Counters", "IPsecStats"]

_EMPTY: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class IPsecStats:
    """A snapshot: ``transport.ipsec_stats`` counts datagrams, ``server.ipsec_stats`` connections.

    ``received`` were taken from the kernel; ``refused`` of these did not meet ``require``, or met
    it no longer, and ``refused_by`` says how many for each clause. ``protected`` and ``unknown``
    count those whose token was protected, or of assurance UNKNOWN, whether refused or not.
    ``held`` had to wait for
    an identity or an SA; ``dropped`` were refused because their deadline had passed or there was no
    room for them to wait, or were lost when the transport was closed.
    """

    received: int = 0
    protected: int = 0
    unknown: int = 0
    refused: int = 0
    refused_by: Mapping[str, int] = field(default_factory=lambda: _EMPTY, hash=False)
    held: int = 0
    dropped: int = 0


class Counters:
    """The running counts behind a snapshot. The clauses of a requirement are few: bounded."""

    __slots__ = (
        "dropped",
        "held",
        "protected",
        "received",
        "refused",
        "refused_by",
        "unknown",
    )

    def __init__(self) -> None:
        self.received = self.protected = self.unknown = self.refused = 0
        self.held = self.dropped = 0
        self.refused_by: dict[str, int] = {}

    def refuse(self, clause: str) -> None:
        """Count one refusal."""
        self.refused += 1
        self.refused_by[clause] = self.refused_by.get(clause, 0) + 1

    def snapshot(self, *, received: int = 0, protected: int = 0) -> IPsecStats:
        """Return the counts of this moment, corrected by what the caller knows better."""
        return IPsecStats(
            self.received + received,
            self.protected + protected,
            self.unknown,
            self.refused,
            MappingProxyType(dict(self.refused_by)),
            self.held,
            self.dropped,
        )
