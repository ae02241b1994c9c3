"""Which token a connection gets, and who sees it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
from typing import Any, ClassVar

import pytest
from stream_tools import (
    HOST,
    Buffered,
    Log,
    Plain,
    Tokened,
    client_tls,
    connected,
    port_of,
    protecting,
    server_tls,
    serving,
)

import ipsec_aio
from ipsec_aio import Assurance, current_ptoken

SOURCES = [f"127.0.0.{n}" for n in range(10, 18)]


@pytest.fixture(params=["plain", "tls"])
def tls(request: Any) -> Any:
    """Options of server and client, without and with TLS."""
    if request.param == "plain":
        return {}, {}
    return {"ssl": server_tls()}, {"ssl": client_tls(), "server_hostname": "localhost"}


async def test_an_accepted_connection_has_its_token_everywhere(tls: Any) -> None:
    server_side = Tokened()
    async with (
        serving(lambda: server_side, protecting(), **tls[0]) as server,
        connected(port_of(server), **tls[1]) as client,
    ):
        [(token, current)] = await server_side.log.until("made")
        transport = server_side.transport
        assert isinstance(transport, asyncio.Transport)
        assert token.protected
        assert token.assurance is Assurance.EXACT
        assert token is current is transport.get_extra_info("ptoken")
        assert ipsec_aio.get_ptoken(transport) is token
        assert ipsec_aio.get_ptoken(transport.get_extra_info("socket")) is token
        client.transport.write(b"one")
        assert await server_side.log.bytes(3) == b"one"
        assert {seen for _, seen in server_side.log.of("data")} == {token}
        assert current_ptoken() is None


async def test_a_duplicate_of_a_closed_ones_socket_is_nobodys() -> None:
    """Nobody follows it any more."""
    backend = protecting()
    server_side = Plain()
    async with (
        serving(lambda: server_side, backend) as server,
        connected(port_of(server)),
    ):
        await server_side.log.until("made")
        with socket.socket(
            fileno=os.dup(server_side.transport.get_extra_info("socket").fileno())
        ) as duplicate:
            assert ipsec_aio.get_ptoken(duplicate, backend=backend).protected
            server_side.transport.close()
            await server_side.log.until("lost")
            backend.lose_stamp()
            await asyncio.sleep(0)
            assert not ipsec_aio.get_ptoken(duplicate, backend=backend).protected


async def test_a_clear_peer_is_known_to_be_clear() -> None:
    server_side = Tokened()
    async with (
        serving(lambda: server_side, protecting("127.0.0.9")) as server,
        connected(port_of(server)),
    ):
        [(token, _)] = await server_side.log.until("made")
        assert token.assurance is Assurance.NONE
        assert not token.protected


async def test_a_plain_protocol_gets_the_plain_call(tls: Any) -> None:
    server_side = Plain()
    async with (
        serving(lambda: server_side, protecting(), **tls[0]) as server,
        connected(port_of(server), **tls[1]),
    ):
        [(token,)] = await server_side.log.until("made")
        assert token is not None
        assert server_side.transport.get_extra_info("ptoken") is token
        assert server_side.transport.get_extra_info("nothing", "else") == "else"


async def test_a_buffered_protocol_reads_into_its_own_buffer(tls: Any) -> None:
    server_side = Buffered()
    async with (
        serving(lambda: server_side, protecting(), **tls[0]) as server,
        connected(port_of(server), **tls[1]) as client,
    ):
        [(token, _)] = await server_side.log.until("made")
        client.transport.write(b"some bytes")
        assert await server_side.log.bytes(10) == b"some bytes"
        assert {seen for (seen,) in server_side.log.of("buffer")} == {token}
        assert {seen for _, seen in server_side.log.of("data")} == {token}


async def test_tokens_of_interleaved_connections_never_mix(tls: Any) -> None:
    """In callbacks, in tasks and in timers, whatever another connection does meanwhile."""
    backend = protecting(*SOURCES)
    wrong: list[Any] = []
    seen = Log()

    class Watching(ipsec_aio.Protocol):
        peers: ClassVar[list[Any]] = []
        tasks: list[Any]

        def connection_made(self, transport: Any, ptoken: Any) -> None:
            self.transport, self.ptoken, self.tasks = transport, ptoken, []
            self.check("made")
            self.peers.append(self)

        def check(self, where: str) -> None:
            if current_ptoken() is not self.ptoken:
                wrong.append((where, self.ptoken, current_ptoken()))
            seen.note(where)

        def data_received(self, data: bytes) -> None:
            self.check("data")
            loop = asyncio.get_running_loop()
            self.tasks.append(loop.create_task(self.work()))
            loop.call_later(0.001, self.check, "timer")
            # What a proxy does: flow control of one connection in the callbacks of another.
            for other in self.peers:
                other.transport.pause_reading()
            for other in self.peers:
                other.transport.resume_reading()

        async def work(self) -> None:
            self.check("task")
            await asyncio.sleep(0.001)
            self.check("task later")

        def eof_received(self) -> None:
            self.check("eof")

    Watching.peers = []
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(Watching, backend, **tls[0]))
        clients = [
            await stack.enter_async_context(connected(port_of(server), source=source, **tls[1]))
            for source in SOURCES
        ]
        await seen.until("made", len(SOURCES))
        assert len({peer.ptoken for peer in Watching.peers}) == len(SOURCES)
        assert all(peer.ptoken.protected for peer in Watching.peers)
        for round_ in range(1, 6):
            for client in clients:
                client.transport.write(b"x" * 20)
            await seen.until("data", round_ * len(SOURCES))
        count = len(seen.of("data"))
        await seen.until("timer", count)
        await seen.until("task later", count)
    assert wrong == []


async def test_reading_resumed_from_outside_stays_in_the_connections_context(tls: Any) -> None:
    server_side = Tokened()
    async with (
        serving(lambda: server_side, protecting(), **tls[0]) as server,
        connected(port_of(server), **tls[1]) as client,
    ):
        [(token, _)] = await server_side.log.until("made")
        client.transport.write(b"one")
        await server_side.log.bytes(3)
        server_side.transport.pause_reading()
        client.transport.write(b"two")
        if tls[0]:
            # The TLS layer goes on reading, and hands it out on resumption.
            await _taken_in(server_side.transport.get_extra_info("socket"))
        server_side.transport.resume_reading()
        await server_side.log.bytes(6)
        client.transport.write(b"three")
        await server_side.log.bytes(11)
        assert {seen for _, seen in server_side.log.of("data")} == {token}


async def _taken_in(sock: Any) -> None:
    """Wait until something has arrived, and until the loop has taken it in."""
    async with asyncio.timeout(5):
        assert select.select([sock.fileno()], [], [], 5)[0]
        while select.select([sock.fileno()], [], [], 0)[0]:  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_an_outgoing_connection_is_inferred_from_policies() -> None:
    backend = protecting(trust_policy=True)
    backend.clock = lambda: 100.0
    backend.add_policy(dst=HOST)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Plain, HOST, 0)
    transport, protocol = await ipsec_aio.create_connection(
        Tokened, HOST, port_of(server), backend=backend
    )
    [(token, current)] = protocol.log.of("made")
    assert token is current is transport.get_extra_info("ptoken")
    assert token.assurance <= Assurance.POLICY
    assert current_ptoken() is None
    transport.abort()
    await protocol.log.until("lost")
    server.close()


async def test_the_context_of_a_connecting_caller_stays_its_own() -> None:
    backend = protecting()
    seen: list[Any] = []

    class Client(Tokened):
        def connection_made(self, transport: Any, ptoken: Any) -> None:
            super().connection_made(transport, ptoken)
            asyncio.get_running_loop().call_soon(lambda: seen.append(current_ptoken()))

    async with serving(Plain, backend) as server:
        transport, protocol = await ipsec_aio.create_connection(
            Client, HOST, port_of(server), backend=backend
        )
        task = asyncio.create_task(_current())
        assert await task is None
        assert current_ptoken() is None
        assert seen == [transport.get_extra_info("ptoken")]
        transport.abort()
        await protocol.log.until("lost")


async def _current() -> Any:
    return current_ptoken()


async def test_tokens_of_outgoing_connections_never_mix(tls: Any) -> None:
    backend = protecting()
    async with serving(_Echo, backend, **tls[0]) as server:
        port = port_of(server)
        made = await asyncio.gather(
            *(
                ipsec_aio.create_connection(
                    Tokened, HOST, port, backend=backend, local_addr=(source, 0), **tls[1]
                )
                for source in SOURCES
            )
        )
        tokens = {transport.get_extra_info("ptoken") for transport, _ in made}
        for transport, protocol in made:
            transport.write(b"x")
            await protocol.log.bytes(1)
            [(_, seen)] = protocol.log.of("data")
            assert seen is transport.get_extra_info("ptoken")
        assert len(tokens) == len(SOURCES) or tokens == {made[0][0].get_extra_info("ptoken")}
        for transport, protocol in made:
            transport.abort()
            await protocol.log.until("lost")


class _Echo(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)
