"""Answer over UDP and TCP, but only those whose traffic was encrypted.

On Linux, as root:  python examples/03_refuse_clear.py --port 5000
Anywhere:           python examples/03_refuse_clear.py --backend memory:examples/peers.toml
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib

import ipsec_aio
from ipsec_aio import ProtectionError, PToken

MUST = ipsec_aio.Require(encrypted=True)


class Datagrams(ipsec_aio.DatagramProtocol):
    def connection_made(self, transport: asyncio.DatagramTransport, ptoken: PToken | None) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int], ptoken: PToken) -> None:
        print(f"udp from {addr[0]}: served, {ptoken.information_string}", flush=True)
        self.transport.sendto(b"you are safe here\n", addr)

    def datagram_refused(self, addr: tuple[str, int], error: ProtectionError) -> None:
        print(f"udp from {addr[0]}: refused, {error}", flush=True)


async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    ptoken, (host, *_) = writer.get_extra_info("ptoken"), writer.get_extra_info("peername")
    print(f"tcp from {host}: served, {ptoken.information_string}", flush=True)
    writer.write(b"you are safe here\n")
    writer.close()


async def serve(host: str, port: int, spec: str) -> None:
    async with ipsec_aio.open_backend(spec, stamp="install") as backend:
        transport, _ = await ipsec_aio.create_datagram_endpoint(
            Datagrams, (host, port), backend=backend, require=MUST
        )
        address = transport.get_extra_info("sockname")
        server = await ipsec_aio.start_server(greet, *address, backend=backend, require=MUST)
        print(f"serving at {address}", flush=True)
        async with server:
            with contextlib.closing(transport):
                await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A server that refuses.")
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--backend", default="xfrm", help='"xfrm" or "memory:FILE.toml"')
    arguments = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(arguments.host, arguments.port, arguments.backend))
