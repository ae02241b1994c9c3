"""Serve the peers on a list, by the identity that IKE proved; addresses count for nothing.

On Linux, as root, beside strongSwan:
    python examples/04_allow_list.py '*.example.org' 'C=CH, O=Acme, CN=*'
Anywhere:
    python examples/04_allow_list.py '*.example.org' --backend memory:examples/peers.toml
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib

import ipsec_aio
from ipsec_aio import ProtectionError, PToken, Require


class Service(ipsec_aio.DatagramProtocol):
    def connection_made(self, transport: asyncio.DatagramTransport, ptoken: PToken | None) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int], ptoken: PToken) -> None:
        print(f"udp from {addr[0]}: served, {ptoken.peer}", flush=True)
        self.transport.sendto(f"welcome, {ptoken.peer}\n".encode(), addr)

    def datagram_refused(self, addr: tuple[str, int], error: ProtectionError) -> None:
        print(f"udp from {addr[0]}: refused, {error}", flush=True)


async def serve(host: str, port: int, spec: str, vici: str | None, allowed: list[str]) -> None:
    must = Require(encrypted=True, peer=allowed)
    async with ipsec_aio.open_backend(spec, vici=vici, stamp="install") as backend:
        transport, _ = await ipsec_aio.create_datagram_endpoint(
            Service, (host, port), backend=backend, require=must
        )
        with contextlib.closing(transport):
            print(f"serving at {transport.get_extra_info('sockname')}", flush=True)
            await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A server with an allow-list.")
    parser.add_argument("allowed", nargs="+", metavar="PATTERN", help="an identity, or several")
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--backend", default="xfrm+vici", help='or "memory:FILE.toml"')
    parser.add_argument("--vici", help="charon's socket, as unix:///run/charon.vici")
    given = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(given.host, given.port, given.backend, given.vici, given.allowed))
