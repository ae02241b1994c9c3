"""Run classes of CPython's own test.test_asyncio, with our functions in the place of the loop's.

``python run.py [--patched] [--uvloop] [--without PATTERN] MODULE:CLASS…`` writes JSON to
standard output: what became of each test (``ok``, ``failed``, ``skipped``), and how many calls our
functions took. The tests are the standard library's, or else those under the directory
CPYTHON_TESTS, which is ``usr/lib/python3.11`` of Debian's unpacked libpython3.11-testsuite.
"""

from __future__ import annotations

import argparse
import asyncio
import asyncio.base_events
import importlib
import importlib.util
import json
import logging
import os
import sys
import unittest
import warnings
from contextvars import ContextVar
from fnmatch import fnmatchcase
from typing import Any

import uvloop

import ipsec_aio
from ipsec_aio.net import endpoints
from ipsec_aio.net.forward import connection_of


class Result(unittest.TestResult):
    """Keeps one word per test, and the last line of what went wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: dict[str, str] = {}

    def _note(self, test: unittest.TestCase, outcome: str) -> None:
        name = test.id()
        if " " in name or "(" in name:
            return
        module, _, rest = name.partition("test_asyncio.")[2].partition(".")
        self.outcomes[f"{module}.{rest}"] = outcome

    def addSuccess(self, test: Any) -> None:  # noqa: N802
        self._note(test, "ok")

    def addSkip(self, test: Any, reason: str) -> None:  # noqa: N802
        self._note(test, "skipped")

    def addExpectedFailure(self, test: Any, err: Any) -> None:  # noqa: N802
        self._note(test, "ok")

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:  # noqa: N802
        if err is not None:
            self.addFailure(test, err)

    def addFailure(self, test: Any, err: Any) -> None:  # noqa: N802
        super().addFailure(test, err)
        self._note(test, "failed")
        if os.environ.get("CPYTHON_TESTS_VERBOSE"):
            sys.stderr.write(f"{test.id()}\n{self.failures[-1][1]}\n")

    def addError(self, test: Any, err: Any) -> None:  # noqa: N802
        super().addError(test, err)
        self._note(test, "failed")
        if os.environ.get("CPYTHON_TESTS_VERBOSE"):
            sys.stderr.write(f"{test.id()}\n{self.errors[-1][1]}\n")


_ours = ("create_datagram_endpoint", "create_server", "create_connection")
_delegated: list[str] = []
_upgrading: ContextVar[bool] = ContextVar("upgrading", default=False)


def _delegate(cls: type, base: type) -> None:
    """Have the methods of ``cls`` call our functions, which call those of ``base``."""

    def method(name: str) -> Any:
        original = getattr(base, name)
        function = getattr(ipsec_aio, name)

        async def delegating(self: Any, factory: Any, *args: Any, **kwargs: Any) -> Any:
            owner = getattr(factory, "__module__", None)
            if owner == "ipsec_aio.net.streams":
                return await original(self, factory, *args, **kwargs)
            _delegated.append(name)
            return await function(factory, *args, **kwargs)

        return delegating

    for name in _ours:
        setattr(cls, name, method(name))

    original = base.start_tls  # type: ignore[attr-defined]

    async def start_tls(self: Any, transport: Any, *args: Any, **kwargs: Any) -> Any:
        if _upgrading.get() or connection_of(transport) is None:
            return await original(self, transport, *args, **kwargs)
        before = _upgrading.set(True)
        try:
            return await ipsec_aio.start_tls(transport, *args, **kwargs)
        finally:
            _upgrading.reset(before)

    cls.start_tls = start_tls  # type: ignore[attr-defined]


class _SocketModule:
    """The socket module of asyncio.base_events: tests put another in its place."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio.base_events.socket, name)


def _patch(on_uvloop: bool) -> None:
    endpoints.socket = _SocketModule()  # type: ignore[assignment]
    ipsec_aio.set_default_backend(ipsec_aio.MemoryBackend())
    if not on_uvloop:
        base = asyncio.base_events.BaseEventLoop
        original = type("Original", (), {n: getattr(base, n) for n in (*_ours, "start_tls")})
        _delegate(base, original)
    for name in ("start_server", "open_connection"):
        for module in (asyncio, asyncio.streams):
            setattr(module, name, _counted(name))


def _counted(name: str) -> Any:
    function = getattr(ipsec_aio, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        _delegated.append(name)
        return function(*args, **kwargs)

    return counting


def _use_uvloop(patched: bool) -> None:
    class Loop(uvloop.Loop):
        # The test suite's clean-up asks for it.
        _default_executor = None

    if patched:
        _delegate(Loop, uvloop.Loop)

    class Policy(uvloop.EventLoopPolicy):
        def _loop_factory(self) -> Any:
            return Loop()

    asyncio.set_event_loop_policy(Policy())
    # Test cases that name a loop class.
    asyncio.SelectorEventLoop = lambda *selector: Loop()  # type: ignore[assignment,misc]
    asyncio.new_event_loop = lambda: Loop()
    # uvloop's policy has none, and its loops wait for children by themselves.
    asyncio.set_child_watcher = lambda watcher: None


def locate() -> str:
    """Return where CPython's tests are, for people. Raises ModuleNotFoundError without them."""
    if importlib.util.find_spec("test.test_asyncio") is None:
        directory = os.environ.get("CPYTHON_TESTS", "")
        sys.path.insert(0, directory)
        for name in [name for name in sys.modules if name == "test" or name.startswith("test.")]:
            del sys.modules[name]
        importlib.invalidate_caches()
    return importlib.import_module("test.test_asyncio").__path__[0]


def _is_out(test: Any, patterns: list[str]) -> bool:
    name = test.id().rpartition(".")[2]
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patched", action="store_true")
    parser.add_argument("--uvloop", action="store_true")
    parser.add_argument("--without", action="append", default=[], metavar="PATTERN")
    parser.add_argument("classes", nargs="+", metavar="MODULE:CLASS[.TEST]")
    arguments = parser.parse_args()
    locate()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    if arguments.uvloop:
        _use_uvloop(arguments.patched)
    if arguments.patched:
        _patch(arguments.uvloop)
    result = Result()
    for chosen in arguments.classes:
        module_name, _, class_name = chosen.partition(":")
        module = importlib.import_module(f"test.test_asyncio.{module_name}")
        tests = unittest.defaultTestLoader.loadTestsFromName(class_name, module)
        unittest.TestSuite(t for t in tests if not _is_out(t, arguments.without)).run(result)
    json.dump({"outcomes": result.outcomes, "delegated": len(_delegated)}, sys.stdout)
    sys.stdout.flush()
    # Threads that a failed test left behind must not keep the process.
    os._exit(0)


if __name__ == "__main__":
    main()
