"""Which connections are ours, by the kernel's own number of their socket.

SO_COOKIE is never reused while the machine runs, so a descriptor that was closed and given out
again cannot be taken for the connection before it. Only what lives is kept: an entry goes with
its cell, which belongs to the connection.
"""

from __future__ import annotations

import socket
from weakref import ref

from ipsec_aio.kernel.sockopts import socket_cookie

from .context import TokenCell

__all__ = ["forget", "recall", "remember"]

# Plain references, which their owners take out: one that does so itself costs five times as much.
_cells: dict[int, ref[TokenCell]] = {}


def remember(cookie: int, cell: TokenCell) -> None:
    """Have :func:`recall` find the cell of the socket with this number.

    Whoever calls it calls :func:`forget` when the cell goes.
    """
    _cells[cookie] = ref(cell)


def forget(cookie: int) -> None:
    """Keep no place for a socket any more. Idempotent."""
    _cells.pop(cookie, None)


def recall(sock: socket.socket) -> TokenCell | None:
    """Return the cell of a connection of ours, None for any other socket."""
    cookie = socket_cookie(sock)
    cell = None if cookie is None else _cells.get(cookie)
    return None if cell is None else cell()
