"""Which connections are ours, by the kernel's own number of their socket.

SO_COOKIE is never reused while the machine runs, so a descriptor that was closed and given out
again cannot be taken for the connection before it. Only what lives is kept: an entry goes with
its connection.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING
from weakref import ref

from ipsec_aio.kernel.sockopts import socket_cookie

if TYPE_CHECKING:
    from .connection import Connection

__all__ = ["forget", "living", "recall", "remember"]

# Plain references, which their owners take out: one that does so itself costs five times as much.
_living: dict[int, ref[Connection]] = {}
_numbered: dict[int, ref[Connection]] = {}


def remember(cookie: int, connection: Connection) -> None:
    """Have :func:`recall` and :func:`living` find a connection, until it says :func:`forget`."""
    _living[id(connection)] = _numbered[cookie] = ref(connection)


def forget(cookie: int, connection: Connection) -> None:
    """A connection is going. Idempotent; in any thread."""
    _living.pop(id(connection), None)
    # Another may have taken its place, for a duplicate of the same socket.
    reference = _numbered.get(cookie)
    if reference is not None and reference() in (None, connection):
        _numbered.pop(cookie, None)


def living() -> list[Connection]:
    """Return all connections, of all loops."""
    found = (reference() for reference in list(_living.values()))
    return [connection for connection in found if connection is not None]


def recall(sock: socket.socket) -> Connection | None:
    """Return the connection of ours that this is the socket of, None for any other socket."""
    cookie = socket_cookie(sock)
    reference = None if cookie is None else _numbered.get(cookie)
    return None if reference is None else reference()
