"""Replies that are pinned to the token of what they answer, on real IPsec."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
import test_identities as peers
from hosts import (
    AH,
    CBC,
    GCM,
    NULL,
    PATIENCE,
    Host,
    Suite,
    eventually,
    protect,
    receive,
    refused,
    sniffing,
)
from test_identities import ALICE, DORA, Lab, end, key

import ipsec_aio
from ipsec_aio import ProtectionError, PToken

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PORT = 5000
SILENCE = 0.5
"""Seconds in which nothing must come."""

daemons, lab = peers.daemons, peers.lab


class Questions(ipsec_aio.DatagramProtocol):
    def __init__(self) -> None:
        self.asked: asyncio.Queue[tuple[Any, PToken]] = asyncio.Queue()

    def datagram_received(self, data, addr, ptoken):
        self.asked.put_nowait((addr, ptoken))

    async def next(self) -> tuple[Any, PToken]:
        async with asyncio.timeout(PATIENCE):
            return await self.asked.get()


@asynccontextmanager
async def answering(
    bound: str = "0.0.0.0", *, vici: str | None = None, **options
) -> AsyncIterator[tuple[Any, Questions]]:
    spec = "xfrm" if vici is None else "xfrm+vici"
    async with ipsec_aio.open_backend(spec, vici=vici, stamp="install") as backend:
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


@pytest.mark.parametrize("choice", ["kernel", "user"])
async def test_what_is_not_pinned_leaves_in_the_clear_unless_the_kernel_enforces(
    bob: Host, alice: Host, choice: str
):
    """When the SPD is flushed; a reply that is pinned does not, either way."""
    pair = protect(alice, bob)
    require = ipsec_aio.Require(encrypted=True)
    async with answering(bob.v4, require=require, enforce=choice) as (transport, server):
        with alice.udp(4000) as client, sniffing(alice, 4000, socket.IPPROTO_UDP) as seen:
            client.sendto(b"?", (bob.v4, PORT))
            addr, ptoken = await server.next()
            bob.flush_policies()
            with pytest.raises(ProtectionError, match="no policy demands protection"):
                transport.sendto(b"pinned", addr, ptoken=ptoken)
            if choice == "user":
                await refused(alice, lambda: transport.sendto(b"bare", addr))
            else:
                # There is an SA for the socket's own policy.
                transport.sendto(b"bare", addr)
                assert (await receive(client))[0] == b"bare"
                assert pair.packets(alice) == 1
                # Now there is none.
                bob.flush_sas()
                transport.sendto(b"bare", addr)
                await eventually(lambda: transport.get_write_buffer_size() == 0)
                await asyncio.sleep(SILENCE)
                with pytest.raises(BlockingIOError):
                    client.recv(10)
    assert not [packet for packet in seen if b"pinned" in packet]
    assert bool([packet for packet in seen if b"bare" in packet]) is (choice == "user")


# A peer whom charon knows


def refusal(transport: Any, addr: Any, ptoken: PToken) -> str:
    """Send, and say why it was refused."""
    try:
        transport.sendto(b"!", addr, ptoken=ptoken)
    except ProtectionError as error:
        return error.reason
    return ""


async def test_a_known_peer_is_answered_whatever_ike_does(lab: Lab, bob: Host, alice: Host):
    async with answering(vici=lab.bob.uri) as (transport, server):
        await key(lab.alice)
        with alice.udp(4000) as client:
            client.sendto(b"?", (bob.v4, PORT))
            addr, ptoken = await server.next()
            ptoken = await ptoken.resolved(PATIENCE)
            assert str(ptoken.peer) == ALICE
            for words in (
                (),
                ("--child", "net"),
                ("--ike", "psk"),
                ("--ike", "psk", "--reauth"),
            ):
                first = ptoken.sas[-1].spi
                if words:
                    await asyncio.to_thread(lab.alice.swanctl, "--rekey", *words)
                if words and words != ("--ike", "psk"):
                    await eventually(lambda: first not in {each.spi for each in ptoken.sas})  # noqa: B023
                # While charon has not told of a new SA, nothing is sent by it.
                await eventually(lambda: not refusal(transport, addr, ptoken))
                assert (await receive(client))[0] == b"!"


async def test_another_peer_behind_her_address_is_not(lab: Lab, bob: Host, alice: Host):
    """Their SAs have the same addresses, selectors and reqid."""
    async with answering(vici=lab.bob.uri) as (transport, server):
        await key(lab.alice)
        with alice.udp(4000) as client:

            async def ask(who: str) -> tuple[Any, PToken]:
                client.sendto(b"?", (bob.v4, PORT))
                addr, ptoken = await server.next()
                ptoken = await ptoken.resolved(PATIENCE)
                assert str(ptoken.peer) == who
                return addr, ptoken

            addr, ptoken = await ask(ALICE)
            await key(lab.alice, "dora")
            await eventually(lambda: DORA in refusal(transport, addr, ptoken))
            # alice's host sends by the newest SA.
            addr, hers = await ask(DORA)
            assert ptoken.sa is not None
            assert hers.sa is not None
            assert ptoken.sa.reqid == hers.sa.reqid
            # charon's outbound policy names the SPI of the newest as well.
            transport.sendto(b"to dora", addr, ptoken=hers)
            assert (await receive(client))[0] == b"to dora"
            assert DORA in refusal(transport, addr, ptoken)
            await end(lab.alice, "dora")
            await eventually(lambda: not refusal(transport, addr, ptoken))
            assert (await receive(client))[0] == b"!"
            assert ALICE in refusal(transport, addr, hers)


def test_the_example_answers_a_known_peer(lab: Lab, bob: Host, alice: Host):
    words = ["--port", str(PORT), "--backend", "xfrm+vici", "--vici", lab.bob.uri]
    example = [sys.executable, str(EXAMPLES / "06_pinned_reply.py"), *words]
    with subprocess.Popen(example, stdout=subprocess.PIPE, text=True) as server:
        watchdog = threading.Timer(2 * PATIENCE, server.kill)
        watchdog.start()
        try:
            assert server.stdout is not None
            assert "answering at" in server.stdout.readline()
            lab.alice.initiate("psk")
            with alice.udp() as client:
                client.settimeout(PATIENCE)
                client.sendto(b"life", (bob.v4, PORT))
                assert client.recv(100) == b"the answer to life"
            line = server.stdout.readline()
            assert f"{alice.v4}: answered, encrypted" in line
            server.send_signal(signal.SIGINT)  # to be killed leaves the sysctl as it is
            server.wait(PATIENCE)
        finally:
            watchdog.cancel()
            server.kill()
