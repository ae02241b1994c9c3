"""Echo datagrams, and say for each one what protected it.

On Linux, as root:  python examples/01_udp_echo.py --port 5000
Anywhere:           python examples/01_udp_echo.py --backend memory:examples/peers.toml
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib

import ipsec_aio
from ipsec_aio import Assurance, PToken


class Echo(ipsec_aio.DatagramProtocol):
    def connection_made(self, transport: asyncio.DatagramTransport, ptoken: PToken | None) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int], ptoken: PToken) -> None:
        print(f"udp from {addr[0]} port {addr[1]}: {describe(ptoken)}", flush=True)
        self.transport.sendto(data, addr)


def describe(ptoken: PToken) -> str:
    if ptoken.protected:
        return f"PROTECTED, {ptoken.assurance.name}, by {ptoken.sa}"
    if ptoken.assurance is Assurance.NONE:
        return "CLEAR"
    return f"not proved, {ptoken.assurance.name}: {ptoken.information_string}"


async def serve(host: str, port: int, spec: str) -> None:
    async with ipsec_aio.open_backend(spec, stamp="install") as backend:
        transport, _ = await ipsec_aio.create_datagram_endpoint(
            Echo, local_addr=(host, port), backend=backend
        )
        with contextlib.closing(transport):
            print(f"echoing datagrams at {transport.get_extra_info('sockname')}", flush=True)
            await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="An echo server.")
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--backend", default="xfrm", help='"xfrm" or "memory:FILE.toml"')
    arguments = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(arguments.host, arguments.port, arguments.backend))
