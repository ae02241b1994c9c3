"""Every answer is right under load, where each payload names its sender.

One process is every host at once, so the senders wait for the receiver: what is sent is bounded by
what its buffer holds, and a wrong answer can't hide among lost datagrams.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress

from hosts import GCM, NULL, PATIENCE, Host, Pair, protect

import ipsec_aio
from ipsec_aio import Assurance, PToken

PORT = 5000
BURST = 64
DATAGRAMS, CONNECTIONS = 50_400, 1_002
"""For each of the two event loops."""

REKEYING = 0.2
"""Seconds between rekeys."""

_SO_RCVBUFFORCE = 33

Answer = tuple[Assurance, bool, bool | None, bool | None]
"""(assurance, protected, privacy_protected, integrity_protected)"""

PRIVATE: Answer = (Assurance.EXACT, True, True, True)
INTACT: Answer = (Assurance.EXACT, True, False, True)
CLEAR: Answer = (Assurance.NONE, False, False, False)


def answer(ptoken: PToken) -> Answer:
    return (
        ptoken.assurance,
        ptoken.protected,
        ptoken.privacy_protected,
        ptoken.integrity_protected,
    )


class Datagrams(ipsec_aio.DatagramProtocol):
    """Counts what was said about each sender's datagrams."""

    def __init__(self) -> None:
        self.received = self.awaited = 0
        self.complete = asyncio.Event()
        self.said: Counter[tuple[bytes, Answer]] = Counter()

    def datagram_received(self, data: bytes, addr: tuple[str, int], ptoken: PToken) -> None:
        self.received += 1
        self.said[data, answer(ptoken)] += 1
        if self.received >= self.awaited:
            self.complete.set()

    async def until(self, total: int) -> None:
        """Wait until so many were received; raises TimeoutError."""
        self.awaited = total
        if self.received < total:
            self.complete.clear()
            await asyncio.wait_for(self.complete.wait(), PATIENCE)


class Connection(ipsec_aio.Protocol):
    """Counts what was said about a connection when it came and when its sender was known."""

    def __init__(self, said: Counter[tuple[bytes, Answer]]) -> None:
        self.said = said

    def connection_made(self, transport: asyncio.Transport, ptoken: PToken) -> None:
        self.transport = transport
        self.first = answer(ptoken)

    def data_received(self, data: bytes) -> None:
        self.said[data, self.first] += 1
        self.said[data, answer(self.transport.get_extra_info("ptoken"))] += 1
        self.transport.close()


@asynccontextmanager
async def datagrams(
    bob: Host, backend: object, factory: Callable[[], Datagrams] = Datagrams
) -> AsyncIterator[Datagrams]:
    transport, protocol = await ipsec_aio.create_datagram_endpoint(
        factory, local_addr=(bob.v4, PORT), backend=backend
    )
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 22)
    with closing(transport):
        yield protocol


def sender(host: Host, bob: Host) -> socket.socket:
    client = host.udp()
    client.connect((bob.v4, PORT))
    return client


@asynccontextmanager
async def rekeyed(*pairs: Pair) -> AsyncIterator[list[float]]:
    """Rekey all of them again and again; SAs stay for as long as a packet may need them."""
    times: list[float] = []

    async def rekey() -> None:
        while True:
            await asyncio.sleep(REKEYING)
            for pair in pairs:
                pair.rekey()
                if len(pair.spis) > 4:
                    pair.retire()
            times.append(time.monotonic())

    task = asyncio.create_task(rekey())
    try:
        yield times
        assert not task.done() or task.result()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def connect(host: Host, bob: Host, tag: bytes, times: int) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(times):
        with host.tcp() as client:
            async with asyncio.timeout(PATIENCE):
                await loop.sock_connect(client, (bob.v4, PORT))
                await loop.sock_sendall(client, tag)
                assert await loop.sock_recv(client, 1) == b""


def totals(said: Counter[tuple[bytes, Answer]]) -> dict[str, int]:
    by_assurance: Counter[str] = Counter()
    for (_, (assurance, *_)), number in said.items():
        by_assurance[assurance.name] += number
    return dict(by_assurance)


async def test_many_from_protected_and_clear_peers_while_rekeying(
    bob: Host, alice: Host, carol: Host, mallory: Host
) -> None:
    right = {b"alice": PRIVATE, b"carol": INTACT, b"mallory": CLEAR}
    pairs = protect(alice, bob, GCM), protect(carol, bob, NULL, reqid=2)
    connections: Counter[tuple[bytes, Answer]] = Counter()
    hosts = {b"alice": alice, b"carol": carol, b"mallory": mallory}
    began = time.monotonic()
    async with ipsec_aio.open_backend("xfrm", stamp="install") as backend:
        server = await ipsec_aio.create_server(
            lambda: Connection(connections), bob.v4, PORT, backend=backend
        )
        async with server, datagrams(bob, backend) as protocol, rekeyed(*pairs) as rekeys:
            connecting = [
                asyncio.create_task(connect(host, bob, tag, CONNECTIONS // 3))
                for tag, host in hosts.items()
            ]
            clients = {tag: sender(host, bob) for tag, host in hosts.items()}
            sent = 0
            while sent < DATAGRAMS:
                for tag, client in clients.items():
                    for _ in range(BURST):
                        client.send(tag)
                sent += BURST * len(clients)
                await protocol.until(sent)
            for client in clients.values():
                client.close()
            await asyncio.gather(*connecting)
    seconds = time.monotonic() - began
    print(
        f"\nload: {protocol.received} datagrams {totals(protocol.said)}, "
        f"{connections.total() // 2} connections {totals(connections)} (twice each), "
        f"{len(rekeys)} rekeys of {len(pairs)} pairs, {seconds:.1f} s"
    )
    assert protocol.said == {(tag, right[tag]): sent // 3 for tag in hosts}
    assert connections == {(tag, right[tag]): CONNECTIONS // 3 * 2 for tag in hosts}
    assert len(rekeys) > 5
