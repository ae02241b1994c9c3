"""Transports and protocols that stand in for others, where the loop's own cannot carry a token.

Rules:

* asyncio's transports carry the token themselves, under TLS too: nothing stands in, a read and a
  write cost nothing. uvloop's get a :class:`ForwardingTransport` in front: ``write`` is the loop's
  own bound method, what else there is costs a call.
* asyncio reads on in the context of whoever called ``resume_reading``, which may be another
  connection's callback. So that is run in the connection's own context.
* uvloop runs all connections of a server in one context, so there a protocol stands in that
  enters the connection's own: 40 ns a read, all in C.
* A latched connection has both on either loop: its transport can be held (:mod:`.latching`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from weakref import ReferenceType, ref

from .listening import weakly

if TYPE_CHECKING:
    from .connection import Connection
    from .latching import Guard

__all__ = [
    "ForwardingTransport",
    "connection_of",
    "dress",
    "end_with",
    "enter",
    "give_up",
    "undress",
    "user_of",
]


_TOLD = {"ptoken": "ptoken", "ipsec_enforced": "enforced", "ipsec_latch": "latch_status"}
"""What a connection tells as extra information."""


def dress(transport: asyncio.Transport, connection: Connection) -> asyncio.Transport:
    """Return the transport that the user gets for the loop's: the same where that will do."""
    connection.carried_by(transport)
    if connection.guard is not None:
        return LatchedTransport(transport, connection, connection.guard)
    if not type(transport).__dictoffset__:
        return ForwardingTransport(transport, connection)
    own: Any = transport
    own._ipsec_connection = connection
    own.resume_reading = connection.resume_reading
    extra = getattr(transport, "_extra", None)
    if isinstance(extra, dict):
        extra["ptoken"] = connection.ptoken
        extra["ipsec_enforced"] = connection.enforced
        connection.extra = extra
    else:
        # Weak, because a cycle would keep the transport from going at once.
        own.get_extra_info = partial(_tell, ref(transport), connection)
    return transport


def give_up(transport: asyncio.BaseTransport) -> None:
    """Leave a transport of the loop's to TLS, which pauses it and resumes it as it likes."""
    getattr(transport, "__dict__", {}).pop("resume_reading", None)


def undress(transport: asyncio.BaseTransport) -> asyncio.BaseTransport:
    """Return the loop's own transport."""
    return transport.raw if isinstance(transport, ForwardingTransport) else transport


def user_of(transport: asyncio.BaseTransport) -> asyncio.BaseProtocol | None:
    """Return the user's protocol of a loop's transport; None when the connection is over."""
    protocol = cast("asyncio.BaseProtocol | None", transport.get_protocol())
    return protocol.protocol if isinstance(protocol, _Entering) else protocol


def connection_of(transport: asyncio.BaseTransport) -> Connection | None:
    """Return what :func:`dress` was given; None for a transport that is not ours."""
    connection: Connection | None = getattr(transport, "_ipsec_connection", None)
    return connection


def _tell(
    transport: ReferenceType[asyncio.Transport],
    connection: Connection,
    name: str,
    default: Any = None,
) -> Any:
    if name in _TOLD:
        return getattr(connection, _TOLD[name])
    target = transport()
    return default if target is None else type(target).get_extra_info(target, name, default)


class ForwardingTransport(asyncio.Transport):
    """A transport in front of the loop's own, which answers for the token.

    What asyncio's transports do not have is looked up in the loop's transport, ``raw``.
    """

    __slots__ = ("__weakref__", "_ipsec_connection", "on_resume", "raw", "write", "writelines")

    def __init__(self, raw: asyncio.Transport, connection: Connection) -> None:
        self.on_resume: Callable[[], None] | None = None
        self.raw = raw
        self._ipsec_connection = connection
        self.write = raw.write  # type: ignore[method-assign]
        self.writelines = raw.writelines  # type: ignore[method-assign]

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As :meth:`asyncio.BaseTransport.get_extra_info`; knows ``"ptoken"`` and
        ``"ipsec_enforced"`` too.
        """
        if name in _TOLD:
            return getattr(self._ipsec_connection, _TOLD[name])
        return self.raw.get_extra_info(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.raw.set_protocol(enter(protocol, self._ipsec_connection))

    def get_protocol(self) -> asyncio.BaseProtocol:
        protocol = self.raw.get_protocol()
        return protocol.protocol if isinstance(protocol, _Entering) else protocol

    def is_closing(self) -> bool:
        return self.raw.is_closing()

    def close(self) -> None:
        self.raw.close()

    def abort(self) -> None:
        self.raw.abort()

    def is_reading(self) -> bool:
        return self.raw.is_reading()

    def pause_reading(self) -> None:
        hold = self._ipsec_connection.hold
        if hold is None:
            self.raw.pause_reading()
        else:
            hold.pause()

    def resume_reading(self) -> None:
        hold = self._ipsec_connection.hold
        if hold is None:
            self._deliver_early()
            self._ipsec_connection.read_on(self.raw.resume_reading)
        else:
            hold.resume = weakly(self.resume_reading)

    def _deliver_early(self) -> None:
        # What was read before reading could be paused.
        deliver, self.on_resume = self.on_resume, None
        self._ipsec_connection.keeps = False
        if deliver is not None:
            deliver()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.raw.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        return self.raw.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self.raw.get_write_buffer_limits()

    def write_eof(self) -> None:
        self.raw.write_eof()

    def can_write_eof(self) -> bool:
        return self.raw.can_write_eof()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)

    def __repr__(self) -> str:
        return repr(self.raw)


class LatchedTransport(ForwardingTransport):
    """A transport that can be held: what is written and read goes by its guard."""

    __slots__ = ("_guard",)

    def __init__(self, raw: asyncio.Transport, connection: Connection, guard: Guard) -> None:
        super().__init__(raw, connection)
        self._guard = guard
        self.write = guard.write  # type: ignore[method-assign]
        self.writelines = guard.writelines  # type: ignore[method-assign]
        guard.carried_by(raw)

    def close(self) -> None:
        # What is held may not leave, and nobody can wait for that.
        if self._guard.held:
            self.raw.abort()
        else:
            self.raw.close()

    def is_reading(self) -> bool:
        return not self._guard.held and self.raw.is_reading()

    def pause_reading(self) -> None:
        self._guard.pause_reading(self.raw)

    def resume_reading(self) -> None:
        self._deliver_early()
        self._guard.resume_reading(self.raw)

    def get_write_buffer_size(self) -> int:
        return self.raw.get_write_buffer_size() + self._guard.kept

    def write_eof(self) -> None:
        self._guard.write_eof(self.raw)

    @property
    def _sendfile_compatible(self) -> Any:
        raise NotImplementedError("sendfile would pass a latch by")


class _Entering:
    """A protocol that runs another in its connection's context."""

    __slots__ = ()

    protocol: Any
    connection: Connection

    def connection_lost(self, exc: Exception | None) -> None:
        connection = self.connection
        connection.close()
        connection.cell.run(self.protocol.connection_lost, exc)

    def pause_writing(self) -> None:
        guard = self.connection.guard
        if guard is None:
            self.connection.cell.run(self.protocol.pause_writing)
        else:
            guard.set_full(True)

    def resume_writing(self) -> None:
        guard = self.connection.guard
        if guard is None:
            self.connection.cell.run(self.protocol.resume_writing)
        else:
            guard.set_full(False)

    def eof_received(self) -> bool | None:
        guard = self.connection.guard
        if guard is not None and not guard.admits():
            # Open until it was told.
            guard.keep("eof_received", self._late_eof)
            return True
        callback: Callable[[], bool | None] | None = getattr(self.protocol, "eof_received", None)
        return None if callback is None else self.connection.cell.run(callback)

    def _late_eof(self) -> None:
        callback: Callable[[], bool | None] | None = getattr(self.protocol, "eof_received", None)
        transport = self.connection.transport
        if (callback is None or not callback()) and transport is not None:
            transport.close()


class _EnteringStream(_Entering, asyncio.Protocol):
    __slots__ = ("connection", "data_received", "protocol")

    def __init__(self, protocol: Any, connection: Connection) -> None:
        self.protocol = protocol
        self.connection = connection
        self.data_received = partial(connection.context.run, protocol.data_received)  # type: ignore[method-assign]


class _EnteringBuffered(_Entering, asyncio.BufferedProtocol):
    __slots__ = ("buffer_updated", "connection", "get_buffer", "protocol")

    def __init__(self, protocol: Any, connection: Connection) -> None:
        self.protocol = protocol
        self.connection = connection
        self.get_buffer = partial(connection.context.run, protocol.get_buffer)  # type: ignore[method-assign]
        self.buffer_updated = partial(connection.context.run, protocol.buffer_updated)  # type: ignore[method-assign]


class _LatchedStream(_Entering, asyncio.Protocol):
    __slots__ = ("connection", "guard", "protocol")

    def __init__(self, protocol: Any, connection: Connection, guard: Guard) -> None:
        self.protocol = protocol
        self.connection = connection
        self.guard = guard

    def data_received(self, data: bytes) -> None:
        if self.guard.admits():
            self.connection.enter(self.protocol.data_received, data)
        else:
            self.guard.keep("data_received", self.protocol.data_received, data)


class _LatchedBuffered(_EnteringBuffered):
    __slots__ = ("guard",)

    def __init__(self, protocol: Any, connection: Connection, guard: Guard) -> None:
        super().__init__(protocol, connection)
        self.guard = guard
        self.buffer_updated = self._updated  # type: ignore[method-assign]

    def _updated(self, nbytes: int) -> None:
        if self.guard.admits():
            self.connection.enter(self.protocol.buffer_updated, nbytes)
        else:
            # Nothing is read any more, so it stays in the buffer.
            self.guard.keep("buffer_updated", self.protocol.buffer_updated, nbytes)


class _Ended(_Entering, asyncio.Protocol):
    """Stands in where nothing is delivered any more but the end, and why it came."""

    __slots__ = ("connection", "error", "protocol")

    def __init__(self, protocol: Any, connection: Connection, error: Exception) -> None:
        self.protocol = protocol
        self.connection = connection
        self.error = error

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(self.error)


def end_with(transport: asyncio.BaseTransport, connection: Connection, error: Exception) -> None:
    """Have the protocol of a loop's transport, which is about to be aborted, hear of this error."""
    protocol = user_of(transport)
    if protocol is not None:
        transport.set_protocol(_Ended(protocol, connection, error))


def enter(protocol: asyncio.BaseProtocol, connection: Connection) -> asyncio.BaseProtocol:
    """Return what the loop is to call: a stand-in only where the loop shares its contexts, and for
    latched connections.
    """
    guard = connection.guard
    if not connection.shared and guard is None:
        return protocol
    # uvloop's own rule for how a protocol wants to read.
    buffered = hasattr(protocol, "get_buffer") and not isinstance(protocol, asyncio.Protocol)
    if guard is not None:
        return (_LatchedBuffered if buffered else _LatchedStream)(protocol, connection, guard)
    return (_EnteringBuffered if buffered else _EnteringStream)(protocol, connection)
