"""Which connections are ours, by the kernel's own number of their socket.

SO_COOKIE is never reused while the machine runs, so a descriptor that was closed and given out
again cannot be taken for the connection before it. A number is asked for only when somebody looks
for a connection by its socket. Only what lives is kept: an entry goes with its connection.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING
from weakref import ref

from ipsec_aio.kernel.sockopts import examine, socket_cookie

if TYPE_CHECKING:
    from .connection import Connection

__all__ = ["disown", "forget", "living", "recall", "remember"]

# Plain references, which their owners take out: one that does so itself costs five times as much.
_living: dict[int, ref[Connection]] = {}
# Those whose number nobody has asked for yet, and the others by it.
_new: dict[int, ref[Connection]] = {}
_numbered: dict[int, ref[Connection]] = {}


def remember(connection: Connection) -> None:
    """Have :func:`recall` and :func:`living` find a connection, until it says :func:`forget`."""
    key = id(connection)
    _living[key] = _new[key] = ref(connection)


def forget(connection: Connection) -> None:
    """A connection is going. Idempotent; in any thread."""
    _living.pop(id(connection), None)
    disown(connection)


def disown(connection: Connection) -> None:
    """A connection is over: nobody follows duplicates of its socket. Idempotent; in any thread."""
    _new.pop(id(connection), None)
    cookie = connection.cookie
    if cookie is not None:
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
    for key, reference in list(_new.items()):
        connection = reference()
        if connection is not None and _number(connection):
            _new.pop(key, None)
    cookie = socket_cookie(sock)
    found = None if cookie is None else _numbered.get(cookie)
    return None if found is None else found()


def _number(connection: Connection) -> bool:
    """Ask for a connection's number; False while its socket is not to be had."""
    transport = connection.transport
    sock = None if transport is None else transport.get_extra_info("socket")
    if sock is None:
        return False
    try:
        cookie = examine(sock, socket_cookie)
    except (OSError, ValueError):
        return False  # it is closed
    if cookie is None:
        return False
    connection.cookie = cookie
    _numbered[cookie] = ref(connection)
    return True
