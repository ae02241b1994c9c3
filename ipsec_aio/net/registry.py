"""Which connections are ours, by the kernel's own number of their socket.

SO_COOKIE (linux/asm-generic/socket.h, since 4.6) is never reused while the machine runs, so a
descriptor that was closed and given out again cannot be taken for the connection before it. Only
what lives is kept: an entry goes with its cell, which belongs to the connection.
"""

from __future__ import annotations

import socket
import struct
from typing import Protocol
from weakref import WeakValueDictionary

from .context import TokenCell

__all__ = ["HasSocketOptions", "forget", "recall", "remember", "socket_cookie"]

_SO_COOKIE = 57
_U64 = struct.Struct("=Q")

_cells: WeakValueDictionary[int, TokenCell] = WeakValueDictionary()


class HasSocketOptions(Protocol):
    """A socket, or what transports hand out in its place."""

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes:
        """As :meth:`socket.socket.getsockopt`."""
        ...


def socket_cookie(sock: HasSocketOptions) -> int:
    """Return SO_COOKIE; raises OSError where the socket is closed or the kernel too old."""
    cookie: int = _U64.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, _U64.size))[0]
    return cookie


def remember(sock: HasSocketOptions, cell: TokenCell) -> None:
    """Have :func:`recall` find this connection's cell, as long as the cell lives."""
    _cells[socket_cookie(sock)] = cell


def recall(sock: HasSocketOptions) -> TokenCell | None:
    """Return the cell of a connection of ours, None for any other socket."""
    return _cells.get(socket_cookie(sock))


def forget(sock: HasSocketOptions) -> None:
    """Drop a connection's entry before its cell goes."""
    _cells.pop(socket_cookie(sock), None)
