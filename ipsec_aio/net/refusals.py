"""Refusals: counted each, reported now and then. A flood of clear traffic must not fill logs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ipsec_aio.log import net_logger

if TYPE_CHECKING:
    from ipsec_aio.errors import ProtectionError

    from .stats import Counters

__all__ = ["LOG_INTERVAL", "TOLD_PER_SECOND", "Refusals"]

LOG_INTERVAL = 60.0
"""Seconds between two log warnings of one endpoint."""
TOLD_PER_SECOND = 10
"""How many refusals a protocol is told of in one second."""


class Refusals:
    """The refusals of one endpoint. Time is passed in, in seconds."""

    __slots__ = ("_counters", "_logged_at", "_told", "_unreported", "_window")

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._logged_at = self._window = float("-inf")
        self._told = self._unreported = 0

    def add(self, endpoint: object, addr: Any, error: ProtectionError, now: float) -> bool:
        """Count a refusal, log it if it is time to, and say whether the protocol may be told."""
        self._counters.refuse(error.clause)
        self._unreported += 1
        if now - self._logged_at >= LOG_INTERVAL:
            net_logger.warning(
                "%r refused %d since the last report; now %r: %s",
                endpoint,
                self._unreported,
                addr,
                error,
            )
            self._logged_at = now
            self._unreported = 0
        if now - self._window >= 1.0:
            self._window = now
            self._told = 0
        self._told += 1
        return self._told <= TOLD_PER_SECOND
