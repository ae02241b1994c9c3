"""``ipsec-aio demo``: tokens shown on the memory backend, anywhere, in a second.

SAs are declared, not negotiated, and traffic goes over the loopback interface: alice is 127.0.0.2,
mallory is 127.0.0.3. On real IPsec the same is shown by ``make demo`` in the project's sources.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

import ipsec_aio
from ipsec_aio.enums import Assurance

from .transcript import Transcript

if TYPE_CHECKING:
    from ipsec_aio.cli import Subparsers
    from ipsec_aio.tokens import PToken

__all__ = ["add_parser", "run"]

_BOB, _ALICE, _MALLORY = "127.0.0.1", "127.0.0.2", "127.0.0.3"
_NAMES = {_ALICE: "alice", _MALLORY: "mallory"}
_SECONDS = 5.0


def add_parser(subparsers: Subparsers) -> None:
    """Add ``demo`` to the command line."""
    subparsers.add_parser(
        "demo",
        help="show tokens on declared SAs, anywhere",
        description="An echo server that knows what protected each datagram and connection, on "
        "SAs that are declared by the demonstration itself. It needs no privilege.",
    )


def run(arguments: argparse.Namespace) -> int:
    """Show it. Returns 0 where everything seen is as it should be, else 1."""
    del arguments
    return asyncio.run(_show(Transcript(sys.stdout)))


class _Datagrams(ipsec_aio.DatagramProtocol):
    def __init__(self, seen: asyncio.Queue[PToken]) -> None:
        self._seen = seen

    def connection_made(self, transport: Any, ptoken: PToken | None) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: Any, ptoken: PToken) -> None:
        self._transport.sendto(data, addr)
        self._seen.put_nowait(ptoken)


class _Streams(ipsec_aio.Protocol):
    def __init__(self, seen: asyncio.Queue[PToken]) -> None:
        self._seen = seen

    def connection_made(self, transport: asyncio.Transport, ptoken: PToken) -> None:
        self._transport = transport
        self._seen.put_nowait(ptoken)

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


class _Clients:
    """Peers that send from addresses of their own, and what the server saw of them."""

    def __init__(
        self, script: Transcript, seen: asyncio.Queue[PToken], at: tuple[str, int]
    ) -> None:
        self._script = script
        self._seen = seen
        self._at = at

    async def send(self, source: str) -> PToken:
        """Send a datagram."""
        loop = asyncio.get_running_loop()
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as client:
            client.setblocking(False)
            client.bind((source, 0))
            await loop.sock_sendto(client, b"hello", self._at)
            return await self._told("a datagram", source)

    async def connect(self, source: str) -> PToken:
        """Connect, and wait for the echo."""
        reader, writer = await asyncio.open_connection(*self._at, local_addr=(source, 0))
        writer.write(b"hello\n")
        async with asyncio.timeout(_SECONDS):
            await reader.readline()
        writer.close()
        await writer.wait_closed()
        return await self._told("a connection", source)

    async def _told(self, what: str, source: str) -> PToken:
        async with asyncio.timeout(_SECONDS):
            token = await self._seen.get()
        self._script.say("server", f"{what} from {_NAMES[source]}: {_words(token)}")
        return token


def _words(token: PToken) -> str:
    if token.protected:
        return f"PROTECTED, {token.assurance.name}, by {token.sa}"
    if token.assurance is Assurance.NONE:
        return "CLEAR"
    return token.information_string.replace("unknown", "UNKNOWN", 1)


async def _show(script: Transcript) -> int:
    script.title("An echo server that knows what IPsec did (memory backend: SAs are declared)")
    backend = ipsec_aio.MemoryBackend()
    sa = backend.add_sa(src=_ALICE, dst=_BOB)
    seen: asyncio.Queue[PToken] = asyncio.Queue()
    async with backend:
        server = await ipsec_aio.create_server(lambda: _Streams(seen), _BOB, 0, backend=backend)
        at = server.sockets[0].getsockname()
        transport, _ = await ipsec_aio.create_datagram_endpoint(
            lambda: _Datagrams(seen), local_addr=at, backend=backend
        )
        async with server:
            clients = _Clients(script, seen, at)

            script.step("alice has an SA with the server")
            first = await clients.send(_ALICE)
            script.check("alice's datagram is protected", holds=first.protected)
            script.check("by the SA that was declared", holds=first.sa == sa)
            stream = await clients.connect(_ALICE)
            script.check("and so is her connection", holds=stream.protected)

            script.step("mallory, next door, has none")
            for token in (await clients.send(_MALLORY), await clients.connect(_MALLORY)):
                clear = token.assurance is Assurance.NONE and not token.protected
                script.check("mallory is seen in clear", holds=clear)

            script.step("the SA is rekeyed: another SPI, the same channel")
            backend.rekey(sa)
            backend.delete_sa(sa)
            script.check("alice's token is the same", holds=await clients.send(_ALICE) is first)

            script.step("events are lost: nothing is claimed that is not known")
            backend.lose_events()
            lost = await clients.send(_ALICE)
            script.check("what is not known is not protected", holds=not lost.protected)
            backend.recover()
            script.check("and then it is known again", holds=(await clients.send(_ALICE)).protected)
        transport.close()
    return script.end()
