"""``start_server`` and ``open_connection``: asyncio's streams, with tokens.

Readers, writers and their protocol are asyncio's own. The writer answers ``"ptoken"``, and its
``start_tls`` goes through ours.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Unpack, cast

from .streams import ConnectOptions, ServeOptions, create_connection, create_server, start_tls

if TYPE_CHECKING:
    from ssl import SSLContext

    from ipsec_aio.backends.contract import Backend
    from ipsec_aio.latch import Latch
    from ipsec_aio.require import Require

    from .server import Server

__all__ = ["StreamWriter", "open_connection", "start_server"]

_LIMIT = 65536


class StreamWriter(asyncio.StreamWriter):
    """asyncio's, whose :meth:`start_tls` works on every loop and keeps the token."""

    _loop: asyncio.AbstractEventLoop

    async def start_tls(self, sslcontext: SSLContext, **options: Any) -> None:
        """As :meth:`asyncio.StreamWriter.start_tls`."""
        loop = self._loop
        # asyncio's method asks the writer's loop; it is told to ask us.
        self._loop = cast("asyncio.AbstractEventLoop", _Upgrading(loop))
        try:
            await super().start_tls(sslcontext, **options)
        finally:
            self._loop = loop


class _Upgrading:
    """A loop whose ``start_tls`` is ours."""

    start_tls = staticmethod(start_tls)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)


async def start_server(
    client_connected_cb: Callable[
        [asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None
    ],
    host: str | Iterable[str] | None = None,
    port: int | str | None = None,
    *,
    limit: int = _LIMIT,
    start_serving: bool = True,
    backend: Backend | None = None,
    require: Require | None = None,
    enforce: str = "auto",
    deadline: float = 1.0,
    latch: Latch | bool | None = None,
    **options: Unpack[ServeOptions],
) -> Server:
    """Serve TCP connections with a callback or coroutine, as :func:`asyncio.start_server` does.

    ``writer.get_extra_info("ptoken")`` is the connection's PToken, and so is
    :func:`current_ptoken` in the callback's task. For the rest see :func:`create_server`.
    """
    loop = asyncio.get_running_loop()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Any:
        writer.__class__ = StreamWriter
        return client_connected_cb(reader, writer)

    def factory() -> asyncio.StreamReaderProtocol:
        reader = asyncio.StreamReader(limit=limit, loop=loop)
        return asyncio.StreamReaderProtocol(reader, connected, loop=loop)

    return await create_server(
        factory,
        host,
        port,
        start_serving=start_serving,
        backend=backend,
        require=require,
        enforce=enforce,
        deadline=deadline,
        latch=latch,
        **options,
    )


async def open_connection(
    host: str | None = None,
    port: int | str | None = None,
    *,
    limit: int = _LIMIT,
    backend: Backend | None = None,
    require: Require | None = None,
    enforce: str = "auto",
    deadline: float = 1.0,
    latch: Latch | bool | None = None,
    **options: Unpack[ConnectOptions],
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to a TCP server, as :func:`asyncio.open_connection` does.

    ``writer.get_extra_info("ptoken")`` is the connection's PToken. For the rest see
    :func:`create_connection`.
    """
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await create_connection(
        lambda: protocol,
        host,
        port,
        backend=backend,
        require=require,
        enforce=enforce,
        deadline=deadline,
        latch=latch,
        **options,
    )
    return reader, StreamWriter(transport, protocol, reader, loop)
