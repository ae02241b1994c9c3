"""Streams behave as the loop's own do: the same events, the same errors."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any

import pytest
from datagram_tools import until
from stream_tools import (
    HOST,
    Buffered,
    Log,
    Plain,
    Tokened,
    client_tls,
    connected,
    on_uvloop,
    port_of,
    protecting,
    server_tls,
    serving,
)

import ipsec_aio
from ipsec_aio import Require, evidence, mirror
from ipsec_aio.net import connection, listening
from ipsec_aio.net.forward import ForwardingTransport
from ipsec_aio.net.streams import create_server

TLS: dict[str, Any] = {"ssl": client_tls(), "server_hostname": "localhost"}
Scenario = Callable[[Any, Log], Any]


class Acting(asyncio.Protocol):
    """Does what a scenario wants, and writes down what it is told."""

    transport: Any

    def __init__(self, log: Log, **actions: Callable[[Any], Any]) -> None:
        self.log = log
        self.actions = actions

    def _act(self, kind: str, *event: Any) -> Any:
        self.log.note(kind, *event)
        action = self.actions.get(kind)
        return action(self) if action else None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._act("made", transport.is_closing(), transport.get_protocol() is self)

    def data_received(self, data: bytes) -> None:
        self._act("data", data)

    def eof_received(self) -> Any:
        return self._act("eof")

    def pause_writing(self) -> None:
        self._act("pause")

    def resume_writing(self) -> None:
        self._act("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self._act("lost", type(exc))


async def _events(ours: bool, tls: bool, actions: dict[str, Any], client: Any) -> Log:
    """Play one scenario on the loop's own server or on ours, and return its events."""
    loop = asyncio.get_running_loop()
    log = Log()
    loop.set_exception_handler(lambda loop, context: log.note("error", repr(context["exception"])))
    options: dict[str, Any] = {"ssl": server_tls()} if tls else {}

    def factory() -> Acting:
        log.note("factory")
        return Acting(log, **actions)

    server: Any
    if ours:
        server = await create_server(factory, HOST, 0, backend=protecting(), **options)
    else:
        server = await loop.create_server(factory, HOST, 0, **options)
    async with connected(port_of(server), **(TLS if tls else {})) as plain:
        await client(plain, log)
    await log.until("lost")
    server.close()
    return log


def _raise(_: Any) -> None:
    raise ZeroDivisionError("on purpose")


def _swap(protocol: Any) -> None:
    protocol.transport.set_protocol(Acting(protocol.log))
    protocol.log.note("swapped", protocol.transport.get_protocol() is protocol)


def _swap_buffered(protocol: Any) -> None:
    class Quiet(asyncio.BufferedProtocol):
        buffer = bytearray(4)

        def get_buffer(self, sizehint: int) -> bytearray:
            return self.buffer

        def buffer_updated(self, nbytes: int) -> None:
            protocol.log.note("buffered", bytes(self.buffer[:nbytes]))

        def connection_lost(self, exc: Exception | None) -> None:
            protocol.log.note("lost")

    protocol.transport.set_protocol(Quiet())


def _flood(protocol: Any) -> None:
    transport = protocol.transport
    transport.set_write_buffer_limits(high=1000, low=10)
    protocol.log.note("limits", transport.get_write_buffer_limits())
    transport.write(b"x" * 8_000_000)
    protocol.log.note("buffered", transport.get_write_buffer_size() > 1000)


async def _send(client: Any, log: Log) -> None:
    await log.until("made")
    client.transport.write(b"hello")
    await log.until("data")


async def _send_and_close(client: Any, log: Log) -> None:
    await _send(client, log)
    client.transport.close()
    await log.until("lost")


async def _half_close(client: Any, log: Log) -> None:
    await log.until("made")
    client.transport.write_eof()
    await log.until("eof")
    await client.log.bytes(3)
    await log.until("lost")


async def _wait_lost(client: Any, log: Log) -> None:
    await log.until("lost")
    await client.log.until("lost")


async def _read_all(client: Any, log: Log) -> None:
    await log.until("limits")
    await client.log.bytes(8_000_000)
    await log.until("resume")


async def _send_to_buffered(client: Any, log: Log) -> None:
    await log.until("made")
    client.transport.write(b"abcdef")
    await log.until("buffered", 2)
    client.transport.close()
    await log.until("lost")


async def _error(client: Any, log: Log) -> None:
    await log.until("made")
    client.transport.write(b"x")
    await log.until("error")


def _answer_and_keep_open(protocol: Any) -> bool:
    protocol.transport.write(b"bye")
    asyncio.get_running_loop().call_soon(protocol.transport.close)
    return True


SCENARIOS: dict[str, tuple[dict[str, Any], Any]] = {
    "data and close": ({}, _send_and_close),
    "half close": ({"eof": _answer_and_keep_open}, _half_close),
    "close at once": ({"made": lambda p: p.transport.close()}, _wait_lost),
    "abort at once": ({"made": lambda p: p.transport.abort()}, _wait_lost),
    "abort on data": ({"data": lambda p: p.transport.abort()}, _send_and_close),
    "flow control": ({"made": _flood}, _read_all),
    "flow control from a read": ({"data": _flood}, None),
    "swap at once": ({"made": _swap}, _send_and_close),
    "swap on data": ({"data": _swap}, _send_and_close),
    "swap to a buffered one": ({"made": _swap_buffered}, _send_to_buffered),
    "connection_made raises": ({"made": _raise}, _error),
    "data_received raises": ({"data": _raise}, _error),
}


TLS_TOO = (
    "data and close",
    "close at once",
    "abort at once",
    "abort on data",
    "swap at once",
    "swap on data",
    "swap to a buffered one",
    "data_received raises",
)


async def _flood_on_data(client: Any, log: Log) -> None:
    await _send(client, log)
    await _read_all(client, log)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("name", SCENARIOS)
async def test_the_same_events_as_the_loops_own(name: str, tls: bool) -> None:
    if tls and name not in TLS_TOO:
        pytest.skip("the loop's own TLS does not get through this one")
    if name == "connection_made raises" and on_uvloop():
        pytest.skip("uvloop leaves such a connection open, unread")
    actions, client = SCENARIOS[name]
    client = client or _flood_on_data
    stock = await _events(False, tls, actions, client)
    ours = await _events(True, tls, actions, client)
    assert ours.events == stock.events
    assert ours.of("made")


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"host": HOST, "port": 0, "sock": "tcp"},
        {"sock": "udp"},
        {"host": HOST, "port": 0, "ssl": True},
        {"host": HOST, "port": 0, "ssl_handshake_timeout": 1.0},
        {"host": HOST, "port": "in use"},
        {"host": "192.0.2.1", "port": 0},
        {"host": HOST, "port": 0, "unknown": 1},
    ],
    ids=str,
)
async def test_the_errors_of_the_loops_own_create_server(arguments: dict[str, Any]) -> None:
    with contextlib.ExitStack() as stack:
        udp = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        tcp = stack.enter_context(socket.socket())
        used = stack.enter_context(socket.create_server((HOST, 0)))
        kinds = {"tcp": tcp, "udp": udp, "in use": used.getsockname()[1]}
        given = {
            name: kinds.get(value, value) if isinstance(value, str) else value
            for name, value in arguments.items()
        }
        with pytest.raises(Exception) as stock:  # noqa: PT011
            await asyncio.get_running_loop().create_server(Plain, **given)
        with pytest.raises(type(stock.value)) as ours:
            await ipsec_aio.create_server(Plain, backend=protecting(), **given)
        assert str(ours.value) == str(stock.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"host": HOST, "port": "closed"},
        {"host": HOST, "port": 1, "sock": "tcp"},
        {"sock": "udp"},
        {"host": HOST, "port": 1, "server_hostname": "x"},
        {"host": HOST, "port": 1, "unknown": 1},
        {"host": HOST, "port": 1, "local_addr": ("192.0.2.1", 0)},
    ],
    ids=str,
)
async def test_the_errors_of_the_loops_own_create_connection(arguments: dict[str, Any]) -> None:
    with contextlib.ExitStack() as stack:
        udp = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        tcp = stack.enter_context(socket.socket())
        closed = stack.enter_context(socket.socket())
        closed.bind((HOST, 0))
        kinds = {"tcp": tcp, "udp": udp, "closed": closed.getsockname()[1]}
        given = {
            name: kinds.get(value, value) if isinstance(value, str) else value
            for name, value in arguments.items()
        }
        with pytest.raises(Exception) as stock:  # noqa: PT011
            await asyncio.get_running_loop().create_connection(Plain, **given)
        with pytest.raises(type(stock.value)) as ours:
            await ipsec_aio.create_connection(Plain, backend=protecting(), **given)
        assert str(ours.value) == str(stock.value)


async def test_connecting_can_be_cancelled() -> None:
    with socket.socket() as silent:
        silent.bind((HOST, 0))
        silent.listen(0)
        clients = []
        for _ in range(4):
            # A full accept queue leaves further handshakes hanging.
            client = socket.socket()
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.connect(silent.getsockname())
            clients.append(client)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await ipsec_aio.create_connection(
                    Plain, *silent.getsockname(), backend=protecting()
                )
        for client in clients:
            client.close()
    assert ipsec_aio.current_ptoken() is None


async def test_a_connection_attempt_that_is_dropped_closes_quietly() -> None:
    with socket.create_server((HOST, 0)) as listener:
        attempt = ipsec_aio.create_connection(Plain, *listener.getsockname(), backend=protecting())
        attempt.send(None)
        attempt.close()
    # The loop's own coroutine runs its clean-up in later iterations.
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_forwarding_transport_is_a_whole_one() -> None:
    server_side: Any = Tokened()
    async with (
        serving(lambda: server_side, protecting(), ssl=server_tls()) as server,
        connected(port_of(server), **TLS) as client,
    ):
        await server_side.log.until("made")
        log: Log = server_side.log
        transport: Any = server_side.transport
        assert isinstance(transport, asyncio.Transport)
        assert isinstance(transport, ForwardingTransport) == on_uvloop()
        if isinstance(transport, ForwardingTransport):
            assert repr(transport) == repr(transport.raw)
        assert transport.get_extra_info("cipher")
        assert transport.get_extra_info("ssl_object") is not None
        assert transport.get_protocol() is server_side
        assert transport.can_write_eof() is False
        assert not transport.is_closing()
        transport.set_write_buffer_limits(high=100, low=10)
        assert transport.get_write_buffer_limits() == (10, 100)
        assert transport.get_write_buffer_size() >= 0
        with pytest.raises(AttributeError):
            getattr(transport, "no_such_attribute")  # noqa: B009
        with pytest.raises((NotImplementedError, AttributeError, RuntimeError)):
            transport.write_eof()
        transport.pause_reading()
        assert not transport.is_reading()
        transport.resume_reading()
        assert transport.is_reading()
        transport.write(b"one")
        transport.writelines([b" ", b"two"])
        assert await client.log.bytes(7) == b"one two"
        transport.close()
        assert transport.is_closing()
        await log.until("lost")


@pytest.mark.parametrize("kind", [Tokened, Plain, Buffered])
async def test_write_eof_and_half_open_connections(kind: Any) -> None:
    server_side = kind()
    async with (
        serving(lambda: server_side, protecting()) as server,
        connected(port_of(server)) as client,
    ):
        client.keep_open = True
        await server_side.log.until("made")
        assert server_side.transport.can_write_eof()
        server_side.transport.write_eof()
        await client.log.until("eof")
        client.transport.write(b"still")
        assert await server_side.log.bytes(5) == b"still"
        client.transport.close()
        await server_side.log.until("lost")


class Nothing:
    """No protocol."""


@pytest.mark.parametrize(
    "factory", [Nothing, lambda: None, lambda: Plain, ipsec_aio.DatagramProtocol]
)
async def test_what_is_no_stream_protocol(factory: Any) -> None:
    backend = protecting()
    loop = asyncio.get_running_loop()
    reported: list[Any] = []
    loop.set_exception_handler(lambda _, context: reported.append(context.get("exception")))
    async with serving(Plain, backend) as server:
        with pytest.raises(TypeError, match="protocol_factory returned"):
            await ipsec_aio.create_connection(factory, HOST, port_of(server), backend=backend)
    assert not reported
    async with serving(factory, backend) as server, connected(port_of(server)) as client:
        await client.log.until("lost")
    assert isinstance(reported[0], TypeError)


async def test_an_upgrade_may_demand_more() -> None:
    backend = protecting()
    for require, met in ((Require(encrypted=True), True), (Require(mode="tunnel"), False)):
        accepted: asyncio.Queue[Any] = asyncio.Queue()

        class Upgraded(Plain):
            def connection_made(self, transport: Any, queue: Any = accepted) -> None:
                super().connection_made(transport)
                self.transport = transport
                queue.put_nowait(self)

        async with (
            serving(Upgraded, backend) as server,
            connected(port_of(server)) as client,
        ):
            mine = await accepted.get()
            with pytest.raises(ValueError, match="latched when it is made"):
                await ipsec_aio.start_tls(mine.transport, mine, server_tls(), latch=True)
            with pytest.raises(TypeError, match="Require"):
                await ipsec_aio.start_tls(
                    mine.transport,
                    mine,
                    server_tls(),
                    require=True,  # type: ignore[arg-type]
                )
            upgrade = ipsec_aio.start_tls(
                mine.transport, mine, server_tls(), server_side=True, require=require
            )
            if met:
                loop = asyncio.get_running_loop()
                theirs = loop.start_tls(
                    client.transport, client, client_tls(), server_hostname="localhost"
                )
                secure, other = await asyncio.gather(upgrade, theirs)
                assert secure is not None
                assert other is not None
                backend.flush_sas()
                secure.abort()
                other.abort()
            else:
                with pytest.raises(ipsec_aio.ProtectionError, match="mode"):
                    await upgrade
                await client.log.until("lost")


@pytest.mark.parametrize("late", ["", "stamp", "time"])
async def test_whose_tls_begins_late_is_in_doubt(late: str, monkeypatch: Any) -> None:
    """The peer decides when; meanwhile his SA's number may have become another's."""
    assert 2 * evidence.LATE <= mirror.TOMBSTONE_SECONDS
    monkeypatch.setattr(listening, "SETTLE", 0.0)
    if late == "time":
        monkeypatch.setattr(connection, "LATE", 0.0)
    backend = protecting()
    loop = asyncio.get_running_loop()
    server = Tokened()
    async with (
        serving(lambda: server, backend, ssl=server_tls()) as serving_,
        connected(port_of(serving_)) as client,
    ):
        judge = connection.Judge.of(loop, backend)
        await until(lambda: judge.accepted)
        if late == "stamp":
            backend.lose_stamp()
            backend.restore_stamp()
        made = await loop.start_tls(
            client.transport, client, client_tls(), server_hostname="localhost"
        )
        ((token, _),) = await server.log.until("made")
        assert token.protected == (not late)
        assert ("TLS handshake" in token.audit_string) == bool(late)
        assert made is not None
        made.abort()
