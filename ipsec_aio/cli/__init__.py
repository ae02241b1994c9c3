"""The subcommands: a module each, with ``add_parser(subparsers)`` and ``run(arguments) -> int``."""

from __future__ import annotations

import argparse
from typing import TypeAlias

__all__ = ["Subparsers"]

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # pyright: ignore[reportPrivateUsage]
"""What ``ArgumentParser.add_subparsers`` returns; argparse has no public name for it."""
