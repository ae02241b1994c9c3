"""Fixtures for tests that ask the real kernel, in namespaces of their own."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

CLONE_NEWNET = 0x40000000
SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
LINUX_CAPABILITY_VERSION_3 = 0x20080522
libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def netns() -> Iterator[None]:
    """A fresh network namespace, which this thread is in until the test ends."""
    if os.geteuid():
        pytest.skip("a network namespace needs root")
    with open("/proc/thread-self/ns/net") as home:
        if libc.unshare(CLONE_NEWNET):
            pytest.skip(f"no network namespace here: {os.strerror(ctypes.get_errno())}")
        try:
            yield
        finally:
            assert not libc.setns(home.fileno(), CLONE_NEWNET)


class Elsewhere:
    """Another network namespace. In a ``with`` block this thread is in it; ip(8) knows ``path``."""

    def __init__(self) -> None:
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        assert not libc.unshare(CLONE_NEWNET)
        self._there = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        self.path = f"/proc/{os.getpid()}/fd/{self._there}"
        self.__exit__()

    def __enter__(self) -> None:
        assert not libc.setns(self._there, CLONE_NEWNET)

    def __exit__(self, *_: object) -> None:
        assert not libc.setns(self._home, CLONE_NEWNET)

    def close(self) -> None:
        os.close(self._home)
        os.close(self._there)


@pytest.fixture
def elsewhere(netns: None) -> Iterator[Elsewhere]:
    """Another network namespace beside the fresh one."""
    other = Elsewhere()
    yield other
    other.close()


@pytest.fixture
def unprivileged() -> Callable[[Callable[[], Any]], BaseException | None]:
    """Run a function in a thread without capabilities; return what it raised."""
    number = SYS_CAPSET.get(os.uname().machine)
    if number is None:
        pytest.skip("the number of capset(2) is not known here")

    def run(function: Callable[[], Any]) -> BaseException | None:
        raised: list[BaseException] = []

        def target() -> None:
            header = (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, 0)
            if libc.syscall(number, header, (ctypes.c_uint32 * 6)()):
                raised.append(OSError(ctypes.get_errno(), "capset"))
                return
            try:
                function()
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
        return raised[0] if raised else None

    return run
