"""Replies that are pinned to the token of what they answer, on real IPsec."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from typing import Any

import pytest
from hosts import AH, CBC, GCM, NULL, PATIENCE, Host, Suite, protect, receive

import ipsec_aio
from ipsec_aio import ProtectionError, PToken

PORT = 5000


class Questions(ipsec_aio.DatagramProtocol):
    def __init__(self) -> None:
        self.asked: asyncio.Queue[tuple[Any, PToken]] = asyncio.Queue()

    def datagram_received(self, data, addr, ptoken):
        self.asked.put_nowait((addr, ptoken))

    async def next(self) -> tuple[Any, PToken]:
        async with asyncio.timeout(PATIENCE):
            return await self.asked.get()


@asynccontextmanager
async def answering(bound: str = "0.0.0.0", **options) -> AsyncIterator[tuple[Any, Questions]]:
    async with ipsec_aio.open_backend("xfrm", stamp="install") as backend:
        transport, protocol = await ipsec_aio.create_datagram_endpoint(
            Questions, local_addr=(bound, PORT), backend=backend, **options
        )
        with closing(transport):
            yield transport, protocol


async def silent(client: socket.socket, transport: Any, addr: Any) -> None:
    """What was sent before a plain datagram would have come before it."""
    transport.sendto(b"plain", addr)
    assert (await receive(client))[0] == b"plain"


@pytest.mark.parametrize(
    ("mode", "family", "bound", "suite"),
    [
        ("transport", 4, "0.0.0.0", GCM),
        ("transport", 6, "::", CBC),
        ("transport", 4, "0.0.0.0", NULL),
        ("tunnel", 4, "0.0.0.0", GCM),
        ("tunnel", 6, "::", GCM),
        ("tunnel", 4, "0.0.0.0", AH),
    ],
)
async def test_it_leaves_by_the_channels_sa(
    bob: Host, alice: Host, mode: str, family: int, bound: str, suite: Suite
):
    pair = protect(alice, bob, suite, mode=mode, family=family)
    async with answering(bound) as (transport, server):
        with alice.udp(4000, family, inner=mode == "tunnel") as client:
            client.sendto(b"?", (pair.address(bob), PORT))
            addr, ptoken = await server.next()
            transport.sendto(b"!", addr, ptoken=ptoken)
            data, source, _ = await receive(client)
            assert (data, source) == (b"!", pair.address(bob))
            assert pair.packets(alice) == 1
            pair.rekey()
            transport.sendto(b"!!", addr, ptoken=ptoken)
            assert (await receive(client))[0] == b"!!"


async def test_a_policy_that_is_gone_lets_nothing_out(bob: Host, alice: Host):
    pair = protect(alice, bob)
    alice.ip(*pair.policies("delete", alice)[:1])  # she takes what is clear as well
    async with answering() as (transport, server):
        with alice.udp(4000) as client:
            client.sendto(b"?", (bob.v4, PORT))
            addr, ptoken = await server.next()
            bob.ip(*pair.policies("delete", bob)[1:])
            with pytest.raises(ProtectionError, match="no policy demands protection"):
                transport.sendto(b"!", addr, ptoken=ptoken)
            await silent(client, transport, addr)
            bob.ip(pair.policies("add", bob, level="use")[1])
            with pytest.raises(ProtectionError, match="does not demand protection"):
                transport.sendto(b"!", addr, ptoken=ptoken)
            bob.ip(
                pair.policies("delete", bob)[1],
                pair.policies("add", bob)[1],
            )
            transport.sendto(b"!", addr, ptoken=ptoken)
            assert (await receive(client))[0] == b"!"
            assert pair.packets(alice) == 1


async def test_another_sa_is_no_substitute(bob: Host, alice: Host):
    pair = protect(alice, bob)
    async with answering() as (transport, server):
        with alice.udp(4000) as client:
            client.sendto(b"?", (bob.v4, PORT))
            addr, ptoken = await server.next()
            bob.ip(pair.states("delete")[1])
            with pytest.raises(ProtectionError, match="no SA to send under"):
                transport.sendto(b"!", addr, ptoken=ptoken)
            pair.rekey(suite=NULL)
            with pytest.raises(ProtectionError, match="might be sent under"):
                transport.sendto(b"!", addr, ptoken=ptoken)


async def test_it_is_for_the_channels_peer_only(bob: Host, alice: Host, carol: Host):
    protect(alice, bob)
    protect(carol, bob, reqid=2)
    async with answering() as (transport, server):
        with alice.udp(4000) as client, carol.udp(4000) as other:
            client.sendto(b"?", (bob.v4, PORT))
            _, ptoken = await server.next()
            other.sendto(b"?", (bob.v4, PORT))
            addr, theirs = await server.next()
            with pytest.raises(ProtectionError, match="other addresses"):
                transport.sendto(b"!", addr, ptoken=ptoken)
            transport.sendto(b"!", addr, ptoken=theirs)
            assert (await receive(other))[0] == b"!"


async def test_the_kernel_pins_where_it_enforces(bob: Host, alice: Host):
    """Under the socket's own policy nothing leaves in the clear, whatever becomes of the SPD."""
    pair = protect(alice, bob)
    require = ipsec_aio.Require(encrypted=True)
    async with answering(bob.v4, require=require, enforce="kernel") as (transport, server):
        assert transport.get_extra_info("ipsec_pinning") == "kernel"
        with alice.udp(4000) as client:
            client.sendto(b"?", (bob.v4, PORT))
            addr, ptoken = await server.next()
            transport.sendto(b"!", addr, ptoken=ptoken)
            assert (await receive(client))[0] == b"!"
            assert pair.packets(alice) == 1
    async with answering(bob.v4, require=require, enforce="user") as (transport, _):
        assert transport.get_extra_info("ipsec_pinning") == "user"
