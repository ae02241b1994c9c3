"""strongSwan in the lab: up, keyed by the first packet, rekeyed, down."""

from __future__ import annotations

import asyncio
import socket

from charon import Charon, connect
from hosts import PATIENCE, Host, eventually, receive

PORT = 5000


async def insist(client: socket.socket, to: tuple[str, int], server: socket.socket) -> bytes:
    """Send until something arrives: what is sent while IKE negotiates is lost."""
    async with asyncio.timeout(PATIENCE):
        while True:
            client.sendto(b"hello", to)
            try:
                return (await receive(server, 1))[0]
            except TimeoutError:
                continue


async def test_the_first_packet_keys_the_hosts(bob: Host, alice: Host):
    with Charon(bob) as ours, Charon(alice) as theirs:
        connect(ours, theirs)
        with bob.udp(PORT) as server, alice.udp() as client:
            assert await insist(client, (bob.v4, PORT), server) == b"hello"
            (spi,) = ours.spis()
            assert f"spi 0x{spi:08x}" in bob.show("ip", "xfrm", "state")
            theirs.rekey()
            await eventually(lambda: ours.spis()[0] != spi)
            client.sendto(b"again", (bob.v4, PORT))
            while (await receive(server))[0] != b"again":
                pass
            theirs.terminate()
            await eventually(lambda: not ours.spis())
    assert bob.show("ip", "xfrm", "state") == bob.show("ip", "xfrm", "policy") == ""
