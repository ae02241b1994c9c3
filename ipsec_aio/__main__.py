"""The command line: ``python -m ipsec_aio``, or ``ipsec-aio``.

Exit status: 0, 1 where it could not be done or the stamp is not verified, 2 for bad usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol, cast

from ipsec_aio.cli import Subparsers
from ipsec_aio.errors import IPsecError

__all__ = ["main"]

_NAME = "ipsec_aio"
_COMMANDS = ("stamp", "demo")


class _Command(Protocol):
    def add_parser(self, subparsers: Subparsers) -> None: ...
    def run(self, arguments: argparse.Namespace, /) -> int: ...


def _command(name: str) -> _Command:
    return cast("_Command", import_module(f"ipsec_aio.cli.{name}"))


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out a command line, ``sys.argv`` by default, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="ipsec-aio", description="asyncio that knows what IPsec did."
    )
    parser.add_argument("--version", action="version", version=f"ipsec_aio {_version()}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="|".join(_COMMANDS))
    commands = {name: _command(name) for name in _COMMANDS}
    for command in commands.values():
        command.add_parser(subparsers)
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as done:
        return int(done.code or 0)
    try:
        return commands[arguments.command].run(arguments)
    except (IPsecError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        print(f"ipsec-aio: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _version() -> str:
    try:
        return version(_NAME)
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
