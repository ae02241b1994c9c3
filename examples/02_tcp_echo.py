"""Echo connections, and say for each one what protects it.

On Linux, as root:  python examples/02_tcp_echo.py --port 5000
Anywhere:           python examples/02_tcp_echo.py --backend memory:examples/peers.toml
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib

import ipsec_aio
from ipsec_aio import Assurance, PToken


class Echo(ipsec_aio.Protocol):
    def connection_made(self, transport: asyncio.Transport, ptoken: PToken) -> None:
        self.transport = transport
        host, port = transport.get_extra_info("peername")[:2]
        print(f"tcp from {host} port {port}: {describe(ptoken)}", flush=True)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


def describe(ptoken: PToken) -> str:
    if ptoken.protected:
        return f"PROTECTED, {ptoken.assurance.name}, by {ptoken.sa}"
    if ptoken.assurance is Assurance.NONE:
        return "CLEAR"
    return f"not proved, {ptoken.assurance.name}: {ptoken.information_string}"


async def serve(host: str, port: int, spec: str) -> None:
    async with ipsec_aio.open_backend(spec, stamp="install") as backend:
        server = await ipsec_aio.create_server(Echo, host, port, backend=backend)
        async with server:
            print(f"echoing connections at {server.sockets[0].getsockname()}", flush=True)
            await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="An echo server.")
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--backend", default="xfrm", help='"xfrm" or "memory:FILE.toml"')
    arguments = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(arguments.host, arguments.port, arguments.backend))
