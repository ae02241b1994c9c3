"""Answer over UDP, under the protection that the question came with, or not at all.

On Linux, as root:  python examples/06_pinned_reply.py --port 5000
Anywhere:           python examples/06_pinned_reply.py --backend memory:examples/peers.toml
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib

import ipsec_aio
from ipsec_aio import ProtectionError, PToken


class Oracle(ipsec_aio.DatagramProtocol):
    def connection_made(
        self, transport: ipsec_aio.DatagramTransport, ptoken: PToken | None
    ) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int], ptoken: PToken) -> None:
        asyncio.get_running_loop().call_later(0.1, self.answer, data, addr, ptoken)

    def answer(self, data: bytes, addr: tuple[str, int], ptoken: PToken) -> None:
        # Whatever happened to the SAs since the question: the answer is for this channel alone.
        try:
            self.transport.sendto(b"the answer to " + data, addr, ptoken=ptoken)
            print(f"{addr[0]}: answered, {ptoken.information_string}", flush=True)
        except ProtectionError as error:
            print(f"{addr[0]}: not answered: {error.reason}", flush=True)


async def serve(host: str, port: int, spec: str, vici: str | None) -> None:
    async with ipsec_aio.open_backend(spec, vici=vici, stamp="install") as backend:
        transport, _ = await ipsec_aio.create_datagram_endpoint(
            Oracle, local_addr=(host, port), backend=backend
        )
        with contextlib.closing(transport):
            pinning = transport.get_extra_info("ipsec_pinning")
            address = transport.get_extra_info("sockname")
            print(f"answering at {address}, replies are pinned by the {pinning}", flush=True)
            await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A server whose replies stay in the channel.")
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--backend", default="xfrm", help='"xfrm", "xfrm+vici", "memory:FILE.toml"')
    parser.add_argument("--vici", help="charon's socket, as unix:///run/charon.vici")
    given = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(given.host, given.port, given.backend, given.vici))
