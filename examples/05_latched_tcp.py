"""Serve connections for as long as they are protected as they were when they came.

On Linux, as root, beside an IKE daemon:
    python examples/05_latched_tcp.py --port 5000
Anywhere:
    python examples/05_latched_tcp.py --backend memory:examples/peers.toml
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib

import ipsec_aio
from ipsec_aio import Latch, LatchReason, PToken

LATCH = Latch(on_break="pause", timeout=30)


class Service(ipsec_aio.Protocol):
    def connection_made(self, transport: asyncio.Transport, ptoken: PToken) -> None:
        self.transport = transport
        latch = transport.get_extra_info("ipsec_latch")
        who = latch.parameters.peer or "a peer without a name"
        self.say(f"latched to {who}, held by the {latch.held_by}, {ptoken.information_string}")

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)

    def latch_broken(self, reason: LatchReason) -> None:
        self.say(f"BROKEN by {reason.name}: nothing is read or written")

    def latch_restored(self) -> None:
        self.say("restored")

    def connection_lost(self, exc: Exception | None) -> None:
        self.say("gone")

    def say(self, text: str) -> None:
        print(f"tcp from {self.transport.get_extra_info('peername')[0]}: {text}", flush=True)


async def serve(host: str, port: int, spec: str) -> None:
    async with ipsec_aio.open_backend(spec, stamp="install") as backend:
        server = await ipsec_aio.create_server(Service, host, port, backend=backend, latch=LATCH)
        async with server:
            print(f"serving at {server.sockets[0].getsockname()}", flush=True)
            await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A server with latched connections.")
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--backend", default="xfrm", help='"xfrm", "xfrm+vici", "memory:FILE.toml"')
    given = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(given.host, given.port, given.backend))
