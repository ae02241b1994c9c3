"""Which connections are ours, by the kernel's own number of their socket.

SO_COOKIE is never reused while the machine runs, so a descriptor that was closed and given out
again cannot be taken for the connection before it. Only what lives is kept: an entry goes with
its cell, which belongs to the connection.
"""

from __future__ import annotations

import socket
from weakref import WeakValueDictionary

from ipsec_aio.kernel.sockopts import socket_cookie

from .context import TokenCell

__all__ = ["recall", "remember"]

_cells: WeakValueDictionary[int, TokenCell] = WeakValueDictionary()


def remember(sock: socket.socket, cell: TokenCell) -> None:
    """Have :func:`recall` find this connection's cell, as long as the cell lives."""
    cookie = socket_cookie(sock)
    if cookie is not None:
        _cells[cookie] = cell


def recall(sock: socket.socket) -> TokenCell | None:
    """Return the cell of a connection of ours, None for any other socket."""
    cookie = socket_cookie(sock)
    return None if cookie is None else _cells.get(cookie)
