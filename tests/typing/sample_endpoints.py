"""Calls as users write them, and the types that come out."""

from __future__ import annotations

import asyncio
import socket
from typing import assert_type

from sample_protocols import Buffered, Echo, Plain, PlainStream, Stream

import ipsec_aio
from ipsec_aio import PToken
from ipsec_aio.net.datagram import DatagramTransport


async def datagrams(require: ipsec_aio.Require) -> None:
    async with ipsec_aio.open_backend("xfrm", stamp="use", trust_policy=False) as backend:
        transport, protocol = await ipsec_aio.create_datagram_endpoint(
            Echo, local_addr=("0.0.0.0", 5000), backend=backend, require=require
        )
        assert_type(transport, DatagramTransport)
        assert_type(protocol, Echo)
        takes_asyncio(transport)
        transport.sendto(b"x", ("127.0.0.1", 1))
        print(transport.ipsec_stats.refused_by["encrypted"])
        transport.set_protocol(Plain())
        transport.set_protocol(Echo())
        transport, plain = await ipsec_aio.create_datagram_endpoint(
            lambda: Plain(), remote_addr=("::1", 5000), backend=backend
        )
        assert_type(plain, Plain)


def takes_asyncio(transport: asyncio.DatagramTransport) -> None:
    transport.close()


async def streams(backend: ipsec_aio.MemoryBackend) -> None:
    server = await ipsec_aio.create_server(Stream, "::", 80, backend=backend)
    server.close()
    _, stream = await ipsec_aio.create_connection(Stream, "::1", 80, backend=backend)
    assert_type(stream, Stream)
    _, plain = await ipsec_aio.create_connection(PlainStream, "::1", 80, backend=backend)
    assert_type(plain, PlainStream)
    _, buffered = await ipsec_aio.create_connection(Buffered, "::1", 80)
    assert_type(buffered, Buffered)


def tokens(sock: socket.socket, transport: asyncio.Transport) -> None:
    assert_type(ipsec_aio.get_ptoken(sock), PToken)
    assert_type(ipsec_aio.get_ptoken(sock.fileno()), PToken)
    assert_type(ipsec_aio.get_ptoken(transport), PToken)
    assert_type(ipsec_aio.current_ptoken(), PToken | None)
    ipsec_aio.set_default_backend(ipsec_aio.MemoryBackend())
    ipsec_aio.set_default_backend(None)
