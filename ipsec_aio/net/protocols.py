"""Base classes for protocols whose callbacks get a token.

Rules:

* Exactly instances of these classes get the calls with a token; this is judged when a protocol is
  installed, and again on ``transport.set_protocol()``. Everything else, whatever it derives from,
  gets asyncio's plain calls.
* At run time they are asyncio's own protocol classes, because loops choose how to read by
  ``isinstance``. To type checkers they are not: another required parameter would make each
  override, in every user's subclass too, an error.
* When and in which order asyncio's callbacks are called is its own grammar, unchanged. What is
  added (``protection_changed``, ``latch_broken``, ``latch_restored``, ``datagram_refused``) is
  called by the loop between other callbacks, in the connection's context, never before
  ``connection_made`` has returned, and never after the transport began to close. Whatever it
  raises goes to the loop's exception handler and has no other consequence.
"""

from __future__ import annotations

import asyncio
import inspect
from types import FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ipsec_aio.errors import ProtectionError
    from ipsec_aio.latch import LatchReason
    from ipsec_aio.tokens import PToken

    from .datagram import DatagramTransport

    class _Base: ...

    class _Stream: ...

    class _Buffered: ...

    class _Datagram: ...

else:
    _Base = asyncio.BaseProtocol
    _Stream = asyncio.Protocol
    _Buffered = asyncio.BufferedProtocol
    _Datagram = asyncio.DatagramProtocol

__all__ = [
    "BufferedProtocol",
    "DatagramProtocol",
    "Protocol",
    "TokenProtocol",
    "check_protocol",
    "check_stream_protocol",
    "takes_token",
]


class TokenProtocol(_Base):
    """What the three have in common, and the mark by which they are known."""

    __slots__ = ()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called once, last. ``exc`` is None after ``close()``, ``abort()`` or the peer's EOF."""

    def pause_writing(self) -> None:
        """Called when the write buffer has grown over the high-water mark."""

    def resume_writing(self) -> None:
        """Called when the write buffer has drained to the low-water mark. Pairs with the above."""


class _Watching(TokenProtocol):
    """What streams are told when their protection changes."""

    __slots__ = ()

    def protection_changed(self, old: PToken, new: PToken) -> None:
        """Called when another token had to take the place of the connection's.

        What was read under ``old`` stays as good as it says; what is read from now on comes under
        ``new``, which :func:`current_ptoken` and ``get_extra_info("ptoken")`` give already. An
        equivalent rekey, or a pending token that was resolved, is no change.
        """

    def latch_broken(self, reason: LatchReason) -> None:
        """Called when a latched connection's protection conflicts with what was latched.

        Nothing was read under the conflict since it was noticed, and nothing is read from here on.
        Under ``on_break="reset"``, or if ``reason`` is EVIDENCE, ``connection_lost`` is next.
        Else ``latch_restored`` or ``connection_lost`` may follow, and ``pause_writing`` when
        something is, or was, to be written.
        """

    def latch_restored(self) -> None:
        """Called when all is again as it was latched. Pairs with the above.

        Reading and writing go on right after it has returned.
        """


class Protocol(_Watching, _Stream):
    """A stream protocol: ``connection_made data_received* eof_received? connection_lost``.

    Between them, if the connection is not closing: ``(protection_changed | latch_broken
    latch_restored)*``, and at the end perhaps a ``latch_broken`` that nothing restores.
    """

    __slots__ = ()

    def connection_made(self, transport: asyncio.Transport, ptoken: PToken) -> None:
        """Called once, before any data. ``ptoken`` says what protects the connection."""

    def data_received(self, data: bytes) -> None:
        """Called with each piece of the stream. The token is :func:`current_ptoken`'s."""

    def eof_received(self) -> bool | None:
        """Called when the peer writes no more. A true answer keeps our side open."""


class BufferedProtocol(_Watching, _Buffered):
    """A stream protocol that brings its own buffers.

    ``connection_made (get_buffer buffer_updated)* eof_received? connection_lost``, and between
    them what :class:`Protocol` names.
    """

    __slots__ = ()

    def connection_made(self, transport: asyncio.Transport, ptoken: PToken) -> None:
        """Called once, before any data. ``ptoken`` says what protects the connection."""

    def get_buffer(self, sizehint: int) -> Buffer:
        """Return the buffer to read into; it must not be empty. ``sizehint`` -1 is any size."""
        raise NotImplementedError

    def buffer_updated(self, nbytes: int) -> None:
        """Called when the first ``nbytes`` bytes of the buffer hold new data."""

    def eof_received(self) -> bool | None:
        """Called when the peer writes no more. A true answer keeps our side open."""


class DatagramProtocol(TokenProtocol, _Datagram):
    """A datagram protocol.

    ``connection_made (datagram_received | error_received | datagram_refused)* connection_lost``
    """

    __slots__ = ()

    def connection_made(self, transport: DatagramTransport, ptoken: PToken | None) -> None:
        """Called once, first. ``ptoken`` is None where the socket has no peer of its own.

        On a connected socket it says what protects traffic from that peer at this moment; each
        datagram still brings its own.
        """

    def datagram_received(self, data: bytes, addr: Any, ptoken: PToken) -> None:
        """Called with each datagram. ``ptoken`` says what protected this one.

        ``addr`` is the sender as the socket module writes it: ``(host, port)`` for IPv4,
        ``(host, port, flowinfo, scope_id)`` for IPv6.
        """

    def error_received(self, exc: OSError) -> None:
        """Called when a send or receive failed, as with ConnectionRefusedError; rarely fatal."""

    def datagram_refused(self, addr: Any, error: ProtectionError) -> None:
        """Called when a datagram did not meet the endpoint's ``require`` and was dropped.

        Rate-limited: not one call per datagram; ``transport.ipsec_stats`` counts them all.
        """


def check_protocol(protocol: object) -> None:
    """Raise TypeError for what a ``protocol_factory`` can only have returned by mistake.

    Whatever asyncio can work with passes: what counts is the methods, not the class.
    """
    if not hasattr(protocol, "connection_made"):
        raise TypeError(
            f"protocol_factory returned {protocol!r}, which is no protocol: "
            "it has no connection_made()"
        )
    if isinstance(protocol, type):
        method = inspect.getattr_static(protocol, "connection_made")
        if isinstance(method, FunctionType):
            raise TypeError(f"protocol_factory returned the class {protocol!r}, not an instance")


def check_stream_protocol(protocol: object) -> None:
    """As :func:`check_protocol`, for the protocol of a stream."""
    check_protocol(protocol)
    if isinstance(protocol, DatagramProtocol):
        raise TypeError(f"protocol_factory returned {protocol!r}, which is for datagrams")


def takes_token(protocol: object) -> bool:
    """Whether this protocol's callbacks get a token."""
    return isinstance(protocol, TokenProtocol)
