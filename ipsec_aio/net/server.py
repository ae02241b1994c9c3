"""The server object: the loop's own, with a count of what it refused."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from .listening import Listener
from .stats import Counters, IPsecStats

if TYPE_CHECKING:
    from socket import socket

    from ipsec_aio.latch import ListenerLatch

__all__ = ["Server"]


class Server(asyncio.AbstractServer):
    """A server as the loop made it; what is not named here is looked up there."""

    def __init__(
        self,
        server: asyncio.AbstractServer,
        listeners: Mapping[int, Listener],
        counters: Counters,
        latch: ListenerLatch | None = None,
    ) -> None:
        self.latch = latch
        """What its connections' latches have in common; None where they are not latched."""
        self._server: Any = server
        self._listeners = listeners
        self._counters = counters

    @property
    def ipsec_stats(self) -> IPsecStats:
        """How many connections were accepted, and refused, and why: a snapshot."""
        return self._counters.snapshot()

    @property
    def enforcement(self) -> str:
        """``"kernel"`` where all its sockets refuse in the kernel what no template admits, else
        ``"user"``.
        """
        listeners = self._listeners.values()
        enforced = len(listeners) > 0 and all(listener.enforced for listener in listeners)
        return "kernel" if enforced else "user"

    @property
    def sockets(self) -> tuple[socket, ...]:
        """The listening sockets, as the loop shows them."""
        sockets: tuple[socket, ...] = self._server.sockets
        return sockets

    def close(self) -> None:
        """Stop listening. Connections stay."""
        self._forget()
        self._server.close()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop."""
        loop: asyncio.AbstractEventLoop = self._server.get_loop()
        return loop

    def is_serving(self) -> bool:
        """Whether it accepts connections."""
        return bool(self._server.is_serving())

    async def start_serving(self) -> None:
        """Accept connections, where ``start_serving=False`` has put that off."""
        self._about_to_listen()
        await self._server.start_serving()

    async def serve_forever(self) -> None:
        """Accept connections until cancelled, then close."""
        self._about_to_listen()
        try:
            await self._server.serve_forever()
        except asyncio.CancelledError:
            self._forget()
            raise

    async def wait_closed(self) -> None:
        """Wait as long as the loop's server does."""
        await self._server.wait_closed()

    if sys.version_info >= (3, 13):

        def close_clients(self) -> None:
            """Close all connections, as :meth:`asyncio.Server.close_clients`."""
            self._server.close_clients()

        def abort_clients(self) -> None:
            """Abort all connections, as :meth:`asyncio.Server.abort_clients`."""
            self._server.abort_clients()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()
        await self.wait_closed()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)

    def __repr__(self) -> str:
        return repr(self._server)

    def _about_to_listen(self) -> None:
        if not self.is_serving():
            for listener in self._listeners.values():
                listener.about_to_listen()

    def _forget(self) -> None:
        if self.latch is not None:
            self.latch.release()
        for listener in self._listeners.values():
            listener.close()
