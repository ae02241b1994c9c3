"""An asyncio client of charon, strongSwan's IKE daemon. Useful by itself.

::

    async with ViciClient("unix:///run/charon.vici") as charon:
        print(await charon.request("version"))
        async for sa in charon.stream("list-sas"):
            print(sa)
        async with charon.events("ike-updown", "child-updown") as events:
            async for event in events:
                match event:
                    case ViciConnected():
                        ...  # list what there is: nothing that comes after it is missed
                    case ViciEvent(name, message):
                        ...
                    case ViciDisconnected(error):
                        ...  # whatever was known is stale until the next ViciConnected

Rules:

* VICI answers carry no number: one connection runs one command at a time, and one whose answer
  was not awaited is closed. Requests share a connection and queue; each streamed command and each
  event stream has its own.
* Requests and streamed commands fail at once when charon is away. Event streams wait for it to
  come back, with backoff, and say so.
* A client belongs to the loop that it was first used on.
* The socket gives full control of charon. It is not for the application whose traffic is
  protected, but for a small process that it trusts.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from contextvars import Context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn
from urllib.parse import urlsplit

from ipsec_aio.errors import (
    BackendDenied,
    BackendError,
    BackendOverrun,
    BackendUnavailable,
    CodecError,
)
from ipsec_aio.wire.vici import Message, Packet, PacketReader, PacketType, encode_packet

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from ipsec_aio.wire.vici import Encodable

__all__ = [
    "DEFAULT_ADDRESS",
    "STREAMED",
    "EventStream",
    "ViciClient",
    "ViciConnected",
    "ViciDisconnected",
    "ViciError",
    "ViciEvent",
    "parse_address",
]

DEFAULT_ADDRESS: Final = "unix:///var/run/charon.vici"
"""Where charon listens unless ``charon.plugins.vici.socket`` in strongswan.conf says otherwise."""

STREAMED: Final[Mapping[str, str]] = {
    "list-sas": "list-sa",
    "list-policies": "list-policy",
    "list-conns": "list-conn",
    "list-certs": "list-cert",
    "list-authorities": "list-authority",
    "initiate": "control-log",
    "terminate": "control-log",
}
"""Commands that stream their result, and the event that carries it."""

_CHUNK: Final = 64 * 1024


class ViciError(BackendError):
    """charon refused a command. ``answer`` is its whole answer, empty for an unknown command."""

    def __init__(self, command: str, reason: str, answer: Message | None = None) -> None:
        super().__init__(f"{command}: {reason}")
        self.command = command
        self.reason = reason
        self.answer: Message = answer or {}


@dataclass(frozen=True, slots=True)
class ViciConnected:
    """charon is there and all events are registered: list now, and miss nothing."""


@dataclass(frozen=True, slots=True)
class ViciDisconnected:
    """Events may be missing from here to the next :class:`ViciConnected`.

    ``error`` is BackendUnavailable or BackendDenied, or BackendOverrun where the events were not
    taken as fast as they came.
    """

    error: BackendError


@dataclass(frozen=True, slots=True)
class ViciEvent:
    """An event that charon raised, for example ``child-updown``."""

    name: str
    message: Message


class ViciClient:
    """A client of one charon.

    ``address`` is ``unix:///path``, a path, or ``tcp://host:port``. ``timeout`` is how many seconds
    connecting may take, and each answer. ``backoff`` is the first and the longest pause in seconds
    before an event stream tries to connect again; each is twice the one before it.

    Entering it (``async with``) or :meth:`open` asks charon for its version, so that what is wrong
    is told early; it may be used without.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout: float = 10.0,
        backoff: tuple[float, float] = (0.05, 5.0),
    ) -> None:
        self.address = address
        self.timeout = timeout
        self.backoff = backoff
        self._path, self._host, self._port = parse_address(address)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = asyncio.Lock()
        self._commands: _Connection | None = None
        self._connections: set[_Connection] = set()
        self._streams: set[EventStream] = set()
        self._closed = False

    def __repr__(self) -> str:
        return f"<ViciClient {self.address}{' closed' if self._closed else ''}>"

    async def open(self) -> Message:
        """Connect and return charon's version.

        ``daemon``, ``version``, ``sysname``, ``release`` and ``machine``.

        Raises BackendUnavailable where no charon answers, BackendDenied where the socket may not
        be opened.
        """
        version = await self.request("version")
        if "daemon" not in version or "version" not in version:
            raise BackendUnavailable(f"{self.address} speaks VICI but is not strongSwan")
        return version

    async def request(
        self,
        command: str,
        message: Encodable | None = None,
        *,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> Message:
        """Run a command and return its answer.

        ``message`` maps names to text, numbers, bools, bytes, lists of those, and mappings.
        ``timeout`` in seconds replaces the client's, for a command that takes long.

        Raises ViciError where charon does not know the command or answers ``success = no``,
        BackendUnavailable where it is away, ended the connection or did not answer in time (it may
        have run the command), BackendDenied where the socket may not be opened, CodecError for a
        message that cannot be encoded.
        """
        self._check()
        packet = encode_packet(PacketType.CMD_REQUEST, command, message)
        async with self._lock:
            connection = self._commands
            if connection is None or connection.ended:
                if connection is not None:
                    await self._release(connection)
                connection = self._commands = await self._connect()
            try:
                connection.send(packet)
                answer = await connection.receive(self.timeout if timeout is None else timeout)
            except BaseException:
                self._commands = None
                connection.abort()
                self._connections.discard(connection)
                raise
        return _answer(command, answer)

    async def stream(
        self,
        command: str,
        message: Encodable | None = None,
        *,
        event: str = "",
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> AsyncGenerator[Message, None]:
        """Run a command that streams its result, and iterate over the events that carry it.

        ``event`` is their name, for commands that are not in :data:`STREAMED`. It has a connection
        of its own, which is closed with the iterator: a loop left early should be under
        ``contextlib.aclosing``.

        Raises what :meth:`request` raises; ValueError without ``event`` for an unlisted command.
        """
        self._check()
        event = event or STREAMED.get(command, "")
        if not event:
            raise ValueError(f"{command} is not known to stream: name its event")
        packet = encode_packet(PacketType.CMD_REQUEST, command, message)
        connection = await self._connect()
        try:
            await connection.register(event)
            connection.send(packet)
            limit = self.timeout if timeout is None else timeout
            while True:
                received = await connection.receive(limit)
                if received.type is not PacketType.EVENT:
                    _answer(command, received)
                    return
                yield received.message
        finally:
            await self._release(connection)

    def events(self, *names: str, limit: int = 1024) -> EventStream:
        """Return a stream of the events with these names, for ``async for``.

        At most ``limit`` events wait to be taken; where there would be more, all are dropped and
        the stream starts anew with ViciDisconnected and ViciConnected.
        """
        self._check()
        if not names:
            raise ValueError("no events are named")
        stream = EventStream(self, names, limit)
        self._streams.add(stream)
        return stream

    async def aclose(self) -> None:
        """Close every connection and end every stream. Idempotent."""
        self._closed = True
        for stream in list(self._streams):
            await stream.aclose()
        for connection in list(self._connections):
            await self._release(connection)
        self._commands = None

    async def __aenter__(self) -> Self:
        try:
            await self.open()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def _check(self) -> None:
        if self._closed:
            raise BackendUnavailable(f"the client of {self.address} is closed")
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise BackendUnavailable(f"the client of {self.address} belongs to another loop")

    async def _connect(self) -> _Connection:
        try:
            async with asyncio.timeout(self.timeout):
                if self._path:
                    streams = await asyncio.open_unix_connection(self._path)
                else:
                    streams = await asyncio.open_connection(self._host, self._port)
        except PermissionError as error:
            raise BackendDenied(
                error.errno,
                f"no permission to open {self.address}: be root, or of the group that "
                "charon.group in strongswan.conf names",
            ) from error
        except TimeoutError as error:
            raise BackendUnavailable(
                errno.ETIMEDOUT, f"{self.address} did not accept in {self.timeout:g} s"
            ) from error
        except OSError as error:
            raise BackendUnavailable(
                error.errno,
                f"nothing listens at {self.address} ({error.strerror or error}): is charon "
                "running, with its vici plugin?",
            ) from error
        connection = _Connection(self.address, self.timeout, *streams)
        self._connections.add(connection)
        if self._closed:
            await self._release(connection)
            raise BackendUnavailable(f"the client of {self.address} is closed")
        return connection

    async def _release(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        await connection.aclose()


class EventStream:
    """Events as they come, for as long as the client lives: made by :meth:`ViciClient.events`.

    Iterating gives ViciConnected, then ViciEvents; where charon goes away, one ViciDisconnected,
    and ViciConnected when it is back. Where charon is away at the start, ViciDisconnected is first.

    Iteration raises ViciError where charon does not know one of the events, and stops when the
    stream is closed. The connection is kept by a task that starts with the first iteration, or with
    ``async with``.
    """

    def __init__(self, client: ViciClient, names: tuple[str, ...], limit: int) -> None:
        self._client = client
        self._names = names
        self._limit = limit
        self._queue: deque[ViciEvent | ViciConnected | ViciDisconnected] = deque()
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._connected = False
        self._serial = 0
        self._closed = False

    @property
    def connection(self) -> int:
        """The number of the connection on which all events are registered, 0 where there is none.

        It may be ahead of what was taken from the stream.
        """
        return self._serial if self._connected else 0

    def post(self, event: ViciEvent) -> None:
        """Put an event at the end of the stream, for who iterates."""
        if not self._closed:
            self._put(event)

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> ViciEvent | ViciConnected | ViciDisconnected:
        self._start()
        while not self._queue:
            if self._task is None or self._task.done():
                if self._task is not None and not self._task.cancelled():
                    await self._task
                raise StopAsyncIteration
            self._filled.clear()
            await self._filled.wait()
        item = self._queue.popleft()
        if not self._queue:
            self._emptied.set()
        return item

    async def aclose(self) -> None:
        """Close the connection; who iterates stops. Idempotent."""
        self._closed = True
        self._client._streams.discard(self)  # pyright: ignore[reportPrivateUsage]
        self._queue.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def __aenter__(self) -> Self:
        self._start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def _start(self) -> None:
        if self._task is None and not self._closed:
            self._task = asyncio.create_task(self._run(), context=Context())
            self._task.add_done_callback(lambda _: self._filled.set())

    def _put(self, item: ViciEvent | ViciConnected | ViciDisconnected) -> None:
        self._emptied.clear()
        self._queue.append(item)
        self._filled.set()

    async def _run(self) -> None:
        first, longest = self._client.backoff
        pause = first
        told = False
        while True:
            before = self._serial
            try:
                await self._listen()
            except ViciError:
                raise
            except BackendOverrun as error:
                self._queue.clear()
                self._put(ViciDisconnected(error))
                # To connect before that was taken would only lose more.
                await self._emptied.wait()
                told, pause = True, first
                continue
            except BackendError as error:
                if self._serial != before or not told:
                    self._put(ViciDisconnected(error))
                    told, pause = True, first
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    async def _listen(self) -> NoReturn:
        client = self._client
        connection = await client._connect()  # pyright: ignore[reportPrivateUsage]
        try:
            early: list[Packet] = []
            for name in self._names:
                early += await connection.register(name)
            self._connected = True
            self._serial += 1
            self._put(ViciConnected())
            for packet in early:
                self._put(ViciEvent(packet.name, packet.message))
            while True:
                packet = await connection.receive(None)
                if packet.type is not PacketType.EVENT:
                    raise BackendUnavailable(f"{client.address} answers what nobody asked")
                if len(self._queue) >= self._limit:
                    raise BackendOverrun(f"more than {self._limit} events were not taken")
                self._put(ViciEvent(packet.name, packet.message))
        finally:
            self._connected = False
            await client._release(connection)  # pyright: ignore[reportPrivateUsage]


class _Connection:
    """Packets over one socket."""

    def __init__(
        self,
        address: str,
        timeout: float,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._address = address
        self._timeout = timeout
        self._reader = reader
        self._writer = writer
        self._cutter = PacketReader()
        self._packets: deque[Packet] = deque()

    @property
    def ended(self) -> bool:
        """Whether charon closed it, as far as was seen."""
        return self._reader.at_eof() or self._reader.exception() is not None

    def send(self, packet: bytes) -> None:
        self._writer.write(packet)

    async def receive(self, limit: float | None) -> Packet:
        """Return the next packet, waiting ``limit`` seconds at most, or for ever."""
        try:
            async with asyncio.timeout(limit):
                while not self._packets:
                    data = await self._reader.read(_CHUNK)
                    if not data:
                        self._cutter.eof()
                        raise BackendUnavailable(f"{self._address} closed the connection")
                    self._packets.extend(self._cutter.feed(data))
        except TimeoutError as error:
            raise BackendUnavailable(
                errno.ETIMEDOUT, f"{self._address} did not answer in {limit:g} s"
            ) from error
        except CodecError as error:
            raise BackendUnavailable(f"{self._address} does not speak VICI: {error}") from error
        except BackendError:
            raise
        except OSError as error:
            raise BackendUnavailable(error.errno, f"{self._address}: {error.strerror}") from error
        return self._packets.popleft()

    async def register(self, event: str) -> list[Packet]:
        """Register for an event; return the events that came before the answer did."""
        early: list[Packet] = []
        self.send(encode_packet(PacketType.EVENT_REGISTER, event))
        while (packet := await self.receive(self._timeout)).type is PacketType.EVENT:
            early.append(packet)
        if packet.type is PacketType.EVENT_UNKNOWN:
            raise ViciError(event, "charon knows no such event")
        if packet.type is not PacketType.EVENT_CONFIRM:
            raise BackendUnavailable(f"{self._address} answers {packet.type.name} to a register")
        return early

    def abort(self) -> None:
        self._writer.transport.abort()

    async def aclose(self) -> None:
        self.abort()
        # Whatever ended it does not matter any more.
        await asyncio.gather(self._writer.wait_closed(), return_exceptions=True)


def _answer(command: str, packet: Packet) -> Message:
    if packet.type is PacketType.CMD_UNKNOWN:
        raise ViciError(command, "charon knows no such command")
    if packet.type is not PacketType.CMD_RESPONSE:
        raise BackendUnavailable(f"{packet.type.name} in answer to {command}")
    answer = packet.message
    if answer.get("success", b"yes") != b"yes":
        reason = answer.get("errmsg", b"")
        text = reason.decode(errors="replace") if isinstance(reason, bytes) else ""
        raise ViciError(command, text or "refused", answer)
    return answer


def parse_address(address: str) -> tuple[str, str, int]:
    """Return the path of a Unix socket, or host and port. Raises ValueError."""
    if "://" not in address:
        address = f"unix://{address}"
    parts = urlsplit(address)
    if parts.scheme == "unix" and parts.path and not parts.netloc:
        return parts.path, "", 0
    if parts.scheme == "tcp" and parts.hostname and parts.port:
        return "", parts.hostname, parts.port
    raise ValueError(f"not unix:///path, a path or tcp://host:port: {address}")
