"""Which token the running code works for.

Rules:

* A loop runs the callbacks of one transport in a context that is a copy of its own (a reader or
  writer handle's), so that what is set there reaches the tasks that a callback starts, and nobody
  else.
* Datagrams: the token itself is set in each ``datagram_received``. A task keeps the token of the
  datagram that started it. A single one's stays set in the reader's context until the next wake-up,
  whose first question, what is new, backends answer in a context of their own.
* Streams: a :class:`TokenCell` is set once, before ``connection_made``, in the context that the
  transport's callbacks copy. The connection replaces ``cell.ptoken`` when its token changes, at
  no cost per read; tasks see the connection's token of the moment.
* Where a loop shares one context among several transports (uvloop's servers), the cell is set
  around each callback instead: :meth:`TokenCell.run`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from ipsec_aio.tokens import PToken

__all__ = ["TokenCell", "current", "current_ptoken"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


class TokenCell:
    """The place of a connection's token: one object per connection, shared by its contexts."""

    __slots__ = ("__weakref__", "ptoken")

    def __init__(self, ptoken: PToken | None = None) -> None:
        self.ptoken = ptoken

    def run(self, callback: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call ``callback`` with this cell set in the running context, then set it back."""
        before = current.set(self)
        try:
            return callback(*args, **kwargs)
        finally:
            current.reset(before)


current: ContextVar[PToken | TokenCell | None] = ContextVar("ipsec_aio.current", default=None)
"""The token, or the cell that holds it, of the running context. For transports alone."""


def current_ptoken() -> PToken | None:
    """Return the token of the connection or datagram that the running code works for.

    Right in ``connection_made``, ``data_received``, ``buffer_updated``, ``datagram_received`` and
    in the tasks that they start, on every loop; None in ``connection_made`` of an unconnected
    datagram socket. In other callbacks ask the transport: asyncio calls those of one connection
    (``connection_lost``, ``pause_writing``) in the context of whoever closed it or wrote to it.
    """
    value = current.get()
    return value.ptoken if isinstance(value, TokenCell) else value
