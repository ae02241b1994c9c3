"""Backends: where facts come from, and which one a program uses."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Generator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ipsec_aio.errors import BackendUnavailable

from .contract import Backend, Registration

if TYPE_CHECKING:
    from types import TracebackType

    from .memory import MemoryBackend
    from .tables import TableBackend

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
_SPECS = "'xfrm', 'xfrm+vici', 'memory' and 'memory:FILE.toml'"
_JOINED = "xfrm+vici"
_LATER = ("vici", "pfkey")
_FILE = "memory:"


class OpenBackend:
    """What :func:`open_backend` returns: ``async with`` opens the backend and closes it."""

    def __init__(
        self,
        spec: str,
        stamp: str,
        trust_policy: bool,
        vici: str | None,
        identities: str | os.PathLike[str] | None,
    ) -> None:
        self._spec = spec
        self._stamp = stamp
        self._trust_policy = trust_policy
        self._vici = vici
        self._identities = identities
        self._backend: Backend | None = None

    async def __aenter__(self) -> Backend:
        if self._backend is not None:
            raise RuntimeError("this backend is open already")
        self._backend = await self._open()
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

    async def _open(self) -> Backend:
        static = None
        if self._identities is not None:
            from .static import StaticIdentities

            # What is wrong with the file is told before anything is opened.
            static = StaticIdentities.from_toml(self._identities)
        backend = await self._open_spec()
        if static is not None:
            backend.use_identities(static)
        return backend

    async def _open_spec(self) -> TableBackend:
        if self._spec == "xfrm":
            from .xfrm import XfrmBackend

            backend = XfrmBackend(stamp=self._stamp, trust_policy=self._trust_policy)
            await backend.start()
            return backend
        if self._spec == _JOINED:
            from .join import XfrmViciBackend

            joined = XfrmViciBackend(
                vici=self._vici, stamp=self._stamp, trust_policy=self._trust_policy
            )
            await joined.start()
            return joined
        memory = _open_memory(self._spec, trust_policy=self._trust_policy)
        if self._stamp == "off":
            memory.lose_stamp()
        return memory


def open_backend(
    spec: str,
    *,
    stamp: str = "use",
    trust_policy: bool = False,
    vici: str | None = None,
    identities: str | os.PathLike[str] | None = None,
) -> OpenBackend:
    """Name a backend, to be opened by ``async with``.

    ``spec`` is ``"xfrm"`` (this kernel), ``"xfrm+vici"`` (this kernel, and who is at the ends of
    its SAs from strongSwan), ``"memory"`` or ``"memory:FILE.toml"``. ``stamp`` is ``"use"`` (where
    it is installed), ``"install"`` (if absent), ``"require"`` (fail without it) or ``"off"``;
    ``"memory"`` plays one that is installed, unless it is ``"off"``. With
    ``trust_policy`` an answer by policy counts as protected. ``vici`` is the address of
    strongSwan's socket, ``"unix:///path"`` or a path, for ``"xfrm+vici"``; without one it is where
    strongSwan puts it, ``unix:///var/run/charon.vici``. ``identities`` is a TOML file with the
    identities of SAs that were keyed by hand (docs/identities.md), for any backend.

    Raises ValueError for an unknown spec or stamp mode, for what is no address and for one that
    goes with another spec, NotImplementedError for what this release does not have; opening raises
    BackendUnavailable, BackendDenied, OSError where a file cannot be read, or ValueError that
    says what is wrong in it.
    """
    if stamp not in _STAMPS:
        raise ValueError(f"unknown stamp mode {stamp!r}; there are {', '.join(_STAMPS)}")
    if spec in _LATER or spec.startswith("broker:"):
        raise NotImplementedError(f"{spec!r} is not in this release; there are {_SPECS}")
    if spec not in ("xfrm", _JOINED) and not _is_memory(spec):
        raise ValueError(f"unknown backend {spec!r}; there are {_SPECS}")
    if vici is not None:
        if spec != _JOINED:
            raise ValueError(f"vici= goes with {_JOINED!r}, not with {spec!r}")
        from ipsec_aio.backends.vici import parse_address

        parse_address(vici)
    return OpenBackend(spec, stamp, trust_policy, vici, identities)


def _is_memory(spec: str) -> bool:
    return spec == "memory" or (spec.startswith(_FILE) and len(spec) > len(_FILE))


def _open_memory(spec: str, *, trust_policy: bool = False) -> MemoryBackend:
    from .memory import MemoryBackend

    if spec == "memory":
        return MemoryBackend(trust_policy=trust_policy)
    return MemoryBackend.from_toml(Path(spec.removeprefix(_FILE)), trust_policy=trust_policy)


_default: Backend | None = None
# Opened because the environment says so; each with what closes it when its loop shuts down.
_by_loop: dict[asyncio.AbstractEventLoop, tuple[Backend, AsyncGenerator[None, None]]] = {}
_locks: dict[asyncio.AbstractEventLoop, asyncio.Lock] = {}


def set_default_backend(backend: Backend | None) -> None:
    """Set the backend that functions take where none is given; None unsets it.

    Raises TypeError for what is no open backend.
    """
    global _default
    _default = None if backend is None else _checked(backend)


def _checked(backend: Backend) -> Backend:
    if not isinstance(backend, Backend):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"not an open backend: {backend!r}; use 'async with ipsec_aio.open_backend(…)'"
        )
    return backend


def current_backend(backend: Backend | None = None) -> Backend:
    """Return the given backend, else the default, else what ``IPSEC_AIO_BACKEND`` names.

    A memory backend is opened here at its first use; another is there only where the running loop
    has opened it (:func:`default_backend`). Raises TypeError for what is no open backend,
    BackendUnavailable where there is none, and what opening a memory backend raises.
    """
    if backend is not None:
        return _checked(backend)
    if _default is not None:
        return _default
    loop = _running_loop()
    if loop in _by_loop:
        return _by_loop[loop][0]
    spec = os.environ.get(_ENVIRONMENT)
    if not spec:
        raise BackendUnavailable(
            "no IPsec backend: pass backend=, or call ipsec_aio.set_default_backend(), or set the "
            f"environment variable {_ENVIRONMENT} to one of {_SPECS}"
        )
    if not _is_memory(spec):
        raise BackendUnavailable(
            f"the backend {spec!r} that {_ENVIRONMENT} names is not open on this loop yet: the "
            "first endpoint opens it"
        )
    if loop is None:
        return _memory_of_process(spec, os.getpid())
    with _named_by_environment():
        return _keep(loop, _open_memory(spec))


@cache
def _memory_of_process(spec: str, pid: int) -> Backend:
    """Return what stands in where no loop runs. It holds nothing that has to be closed."""
    del pid  # a forked process has its own
    with _named_by_environment():
        return _open_memory(spec)


@contextmanager
def _named_by_environment() -> Generator[None]:
    """Say with what is wrong with a backend where it was named: the program has no word of it."""
    try:
        yield
    except (OSError, ValueError, NotImplementedError) as error:
        error.add_note(f"the backend is named by the environment variable {_ENVIRONMENT}")
        raise


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


async def default_backend() -> Backend:
    """Return the backend of those who name none.

    What ``IPSEC_AIO_BACKEND`` names is opened at its first use on each loop, and closed with the
    loop's asynchronous generators, as asyncio.run() and Runner do. Raises BackendUnavailable where
    there is no default, and what :func:`open_backend` raises.
    """
    spec = os.environ.get(_ENVIRONMENT)
    if _default is not None or not spec or _is_memory(spec):
        return current_backend()
    loop = asyncio.get_running_loop()
    async with _locks.setdefault(loop, asyncio.Lock()):
        if loop not in _by_loop:
            with _named_by_environment():
                _keep(loop, await open_backend(spec).__aenter__())
        return _by_loop[loop][0]


async def resolve_backend(backend: Backend | None = None) -> Backend:
    """Return the given backend, or the default one.

    Raises TypeError for what is no open backend, and what :func:`default_backend` raises.
    """
    return await default_backend() if backend is None else _checked(backend)


def _keep(loop: asyncio.AbstractEventLoop, backend: Backend) -> Backend:
    """Have the running loop close a backend when it shuts down."""
    _sweep()
    closer = _close_with(loop, backend)
    _by_loop[loop] = backend, closer
    # It waits for nothing before it yields, so this is all of its first step.
    with suppress(StopIteration):
        anext(closer).__await__().__next__()
    return backend


async def _close_with(
    loop: asyncio.AbstractEventLoop, backend: Backend
) -> AsyncGenerator[None, None]:
    """Wait to be closed: a loop that shuts down closes its generators, on either loop's kind."""
    try:
        yield
    finally:
        _forget(loop)
        await backend.aclose()


def _forget(loop: asyncio.AbstractEventLoop) -> None:
    _by_loop.pop(loop, None)
    _locks.pop(loop, None)


def _sweep() -> None:
    """Let go of loops that were closed without shutting down."""
    for loop in [loop for loop in _by_loop if loop.is_closed()]:
        backend, _ = _by_loop[loop]
        _forget(loop)
        # On a closed loop there is nothing to wait for.
        with suppress(StopIteration):
            backend.aclose().__await__().__next__()
