"""start_server, open_connection and upgrades to TLS."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import ssl
from typing import Any

import pytest
from datagram_tools import until
from stream_tools import (
    HOST,
    Log,
    Plain,
    RecordingBackend,
    Tokened,
    client_tls,
    connected,
    port_of,
    protecting,
    server_tls,
    serving,
)

import ipsec_aio
from ipsec_aio import Assurance, ProtectionError, Require, current_ptoken
from ipsec_aio.net.connection import Connection
from ipsec_aio.net.readers import _Upgrading


async def test_streams_answer_for_the_token() -> None:
    backend = protecting()
    seen: list[Any] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append((writer.get_extra_info("ptoken"), current_ptoken()))
        writer.write(await reader.readline())
        writer.close()
        await writer.wait_closed()

    async with await ipsec_aio.start_server(handle, HOST, 0, backend=backend) as server:
        reader, writer = await ipsec_aio.open_connection(HOST, port_of(server), backend=backend)
        writer.write(b"hello\n")
        assert await reader.read() == b"hello\n"
        assert writer.get_extra_info("ptoken").assurance <= Assurance.POLICY
        writer.close()
        await writer.wait_closed()
    [(token, current)] = seen
    assert token is current
    assert token.assurance is Assurance.EXACT


async def test_streams_know_requirements_and_plain_callbacks() -> None:
    backend = protecting()
    called = asyncio.Event()

    def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        called.set()
        writer.close()

    async with await ipsec_aio.start_server(
        handle, HOST, 0, backend=backend, require=Require(integrity=True)
    ) as server:
        with pytest.raises(ProtectionError):
            await ipsec_aio.open_connection(
                HOST, port_of(server), backend=backend, require=Require(encrypted=True)
            )
        await called.wait()


async def test_a_writer_is_upgraded_on_both_sides() -> None:
    backend = protecting()
    seen: list[Any] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        before = writer.get_extra_info("ptoken")
        writer.write(b"go\n")
        await writer.start_tls(server_tls())
        seen.append((before, writer.get_extra_info("ptoken"), current_ptoken()))
        writer.write(await reader.readline())
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async with await ipsec_aio.start_server(handle, HOST, 0, backend=backend) as server:
        reader, writer = await ipsec_aio.open_connection(HOST, port_of(server), backend=backend)
        assert await reader.readline() == b"go\n"
        before = writer.get_extra_info("ptoken")
        await writer.start_tls(client_tls(), server_hostname="localhost")
        assert isinstance(writer.get_extra_info("ssl_object"), ssl.SSLObject | ssl.SSLSocket)
        assert writer.get_extra_info("ptoken") is before
        writer.write(b"secret\n")
        assert await reader.readline() == b"secret\n"
        await reader.read()
        writer.close()
        await writer.wait_closed()
    assert seen[0][0] is seen[0][1] is seen[0][2]
    assert seen[0][0].protected


async def test_who_reads_slowly_after_an_upgrade_gets_all() -> None:
    """More than all buffers hold: the loop's TLS stops reading for a while, and goes on."""
    backend = protecting()
    size = 16 << 20

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"go\n")
        await writer.start_tls(server_tls())
        writer.write(bytes(size))
        await writer.drain()
        # The peer of one that is slow to read may be slow itself.
        assert await reader.readexactly(size) == bytes(size)
        writer.close()

    async with (
        asyncio.timeout(60),
        await ipsec_aio.start_server(handle, HOST, 0, backend=backend) as server,
    ):
        reader, writer = await ipsec_aio.open_connection(HOST, port_of(server), backend=backend)
        await reader.readline()
        await writer.start_tls(client_tls(), server_hostname="localhost")
        got = 0
        while got < size:
            got += len(await reader.read(1 << 17))
            await asyncio.sleep(0)
        writer.write(bytes(size))
        await writer.drain()
        assert not await reader.read()
        writer.close()


async def test_start_tls_carries_the_token_and_its_replacement() -> None:
    backend = protecting()
    log = Log()

    class Upgrading(Tokened):
        def connection_made(self, transport: Any, ptoken: Any) -> None:
            super().connection_made(transport, ptoken)
            self.task = asyncio.get_running_loop().create_task(self.upgrade())

        async def upgrade(self) -> None:
            self.transport = await ipsec_aio.start_tls(
                self.transport, self, server_tls(), server_side=True
            )
            self.log.note("upgraded")

    server_side = Upgrading(log)
    loop = asyncio.get_running_loop()
    async with serving(lambda: server_side, backend) as server:
        raw, client = await loop.create_connection(Plain, HOST, port_of(server))
        # A transport that is not ours passes through.
        transport = await ipsec_aio.start_tls(raw, client, client_tls(), server_hostname="x")
        assert transport is not None
        assert transport.get_extra_info("ptoken") is None
        await log.until("upgraded")
        [(token, _)] = log.of("made")
        assert server_side.transport.get_extra_info("ptoken") is token
        transport.write(b"secret")
        assert await log.bytes(6) == b"secret"
        assert {seen for _, seen in log.of("data")} == {token}
        backend.lose_stamp()
        for _ in range(3):
            await asyncio.sleep(0)
        assert server_side.transport.get_extra_info("ptoken").assurance is Assurance.UNKNOWN
        transport.write(b"more")
        await log.bytes(10)
        assert log.of("data")[-1][1].assurance is Assurance.UNKNOWN
        server_side.transport.close()
        await log.until("lost")
        transport.close()
        await client.log.until("lost")


async def test_a_failed_upgrade_is_the_loops_own_error() -> None:
    backend = protecting()
    server_side: Any = Tokened()
    async with (
        serving(lambda: server_side, backend) as server,
        connected(port_of(server)) as client,
    ):
        await server_side.log.until("made")
        client.transport.write(b"this is no TLS at all\r\n\r\n")
        with pytest.raises(ssl.SSLError):
            await ipsec_aio.start_tls(
                server_side.transport, server_side, server_tls(), server_side=True
            )


async def test_a_writer_that_is_being_upgraded_still_has_its_loop() -> None:
    loop = asyncio.get_running_loop()
    assert _Upgrading(loop).is_closed() is False
    assert _Upgrading(loop).start_tls is ipsec_aio.start_tls


async def test_a_connection_that_is_lost_at_once_leaves_no_descriptor() -> None:
    # Where policies protect a connection the socket is ours: whoever closes it, it is once.
    backend = RecordingBackend(trust_policy=True)
    backend.add_policy(src=HOST, dst=HOST, direction="out", template="esp")

    class Quitter(Tokened):
        def connection_made(self, transport: Any, ptoken: Any) -> None:
            super().connection_made(transport, ptoken)
            transport.abort()

    async with serving(Plain, backend) as server:
        known = ~Require(encrypted=True) | Require(encrypted=True)
        for protocol, require in ((Quitter, known), (Tokened, Require(encrypted=True))):
            before = set(os.listdir("/proc/self/fd"))
            with contextlib.suppress(ProtectionError):
                await ipsec_aio.create_connection(
                    protocol, HOST, port_of(server), backend=backend, require=require
                )
            gc.collect()
            # The server's end may still be open.
            await until(lambda before=before: len(set(os.listdir("/proc/self/fd")) - before) <= 1)


def broken(*_: Any) -> Any:
    raise RuntimeError("no evidence can be read")


@pytest.mark.parametrize("failing", ["made", "latch"])
async def test_an_outgoing_connection_that_cannot_be_judged_is_given_up(
    monkeypatch: Any, failing: str
) -> None:
    backend = protecting()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda *_: None)
    monkeypatch.setattr(Connection, failing, broken)
    demand: Any = (
        {"latch": True} if failing == "latch" else {"require": ~Require(assurance="EXACT")}
    )
    async with await loop.create_server(asyncio.Protocol, HOST, 0) as server:
        with pytest.raises((ProtectionError, RuntimeError), match=r"be judged|no evidence"):
            async with asyncio.timeout(10):
                await ipsec_aio.create_connection(
                    Tokened, HOST, port_of(server), backend=backend, **demand
                )


@pytest.mark.parametrize("failing", ["made", "latch"])
async def test_an_accepted_connection_that_cannot_be_judged_is_reset(
    monkeypatch: Any, failing: str
) -> None:
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, told: reported.append(told))
    monkeypatch.setattr(Connection, failing, broken)
    async with serving(Tokened, protecting(), latch=failing == "latch") as server:
        reader, writer = await asyncio.open_connection(HOST, port_of(server))
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        with contextlib.suppress(ConnectionResetError):
            await writer.wait_closed()
    assert reported
