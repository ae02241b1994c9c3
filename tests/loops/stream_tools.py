"""Stream protocols that write down what they are told, and backends that play along."""

from __future__ import annotations

import asyncio
import contextvars
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvloop
from notes import Log

import ipsec_aio
from ipsec_aio.backends.contract import Registration
from ipsec_aio.backends.memory import MemoryBackend
from ipsec_aio.tokens import PToken

HOST = "127.0.0.1"
CERTIFICATE = Path(__file__).parent / "data" / "localhost.pem"


def on_uvloop() -> bool:
    return isinstance(asyncio.get_running_loop(), uvloop.Loop)


def server_tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    return context


def client_tls() -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(CERTIFICATE))
    context.check_hostname = False
    return context


class _Noting:
    transport: Any = None
    keep_open = False

    def __init__(self, log: Log | None = None) -> None:
        self.log = log or Log()

    def data_received(self, data: bytes) -> None:
        self.log.note("data", data, ipsec_aio.current_ptoken())

    def eof_received(self) -> bool:
        self.log.note("eof")
        return self.keep_open

    def pause_writing(self) -> None:
        self.log.note("pause")

    def resume_writing(self) -> None:
        self.log.note("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.log.note("lost", exc)


class Plain(_Noting, asyncio.Protocol):
    """Knows nothing of tokens."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.log.note("made", ipsec_aio.current_ptoken())


class Tokened(_Noting, ipsec_aio.Protocol):
    """Gets tokens."""

    def connection_made(self, transport: Any, ptoken: PToken) -> None:
        self.transport = transport
        self.log.note("made", ptoken, ipsec_aio.current_ptoken())


class Buffered(ipsec_aio.BufferedProtocol):
    """Gets tokens and brings its buffer."""

    transport: Any = None

    def __init__(self, log: Log | None = None) -> None:
        self.log = log or Log()
        self.buffer = bytearray(64)

    def connection_made(self, transport: Any, ptoken: PToken) -> None:
        self.transport = transport
        self.log.note("made", ptoken, ipsec_aio.current_ptoken())

    def get_buffer(self, sizehint: int) -> bytearray:
        self.log.note("buffer", ipsec_aio.current_ptoken())
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.log.note("data", bytes(self.buffer[:nbytes]), ipsec_aio.current_ptoken())

    def connection_lost(self, exc: Exception | None) -> None:
        self.log.note("lost", exc)


class RecordedRegistration(Registration):
    """A registration that tells when it was closed, and whose properties can be set."""

    def __init__(self, inner: Registration, port: int) -> None:
        self.inner = inner
        self.port = port
        self.closed = asyncio.Event()
        self.fragments = False
        self.marks = False

    @property
    def generation(self) -> int:
        return self.inner.generation

    @property
    def reads_marks(self) -> bool:
        return self.marks

    @property
    def keeps_fragments(self) -> bool:
        return self.fragments

    def close(self) -> None:
        self.inner.close()
        self.closed.set()


class RecordingBackend(MemoryBackend):
    """The memory backend, with registrations to look at."""

    cookie: int | None = None
    on_register: Callable[[int], None] = staticmethod(lambda port: None)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.registrations: list[RecordedRegistration] = []
        self.evidence: list[Any] = []

    @property
    def netns_cookie(self) -> int | None:
        return self.cookie

    async def register(self, protocol: int, port: int) -> Registration:
        self.on_register(port)
        inner = await super().register(protocol, port)
        self.registrations.append(RecordedRegistration(inner, port))
        return self.registrations[-1]

    def resolve(self, evidence: Any) -> PToken:
        self.evidence.append(evidence)
        return super().resolve(evidence)


def protecting(*peers: str, **options: Any) -> RecordingBackend:
    """A backend with an SA from each of these addresses to ours, each of its own reqid."""
    backend = RecordingBackend(**options)
    for reqid, peer in enumerate(peers or (HOST,), 1):
        backend.add_sa(src=peer, dst=HOST, reqid=reqid)
    return backend


def port_of(server: Any) -> int:
    port: int = server.sockets[0].getsockname()[1]
    return port


@asynccontextmanager
async def serving(
    factory: Callable[[], Any], backend: Any, host: str = HOST, **options: Any
) -> AsyncIterator[Any]:
    server = await ipsec_aio.create_server(factory, host, 0, backend=backend, **options)
    try:
        yield server
    finally:
        server.close()


@asynccontextmanager
async def connected(
    port: int, factory: Callable[[], Any] = Plain, source: str = HOST, **options: Any
) -> AsyncIterator[Any]:
    """A plain client of the loop's own, closed at the end."""
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_connection(
        factory, HOST, port, local_addr=(source, 0), **options
    )
    try:
        yield protocol
    finally:
        transport.abort()
        await protocol.log.until("lost")


marker: contextvars.ContextVar[str] = contextvars.ContextVar("marker", default="none")
