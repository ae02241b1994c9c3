"""Streams whose SAs expire and whose policies go and come, each beside an adversary in clear."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable

import pytest
from hosts import PATIENCE, Host, Pair, eventually, lenient, numbers, protect, receive
from lies import GUARDED, PORT, Peer, accepting, believed, without
from packets import tcp, udp

import ipsec_aio
from ipsec_aio import Assurance, PToken

OTHER_PORT = 6000
LIMITS = {"used up": "limit byte-hard 4000", "too old": "limit time-hard 4"}


def limited(pair: Pair, host: Host, limit: str) -> None:
    """Have the SA that comes into a host expire there, and nowhere else."""
    _, out = pair.states("add")
    host.ip(*pair.states("delete"), out)
    pair.extra = limit
    host.ip(pair.states("add")[0])
    pair.extra = ""


@GUARDED
@pytest.mark.parametrize("end", LIMITS)
async def test_an_sa_that_expires_under_a_stream(
    bob: Host, alice: Host, mallory: Host, monkeypatch: pytest.MonkeyPatch, end: str, guarded: bool
) -> None:
    """It stands still until there is another SA; nothing in clear takes its place."""
    pair = lenient(alice, bob)
    if not guarded:
        without(
            monkeypatch,
            "INPUT",
            "drop clear segments on stamped connections",
            "drop clear data that would complete a handshake",
        )
    loop = asyncio.get_running_loop()
    peer = Peer()
    async with accepting(bob, peer):
        with alice.tcp() as client:
            limited(pair, bob, LIMITS[end])
            async with asyncio.timeout(PATIENCE):
                await loop.sock_connect(client, (bob.v4, PORT))
                await loop.sock_sendall(client, b"sealed")
            data, token = await peer.next()
            assert data == b"sealed"
            assert believed(token)
            sent = b"." * 8000 if end == "used up" else b""
            client.send(sent)
            await eventually(lambda: not token.alive)
            assert token.sa is None
            received = b""

            async def receive_until(last: bytes) -> bytes:
                nonlocal received
                while not received.endswith(last):
                    data, told = await peer.next()
                    assert told is token
                    received += data
                return received

            seq, ack = numbers(client)
            ends = alice.v4, bob.v4, (client.getsockname()[1], PORT)
            mallory.inject(tcp(*ends, b"forged", seq=seq, ack=ack), bob)
            with bob.udp(OTHER_PORT) as probe:  # what is behind it on the same way has come
                mallory.inject(udp(mallory.v4, bob.v4, (4000, OTHER_PORT), b"behind"), bob)
                await receive(probe)
            if not guarded:
                found = (await receive_until(b"forged")).removesuffix(b"forged")
                assert found == sent[: len(found)]
                assert not sent or len(found) < len(sent)
                assert believed(token)
                return
            bob.ip(*pair.states("delete")[1:], *pair.states("add"))
            client.send(b"again")
            assert await receive_until(b"again") == sent + b"again"
            assert token.alive
            assert believed(token)


@pytest.mark.parametrize("trust", [False, True])
async def test_policies_that_go_and_come_under_streams(
    bob: Host, alice: Host, mallory: Host, trust: bool
) -> None:
    """Without the stamp: what comes in clear meanwhile is not known to be protected."""
    pair = protect(alice, bob)
    loop = asyncio.get_running_loop()
    peers: list[Peer] = []

    def accept() -> Peer:
        peers.append(Peer())
        return peers[-1]

    async with ipsec_aio.open_backend("xfrm", stamp="off", trust_policy=trust) as backend:
        server = await ipsec_aio.create_server(accept, bob.v4, PORT, backend=backend)
        with alice.tcp() as client, mallory.tcp() as clear:

            async def connect(sock: socket.socket) -> PToken:
                async with asyncio.timeout(PATIENCE):
                    number = len(peers)
                    await loop.sock_connect(sock, (bob.v4, PORT))
                    await eventually(lambda: len(peers) > number)
                    token: PToken = await peers[-1].made
                return token

            async def connect_when(there: Callable[[PToken], bool]) -> None:
                end = time.monotonic() + PATIENCE
                while True:
                    with alice.tcp() as sock:
                        token = await connect(sock)
                    if there(token):
                        return
                    assert token.assurance is Assurance.UNKNOWN
                    assert not token.protected
                    assert time.monotonic() < end
                    await asyncio.sleep(0.1)

            def by_policy(token: PToken) -> bool:
                return token.assurance is Assurance.POLICY

            async def say(data: bytes) -> PToken:
                async with asyncio.timeout(PATIENCE):
                    await loop.sock_sendall(client, data)
                    found, token = await stream.next()
                assert found == data
                return token

            # Policies that the backend has only just seen vouch for nothing yet.
            await connect_when(by_policy)
            first = await connect(client)
            stream = peers[-1]
            assert by_policy(first)
            assert first.protected is trust
            assert (await connect(clear)).assurance is Assurance.NONE
            assert await say(b"sealed") is first
            for _ in range(2):
                pair.release()
                await eventually(lambda: not by_policy(told(stream)))
                count = pair.packets(bob)
                token = await say(b"clear")
                assert pair.packets(bob) == count
                assert token.assurance is Assurance.UNKNOWN
                assert not token.protected
                with alice.tcp() as sock:
                    token = await connect(sock)
                    assert token.assurance is Assurance.UNKNOWN
                    assert not token.protected
                with mallory.tcp() as sock:
                    assert (await connect(sock)).assurance is Assurance.NONE
                pair.demand()
                await connect_when(by_policy)
                await eventually(lambda: told(stream) is first)
                assert await say(b"sealed") is first
            for peer in peers:
                peer.transport.abort()
        server.close()
        await server.wait_closed()


def told(peer: Peer) -> PToken:
    token: PToken = peer.transport.get_extra_info("ptoken")
    return token
