"""The loggers."""

from __future__ import annotations

import logging

__all__ = ["logger", "net_logger"]

logger = logging.getLogger("ipsec_aio")
"""Root of all loggers of the package."""

net_logger = logging.getLogger("ipsec_aio.net")
"""What endpoints refuse."""
