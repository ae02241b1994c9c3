"""``create_server``, ``create_connection``, ``start_tls``: the loop's, with tokens.

Rules:

* Arguments and errors are those of the loop's methods; what is not named here is passed on.
* The loop makes the connection. A protocol of ours takes ``connection_made``, judges the
  connection, and hands over to the user's by ``set_protocol``. From then on the loop calls the
  user's protocol itself (:mod:`.forward` says where it cannot).
* What does not meet ``require`` is reset before the user's protocol hears of it. Where only an
  identity or SA is still awaited, nothing is read until it is known, for ``deadline`` seconds at
  most; what the peer sends meanwhile stays in the kernel. (uvloop starts to read whatever
  ``connection_made`` says, so there the first piece is kept, and no more.)
* What was handed over and falls short of ``require`` later is reset, too (:mod:`.terms`).
* Where the kernel can enforce ``require``, it does from before listen or connect (:mod:`.enforce`).
* An outgoing connection that has to be protected is not begun where no policy would protect it.
* The port is covered by the stamp before the server listens (:mod:`.listening`).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Generator, Iterable
from contextvars import Context, copy_context
from functools import partial
from types import coroutine
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack, cast

from ipsec_aio.backends import resolve_backend
from ipsec_aio.enums import Assurance
from ipsec_aio.errors import IPsecError, ProtectionError
from ipsec_aio.evidence import IPPROTO_TCP, NEVER
from ipsec_aio.flow import pack_address
from ipsec_aio.kernel.sockopts import is_listening
from ipsec_aio.latch import Latch, ListenerLatch

from .connect import connect_protected
from .connection import Connection, Judge
from .context import current
from .enforce import KERNEL, USER, Where, check_options, enforcement_for
from .forward import (
    ForwardingTransport,
    connection_of,
    dress,
    enter,
    give_up,
    undress,
    user_of,
)
from .latching import reset
from .listening import Listener
from .protocols import TokenProtocol, check_stream_protocol, takes_token
from .refusals import Refusals
from .server import Server
from .stats import Counters
from .terms import Terms
from .tokens_of import get_ptoken

if TYPE_CHECKING:
    from ssl import SSLContext

    from ipsec_aio.backends.contract import Backend, Registration
    from ipsec_aio.require import Require
    from ipsec_aio.tokens import PToken

    from .enforce import Enforcement

    AnyProtocol = asyncio.BaseProtocol | TokenProtocol
    P = TypeVar("P", bound=AnyProtocol)
    T = TypeVar("T")

__all__ = [
    "HELD_LIMIT",
    "KEPT_LIMIT",
    "ConnectOptions",
    "ServeOptions",
    "create_connection",
    "create_server",
    "start_tls",
]

HELD_LIMIT = 1024
"""How many connections of a server may wait to be identified; further ones are reset."""
KEPT_LIMIT = 8 << 20
"""How many bytes of theirs a server keeps."""

_IP_FAMILIES = (socket.AF_INET, socket.AF_INET6)


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
    enforce: str = "auto",
    deadline: float = 1.0,
    latch: Latch | bool | None = None,
    **options: Unpack[ServeOptions],
) -> Server:
    """Serve TCP connections on the running loop, as ``loop.create_server`` does.

    Instances of :class:`Protocol` and :class:`BufferedProtocol` get
    ``connection_made(transport, ptoken)``; others get asyncio's plain call. For all of them
    ``transport.get_extra_info("ptoken")`` is the PToken of the moment. Connections that do not
    meet ``require`` are reset, and counted in ``server.ipsec_stats``; where only an identity is
    still awaited, that is after ``deadline`` seconds. So are those that meet it no longer: then
    ``connection_lost`` gets the ProtectionError (docs/requirements.md). ``backend`` None takes the
    process default.

    ``enforce="auto"`` has the kernel refuse what it can before Python sees it, where that is
    possible and safe, ``"kernel"`` fails where it is not, ``"user"`` never asks for it;
    ``server.enforcement`` says which it is (docs/enforcement.md).

    ``latch=True``, or a :class:`Latch`, holds each connection to the protection that it came with
    (docs/latching.md): one that has none is refused, one whose protection gets worse or changes
    hands is reset or paused. ``transport.get_extra_info("ipsec_latch")`` is its
    :class:`LatchStatus`.

    Raises what the loop's method raises; BackendError where there is no backend, where it is
    closed, or where it cannot cover the port as it was asked to; TypeError for what ``latch``
    cannot be; ValueError for what ``enforce`` or ``deadline`` cannot be, and under
    ``enforce="kernel"``, with the reason, where the kernel cannot enforce the requirement,
    BackendDenied without CAP_NET_ADMIN.
    """
    latching = Latch.of(latch)
    check_options(require, enforce, deadline)
    loop = asyncio.get_running_loop()
    backend = await resolve_backend(backend)
    listeners: dict[int, Listener] = {}
    judge = Judge.of(loop, backend)
    listener = None if latching is None else ListenerLatch(latching)
    accepting = _Accepting(
        loop,
        judge,
        listeners,
        protocol_factory,
        require,
        deadline,
        listener,
        options.get("ssl"),
    )
    made = await cast("Any", loop.create_server)(
        accepting, host, port, start_serving=False, **options
    )
    server = Server(made, listeners, accepting.counters, listener)
    accepting.name = repr(server)
    try:
        await _cover(loop, judge, listeners, server.sockets, require, enforce)
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
    enforce: str = "auto",
    deadline: float = 1.0,
    latch: Latch | bool | None = None,
    **options: Unpack[ConnectOptions],
) -> tuple[asyncio.Transport, P]:
    """Connect to a TCP server on the running loop, as ``loop.create_connection`` does.

    Protocols are called as under :func:`create_server`, and ``deadline`` is as there. Nothing
    that comes with an outgoing connection names its SA: the token is inferred from policies, or
    known by what the kernel enforces.

    Where ``require`` demands protection, nothing is sent to an address for which no policy
    protects what is sent. With ``enforce`` "auto" or "kernel" the socket gets policies of its own
    before it is connected, so that it cannot send or receive in clear even if the others go;
    ``transport.get_extra_info("ipsec_enforced")`` says whether it did. They need a socket that
    this call makes: not with ``sock``, ``happy_eyeballs_delay`` or ``interleave``. ``latch`` is as
    under :func:`create_server`.

    Raises what the loop's method raises; ProtectionError at once where no policy protects the
    connection, or nobody is there to negotiate an SA, and, after resetting it, where it does not
    meet ``require`` or cannot be latched; BackendError where there is no backend, or where it is
    closed; what :func:`create_server` raises for ``enforce``, ``deadline`` and ``latch``.
    """
    latching = Latch.of(latch)
    check_options(require, enforce, deadline)
    loop = asyncio.get_running_loop()
    backend = await resolve_backend(backend)
    judge = Judge.of(loop, backend)
    terms = Terms(loop, require, deadline, latching, judge.refusals)
    connection = Connection(judge, terms, None)
    handovers: list[_Connecting] = []

    def factory() -> _Connecting:
        handovers.append(_Connecting(connection, protocol_factory()))
        return handovers[-1]

    given: dict[str, Any] = {**options}
    if given.get("sock") is not None:
        connection.after = NEVER
    made: socket.socket | None = None
    if require is not None:
        made, connection.enforcement = await connect_protected(
            loop, backend, require, enforce, host, port, given
        )
        if made is not None:
            host = port = None
    context = copy_context()
    context.run(current.set, connection.cell)
    try:
        raw, _ = await _within(
            context, cast("Any", loop.create_connection)(factory, host, port, **given)
        )
    except BaseException:
        connection.close()
        if made is not None:
            if any(handover.begun for handover in handovers):
                _let_go(loop, made)
            else:
                made.close()
        raise
    if made is not None:
        _let_go(loop, made)
    handover = handovers[-1]
    try:
        # A loop whose transports are replaced, as tests do, may never call connection_made.
        if handover.begun:
            await handover.settled
        if handover.problem is not None:
            raise handover.problem
        judged = handover.transport is not None or handover.error is not None
        if not judged and (require is not None or latching is not None):
            raise ProtectionError("require", "the connection could not be judged")
    except BaseException:
        raw.abort()
        raise
    if handover.error is not None:
        if not handover.gone.done():
            reset(raw)
            await handover.gone
        raise handover.error
    return handover.transport or raw, cast("P", handover.protocol)


async def start_tls(
    transport: asyncio.BaseTransport,
    protocol: AnyProtocol,
    sslcontext: SSLContext,
    *,
    backend: Backend | None = None,
    require: Require | None = None,
    latch: Latch | bool | None = None,
    **options: Any,
) -> asyncio.Transport | None:
    """Upgrade a connection to TLS, as ``loop.start_tls`` does; its token goes with it.

    ``options`` are the loop method's: ``server_side``, ``server_hostname``,
    ``ssl_handshake_timeout``, ``ssl_shutdown_timeout``. Use this and not the loop's method:
    uvloop's takes no transport that stands in front of its own.

    ``require`` is demanded of the connection's token before anything is sent, and from then on
    beside what was demanded before; of a transport that is none of ours, ``backend`` says what its
    token is, once. A connection that does not meet it is reset: ProtectionError. Latches are made
    with their connections: ``latch`` True, or a Latch, raises ValueError where there is none.
    """
    check_options(require, USER, 0)
    loop = asyncio.get_running_loop()
    connection = connection_of(transport)
    if Latch.of(latch) is not None and (connection is None or connection.guard is None):
        raise ValueError("a connection is latched when it is made: see create_server(latch=)")
    if require is not None:
        token = get_ptoken(transport, backend=backend)
        error = require.check(token)
        if error is not None:
            reset(cast("asyncio.Transport", undress(transport)))
            raise error
        if connection is not None:
            connection.terms = connection.terms.demanding(require)
    if connection is None:
        plain = cast("asyncio.BaseProtocol", protocol)
        return await loop.start_tls(cast("Any", transport), plain, sslcontext, **options)
    entering = enter(cast("asyncio.BaseProtocol", protocol), connection)
    below = undress(transport)
    made = await loop.start_tls(cast("Any", below), entering, sslcontext, **options)
    if made is None:
        return None
    dressed = dress(made, connection)
    give_up(below)
    return dressed


class _Handover(asyncio.Protocol):
    """Takes ``connection_made`` in the place of the user's protocol, then gets out of the way.

    What it refuses of a server's it resets. ``accepting`` is what a server's share.
    """

    transport: asyncio.Transport | None = None
    error: ProtectionError | None = None
    begun = False
    _task: asyncio.Task[None] | None = None
    _waiting: asyncio.Transport | None = None
    _early: tuple[bytes, ...] = ()
    _ended = False

    def __init__(
        self,
        connection: Connection,
        protocol: AnyProtocol,
        accepting: _Accepting | None = None,
    ) -> None:
        self.protocol = protocol
        self._accepting = accepting
        self._connection = connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.begun = True
        raw = cast("asyncio.Transport", transport)
        try:
            check_stream_protocol(self.protocol)
            token = self._connection.made(raw)
            awaits = self._awaits(token) and self._has_room()
        except BaseException:
            self._fail(raw)
            raise
        if awaits:
            self._waiting = raw
            raw.pause_reading()
            loop = self._connection.terms.loop
            self._task = loop.create_task(self._wait(copy_context()))
        else:
            self._settle(raw, token)

    def data_received(self, data: bytes) -> None:
        raw, accepting = self._waiting, self._accepting
        if raw is None:
            return  # it was reset
        raw.pause_reading()
        self._early = (*self._early, data)
        if accepting is not None:
            accepting.kept += len(data)
            if accepting.kept > KEPT_LIMIT:
                self._settle(raw, self._token())

    def eof_received(self) -> bool:
        self._ended = True
        return self._waiting is not None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting is not None:
            self._wait_no_more()
            self._connection.close()
            self.error = ProtectionError("peer", "the connection was lost before it was identified")
            self._done()
        elif self.transport is not None:
            cast("asyncio.BaseProtocol", self.protocol).connection_lost(exc)

    def _token(self) -> PToken:
        token: Any = self._connection.ptoken
        return cast("PToken", token)

    def _awaits(self, token: PToken) -> bool:
        """Whether what the token waits for may yet meet the requirement, or be latched."""
        terms = self._connection.terms
        if (terms.require is None and terms.latch is None) or not token.pending:
            return False
        if terms.require is not None and (met := terms.require.decide(token)) is not True:
            return met is None
        return terms.latch is not None and token.assurance is Assurance.UNKNOWN

    def _has_room(self) -> bool:
        accepting = self._accepting
        return self._connection.terms.deadline > 0 and (accepting is None or accepting.holds_one())

    async def _wait(self, context: Context) -> None:
        terms = self._connection.terms
        try:
            async with asyncio.timeout(terms.deadline):
                while self._awaits(token := self._token()):
                    resolved = await token.resolved()
                    # It may have been replaced meanwhile, and that counts.
                    if self._token() is token:
                        self._connection.cell.ptoken = resolved
        except (TimeoutError, IPsecError):
            pass
        terms.loop.call_soon(self._settle_late, context=context)

    def _wait_no_more(self) -> None:
        """Give back the room that it has taken. Idempotent."""
        if self._waiting is None:
            return
        self._waiting = None
        assert self._task is not None  # noqa: S101
        self._task.cancel()
        accepting = self._accepting
        if accepting is not None:
            accepting.held -= 1
            accepting.kept -= sum(map(len, self._early))

    def _settle_late(self) -> None:
        # It may have been lost or refused since.
        if self._waiting is not None:
            self._settle(self._waiting, self._token())

    def _settle(self, raw: asyncio.Transport, token: PToken) -> None:
        """Refuse, or hand over."""
        self._wait_no_more()
        accepting, connection = self._accepting, self._connection
        require, latch = connection.terms.require, connection.terms.latch
        try:
            error = None if require is None else require.check(token)
            if error is None and latch is not None:
                error = connection.latch(raw, latch, None if accepting is None else accepting.latch)
        except BaseException:
            self._fail(raw)
            raise
        self.error = error
        if accepting is not None:
            accepting.count(connection, token)
        self._done()
        if error is not None:
            if accepting is not None:
                accepting.refuse(raw, error)
                reset(raw)
            return
        context = connection.context = copy_context()
        if connection.shared:
            context.run(current.set, connection.cell)
        self.transport = dress(raw, connection)
        protocol: Any = self.protocol
        # Installed first: a protocol may put another in its place from connection_made.
        raw.set_protocol(enter(protocol, connection))
        if self._task is not None:
            # What is read is delivered by the loop, so after connection_made.
            self.transport.resume_reading()
        arguments = (self.transport, token) if takes_token(protocol) else (self.transport,)
        if connection.shared:
            context.run(protocol.connection_made, *arguments)
        else:
            protocol.connection_made(*arguments)
        if self._early or self._ended:
            self._deliver_early(raw)
        if connection.guard is not None:
            connection.guard.begin()

    def _fail(self, raw: asyncio.Transport) -> None:
        """It could not be judged, which the loop reports: nobody waits, and nothing goes on."""
        self._done()
        if self._accepting is not None:
            reset(raw)

    def _deliver_early(self, raw: asyncio.Transport) -> None:
        connection = self._connection
        deliver = partial(_deliver, raw, connection, list(self._early), ended=self._ended)
        guard = connection.guard
        held = guard is not None and guard.held
        if held or raw.is_reading() or not isinstance(self.transport, ForwardingTransport):
            deliver()
        else:
            # The user's protocol has paused it.
            self.transport.on_resume = deliver
            connection.keeps = True

    def _done(self) -> None:
        """It was handed over or refused, or never will be."""


class _Connecting(_Handover):
    """That of an outgoing connection.

    ``problem`` is what is wrong with the user's protocol.
    ``settled`` is done when it was handed over, or refused with ``error``, and ``gone`` when the
    connection was lost. What is refused is reset by who made it, since uvloop does not own the
    socket that it was given before it has returned.
    """

    problem: TypeError | None = None

    def __init__(self, connection: Connection, protocol: AnyProtocol) -> None:
        super().__init__(connection, protocol)
        loop = connection.terms.loop
        self.settled: asyncio.Future[None] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        try:
            check_stream_protocol(self.protocol)
        except TypeError as error:
            self.begun, self.problem = True, error
            self._done()
        else:
            super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.gone.done():
            self.gone.set_result(None)
        super().connection_lost(exc)

    def _done(self) -> None:
        if not self.settled.done():
            self.settled.set_result(None)


class _Accepting:
    """The protocol factory of a server, and what its connections share."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        judge: Judge,
        listeners: dict[int, Listener],
        factory: Callable[[], AnyProtocol],
        require: Require | None,
        deadline: float,
        latch: ListenerLatch | None,
        tls: object,
    ) -> None:
        self._tls = tls
        self.latch = latch
        self.counters = Counters()
        self._refusals = Refusals(self.counters)
        options = None if latch is None else latch.options
        self._terms = Terms(loop, require, deadline, options, self._refusals, self)
        self._judge = judge
        self._listeners = listeners
        self._factory = factory
        self.held = self.kept = 0
        self.name = ""
        # asyncio accepts each connection in a task of its own.
        self._shares_context = not isinstance(loop, asyncio.BaseEventLoop)

    def __call__(self) -> _Handover:
        connection = Connection(
            self._judge, self._terms, self._listeners, shared=self._shares_context
        )
        if self._tls:
            connection.note_accept()
        if not connection.shared:
            current.set(connection.cell)
        return _Handover(connection, self._factory(), self)

    def __repr__(self) -> str:
        return self.name

    def holds_one(self) -> bool:
        """Make room for a connection that waits; False where there is none."""
        room = self.held < HELD_LIMIT
        self.held += room
        return room

    def count(self, connection: Connection, token: PToken) -> None:
        """Count a connection."""
        counters = self.counters
        counters.received += 1
        protected = connection.protected
        if protected is None:
            protected = token.protected
            counters.unknown += token.assurance is Assurance.UNKNOWN
        counters.protected += protected

    def refuse(self, transport: asyncio.BaseTransport, error: ProtectionError) -> None:
        """Count a refusal."""
        peer = transport.get_extra_info("peername")
        self._refusals.add(self, peer, error, self._terms.loop.time())


async def _cover(
    loop: asyncio.AbstractEventLoop,
    judge: Judge,
    listeners: dict[int, Listener],
    sockets: Iterable[socket.socket],
    require: Require | None,
    enforce: str,
) -> None:
    """Have the stamp cover the ports of a server that does not listen yet, and the kernel enforce
    its requirement.
    """
    ports: dict[int, list[socket.socket]] = {}
    for sock in sockets:
        if sock.family in _IP_FAMILIES:
            ports.setdefault(sock.getsockname()[1], []).append(sock)
        elif enforce == KERNEL:
            raise ValueError("the kernel enforces requirements on plain TCP and UDP sockets only")
    for port, bound in ports.items():
        registration = await judge.backend.register(IPPROTO_TCP, port)
        enforcements: list[tuple[int, bytes, Enforcement]] = []
        listener = Listener(loop, judge.backend, registration, bound, enforcements)
        listeners[port] = listener
        for sock in bound:
            enforcement = enforcement_for(
                loop,
                judge.backend,
                require,
                enforce,
                stamped=partial(_is_stamped, registration),
            )
            if enforcement is not None:
                local = pack_address(sock.getsockname()[0])
                enforcements.append((sock.family, local, enforcement))
                enforcement.begin(sock, Where(local, port), early=not is_listening(sock))


def _let_go(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    # uvloop's transport closes the descriptor itself, and where it has done so before it holds the
    # socket object, both would.
    if not isinstance(loop, asyncio.BaseEventLoop):
        sock.detach()


def _deliver(
    raw: asyncio.Transport, connection: Connection, pieces: list[bytes], *, ended: bool
) -> None:
    """Call the user's protocol of the moment as the loop would have, when its latch admits it."""
    guard = connection.guard
    while pieces or ended:
        protocol: Any = user_of(raw)
        if raw.is_closing() or protocol is None:
            return
        if guard is not None and not guard.admits():
            guard.keep("data_received", partial(_deliver, raw, connection, pieces, ended=ended))
            return
        if not pieces:
            end: Callable[[], object] = getattr(protocol, "eof_received", _nothing)
            if not connection.feed("eof_received", end) and not raw.is_closing():
                raw.close()
            return
        data = pieces.pop(0)
        if hasattr(protocol, "get_buffer") and not isinstance(protocol, asyncio.Protocol):
            size = connection.feed("get_buffer", _fill, protocol, data)
            if size is not None:
                connection.feed("buffer_updated", protocol.buffer_updated, size)
                pieces[:0] = filter(None, (data[size:],))
        else:
            connection.feed("data_received", protocol.data_received, data)


def _fill(protocol: Any, data: bytes) -> int:
    """Put data into a protocol's buffer; return how much found room."""
    buffer = memoryview(protocol.get_buffer(len(data))).cast("B")
    if not buffer:
        raise RuntimeError("get_buffer() returned an empty buffer")
    size = min(len(buffer), len(data))
    buffer[:size] = data[:size]
    return size


def _nothing() -> None: ...


def _is_stamped(registration: Registration) -> bool:
    return registration.generation > 0


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
