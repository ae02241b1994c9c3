"""Backends: where facts come from, and which one a program uses."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from ipsec_aio.errors import BackendUnavailable

from .contract import Backend, Registration

if TYPE_CHECKING:
    from types import TracebackType

__all__ = [
    "Backend",
    "OpenBackend",
    "Registration",
    "current_backend",
    "default_backend",
    "open_backend",
    "resolve_backend",
    "set_default_backend",
]

_ENVIRONMENT = "IPSEC_AIO_BACKEND"
_STAMPS = ("use", "install", "require", "off")
_SPECS = ("xfrm", "memory", "memory:FILE.toml")
_LATER = ("xfrm+vici", "vici", "pfkey", "broker:")


class OpenBackend:
    """What :func:`open_backend` returns: ``async with`` opens the backend and closes it."""

    def __init__(self, spec: str, stamp: str, trust_policy: bool) -> None:
        self._spec = spec
        self._stamp = stamp
        self._trust_policy = trust_policy
        self._backend: Backend | None = None

    async def __aenter__(self) -> Backend:
        if self._backend is not None:
            raise RuntimeError("this backend is open already")
        self._backend = await _open(self._spec, self._stamp, self._trust_policy)
        return self._backend

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        backend, self._backend = self._backend, None
        if backend is not None:
            await backend.aclose()


def open_backend(
    spec: str, *, stamp: str = "use", trust_policy: bool = False, vici: str | None = None
) -> OpenBackend:
    """Name a backend, to be opened by ``async with``.

    ``spec`` is ``"xfrm"`` (this kernel), ``"memory"`` or ``"memory:FILE.toml"``. ``stamp`` is
    ``"use"`` (where it is installed), ``"install"`` (if absent), ``"require"`` (fail without it)
    or ``"off"``. With ``trust_policy`` an answer by policy counts as protected. ``vici`` names
    strongSwan's socket.

    Raises ValueError for an unknown spec or stamp mode, NotImplementedError for what this release
    does not have; opening raises BackendUnavailable or BackendDenied.
    """
    if stamp not in _STAMPS:
        raise ValueError(f"unknown stamp mode {stamp!r}; there are {', '.join(_STAMPS)}")
    if vici is not None or spec in _LATER or spec.startswith("broker:"):
        raise NotImplementedError(
            f"{spec!r}{' with vici=' if vici is not None else ''} is not in this release; "
            f"there are {', '.join(_SPECS)}"
        )
    if spec not in ("xfrm", "memory") and not spec.startswith("memory:"):
        raise ValueError(f"unknown backend {spec!r}; there are {', '.join(_SPECS)}")
    return OpenBackend(spec, stamp, trust_policy)


async def _open(spec: str, stamp: str, trust_policy: bool) -> Backend:
    if spec == "xfrm":
        from .xfrm import XfrmBackend

        backend = XfrmBackend(stamp=stamp, trust_policy=trust_policy)
        try:
            await backend.start()
        except BaseException:
            await backend.aclose()
            raise
        return backend
    from .memory import MemoryBackend

    return MemoryBackend(trust_policy=trust_policy)


_default: Backend | None = None
_by_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[Backend, AsyncGenerator[None]]]
_by_loop = WeakKeyDictionary()


def set_default_backend(backend: Backend | None) -> None:
    """Set the backend that functions take where none is given; None unsets it."""
    global _default
    _default = backend


def current_backend(backend: Backend | None = None) -> Backend:
    """Return the given backend, or the default that is set or was opened on the running loop.

    Raises BackendUnavailable where there is none.
    """
    if backend is not None:
        return backend
    if _default is not None:
        return _default
    try:
        opened = _by_loop.get(asyncio.get_running_loop())
    except RuntimeError:
        opened = None
    if opened is not None:
        return opened[0]
    raise BackendUnavailable(
        "no backend: pass backend=, call ipsec_aio.set_default_backend(), or set the environment "
        f"variable {_ENVIRONMENT} (to 'xfrm', for example)"
    )


async def resolve_backend(backend: Backend | None = None) -> Backend:
    """Return the given backend, or the default one.

    The one that IPSEC_AIO_BACKEND names is opened at its first use on each loop, and closed by
    the loop's ``shutdown_asyncgens``, which asyncio.run() and Runner call.
    """
    spec = os.environ.get(_ENVIRONMENT)
    if backend is not None or _default is not None or not spec:
        return current_backend(backend)
    loop = asyncio.get_running_loop()
    if loop not in _by_loop:
        opened = await _open_by_spec(spec)
        _by_loop[loop] = opened, _closer(loop, opened)
        await anext(_by_loop[loop][1])
    return _by_loop[loop][0]


default_backend = resolve_backend


async def _open_by_spec(spec: str) -> Backend:
    return await open_backend(spec).__aenter__()


async def _closer(loop: asyncio.AbstractEventLoop, backend: Backend) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        _by_loop.pop(loop, None)
        await backend.aclose()
