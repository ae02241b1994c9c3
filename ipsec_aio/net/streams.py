"""``create_server``, ``create_connection``, ``start_tls``: the loop's, with tokens.

Rules:

* Arguments and errors are those of the loop's methods; what is not named here is passed on.
* The loop makes the connection. A protocol of ours takes ``connection_made``, judges the
  connection, and hands over to the user's by ``set_protocol``. From then on the loop calls the
  user's protocol itself (:mod:`.forward` says where it cannot).
* What does not meet ``require`` is reset before the user's protocol hears of it.
* The port is covered by the stamp before the server listens (:mod:`.listening`).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Coroutine, Generator, Iterable
from contextvars import Context, copy_context
from functools import partial
from types import coroutine
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack, cast

from ipsec_aio.backends import resolve_backend
from ipsec_aio.enums import Assurance
from ipsec_aio.evidence import IPPROTO_TCP

from .connection import Connection, Judge
from .context import current
from .forward import Bond, bond_of, dress, enter, undress
from .listening import Listener
from .protocols import TokenProtocol, takes_token
from .refusals import Refusals
from .server import Server
from .stats import Counters

if TYPE_CHECKING:
    from ssl import SSLContext

    from ipsec_aio.backends.contract import Backend
    from ipsec_aio.errors import ProtectionError
    from ipsec_aio.require import Require

    AnyProtocol = asyncio.BaseProtocol | TokenProtocol
    P = TypeVar("P", bound=AnyProtocol)
    T = TypeVar("T")

__all__ = ["ConnectOptions", "ServeOptions", "create_connection", "create_server", "start_tls"]

_IP_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_RESET = struct.pack("ii", 1, 0)


class ServeOptions(TypedDict, total=False):
    """What ``loop.create_server`` takes besides; some of it only on newer Pythons, or asyncio."""

    family: int
    flags: int
    sock: socket.socket | None
    backlog: int
    ssl: SSLContext | bool | None
    reuse_address: bool | None
    reuse_port: bool | None
    keep_alive: bool | None
    ssl_handshake_timeout: float | None
    ssl_shutdown_timeout: float | None


class ConnectOptions(TypedDict, total=False):
    """What ``loop.create_connection`` takes besides."""

    ssl: SSLContext | bool | None
    family: int
    proto: int
    flags: int
    sock: socket.socket | None
    local_addr: tuple[str, int] | None
    server_hostname: str | None
    ssl_handshake_timeout: float | None
    ssl_shutdown_timeout: float | None
    happy_eyeballs_delay: float | None
    interleave: int | None
    all_errors: bool


async def create_server(
    protocol_factory: Callable[[], AnyProtocol],
    host: str | Iterable[str] | None = None,
    port: int | str | None = None,
    *,
    start_serving: bool = True,
    backend: Backend | None = None,
    require: Require | None = None,
    latch: object = None,
    **options: Unpack[ServeOptions],
) -> Server:
    """Serve TCP connections on the running loop, as ``loop.create_server`` does.

    Instances of :class:`Protocol` and :class:`BufferedProtocol` get
    ``connection_made(transport, ptoken)``; others get asyncio's plain call. For all of them
    ``transport.get_extra_info("ptoken")`` is the PToken of the moment. Connections that do not
    meet ``require`` are reset, and counted in ``server.ipsec_stats``. ``backend`` None takes the
    process default.

    Raises what the loop's method raises; NotImplementedError for ``latch``; BackendError where
    there is no backend, where it is closed, or where it cannot cover the port as it was asked to.
    """
    _refuse_latch(latch)
    loop = asyncio.get_running_loop()
    backend = await resolve_backend(backend)
    listeners: dict[int, Listener] = {}
    judge = Judge.of(loop, backend)
    accepting = _Accepting(loop, judge, listeners, protocol_factory, require)
    made = await cast("Any", loop.create_server)(
        accepting, host, port, start_serving=False, **options
    )
    server = Server(made, listeners, accepting.counters)
    accepting.name = repr(server)
    try:
        await _cover(loop, judge, listeners, server.sockets)
        if start_serving:
            await server.start_serving()
    except BaseException:
        server.close()
        raise
    return server


async def create_connection(
    protocol_factory: Callable[[], P],
    host: str | None = None,
    port: int | str | None = None,
    *,
    backend: Backend | None = None,
    require: Require | None = None,
    latch: object = None,
    **options: Unpack[ConnectOptions],
) -> tuple[asyncio.Transport, P]:
    """Connect to a TCP server on the running loop, as ``loop.create_connection`` does.

    Protocols are called as under :func:`create_server`. The token is inferred from policies:
    nothing that comes with an outgoing connection names its SA.

    Raises what the loop's method raises; ProtectionError where the connection does not meet
    ``require``, after resetting it; NotImplementedError for ``latch``; BackendError where there is
    no backend, or where it is closed.
    """
    _refuse_latch(latch)
    loop = asyncio.get_running_loop()
    judge = Judge.of(loop, await resolve_backend(backend))
    connection = Connection(judge, None)
    handovers: list[_Handover] = []

    def factory() -> _Handover:
        handovers.append(_Handover(protocol_factory(), connection, require))
        return handovers[-1]

    context = copy_context()
    context.run(current.set, connection)
    raw, _ = await _within(
        context, cast("Any", loop.create_connection)(factory, host, port, **options)
    )
    handover = handovers[-1]
    if handover.error is not None:
        raise handover.error
    return handover.transport or raw, cast("P", handover.protocol)


async def start_tls(
    transport: asyncio.BaseTransport,
    protocol: AnyProtocol,
    sslcontext: SSLContext,
    **options: Any,
) -> asyncio.Transport | None:
    """Upgrade a connection to TLS, as ``loop.start_tls`` does; its token goes with it.

    ``options`` are the loop method's: ``server_side``, ``server_hostname``,
    ``ssl_handshake_timeout``, ``ssl_shutdown_timeout``. Use this and not the loop's method:
    uvloop's takes no transport that stands in front of its own.
    """
    loop = asyncio.get_running_loop()
    bond = bond_of(transport)
    if bond is None:
        plain = cast("asyncio.BaseProtocol", protocol)
        return await loop.start_tls(cast("Any", transport), plain, sslcontext, **options)
    entering = enter(cast("asyncio.BaseProtocol", protocol), bond)
    made = await loop.start_tls(cast("Any", undress(transport)), entering, sslcontext, **options)
    return None if made is None else dress(made, bond)


class _Handover(asyncio.Protocol):
    """Takes ``connection_made`` in the place of the user's protocol, then gets out of the way."""

    def __init__(
        self,
        protocol: AnyProtocol,
        connection: Connection,
        require: Require | None,
        accepting: _Accepting | None = None,
    ) -> None:
        self.protocol = protocol
        self.transport: asyncio.Transport | None = None
        self.error: ProtectionError | None = None
        self._connection = connection
        self._require = require
        self._accepting = accepting

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        raw = cast("asyncio.Transport", transport)
        accepting = self._accepting
        token = self._connection.made(raw)
        self.error = None if self._require is None else self._require.check(token)
        if accepting is not None:
            accepting.count(token.protected, token.assurance, raw, self.error)
        if self.error is not None:
            _reset(raw)
            return
        context = copy_context()
        shared = accepting is not None and accepting.shares_context
        if shared:
            context.run(current.set, self._connection)
        bond = Bond(self._connection, context, shared)
        self.transport = dress(raw, bond)
        protocol: Any = self.protocol
        # Installed first: a protocol may put another in its place from connection_made.
        raw.set_protocol(enter(protocol, bond))
        call = context.run if shared else _call
        if takes_token(protocol):
            call(protocol.connection_made, self.transport, token)
        else:
            call(protocol.connection_made, self.transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.error is None:
            cast("asyncio.BaseProtocol", self.protocol).connection_lost(exc)


class _Accepting:
    """The protocol factory of a server, and what its connections share."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        judge: Judge,
        listeners: dict[int, Listener],
        factory: Callable[[], AnyProtocol],
        require: Require | None,
    ) -> None:
        self._loop = loop
        self._judge = judge
        self._listeners = listeners
        self._factory = factory
        self._require = require
        self.counters = Counters()
        self._refusals = Refusals(self.counters)
        self.name = ""
        # asyncio accepts each connection in a task of its own.
        self.shares_context = not isinstance(loop, asyncio.BaseEventLoop)

    def __call__(self) -> _Handover:
        connection = Connection(self._judge, self._listeners)
        if not self.shares_context:
            current.set(connection)
        return _Handover(self._factory(), connection, self._require, self)

    def __repr__(self) -> str:
        return self.name

    def count(
        self,
        protected: bool,
        assurance: Assurance,
        transport: asyncio.BaseTransport,
        error: ProtectionError | None,
    ) -> None:
        """Count a connection, and its refusal."""
        self.counters.received += 1
        self.counters.protected += protected
        self.counters.unknown += assurance is Assurance.UNKNOWN
        if error is not None:
            peer = transport.get_extra_info("peername")
            self._refusals.add(self, peer, error, self._loop.time())


async def _cover(
    loop: asyncio.AbstractEventLoop,
    judge: Judge,
    listeners: dict[int, Listener],
    sockets: Iterable[socket.socket],
) -> None:
    """Have the stamp cover the ports of a server that does not listen yet."""
    ports: dict[int, list[socket.socket]] = {}
    for sock in sockets:
        if sock.family in _IP_FAMILIES:
            ports.setdefault(sock.getsockname()[1], []).append(sock)
    for port, bound in ports.items():
        registration = await judge.backend.register(IPPROTO_TCP, port)
        listener = Listener(loop, judge.backend, registration, bound)
        listeners[port] = listener
        judge.listeners.add(listener)


def _reset(transport: asyncio.Transport) -> None:
    sock = transport.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    transport.abort()


def _call(callback: Callable[..., T], *args: Any) -> T:
    return callback(*args)


@coroutine
def _within(context: Context, inner: Coroutine[Any, None, T]) -> Generator[Any, None, T]:
    """Run each step of a coroutine in a context, still as part of the running task."""
    step: Callable[[], Any] = partial(inner.send, None)
    try:
        while True:
            try:
                waited = context.run(step)
            except StopIteration as stop:
                return cast("T", stop.value)
            try:
                yield waited
            except GeneratorExit:
                context.run(inner.close)
                raise
            except BaseException as error:
                step = partial(inner.throw, error)
            else:
                step = partial(inner.send, None)
    finally:
        # An error's traceback holds this frame: it must not hold the error.
        del step


def _refuse_latch(latch: object) -> None:
    if latch is not None:
        raise NotImplementedError("latch= is not in this release")
