"""A kernel in memory and a charon that says what a test says, for the backend that joins them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from fake_charon import FakeCharon
from fake_netlink import FakeKernel
from xfrm_bench import FakeBench

from ipsec_aio.backends.join import XfrmViciBackend
from ipsec_aio.backends.vici import ViciClient
from ipsec_aio.identities import Identities
from ipsec_aio.ike import EVENTS
from ipsec_aio.testing import IdentityBench
from ipsec_aio.wire.vici import Message, Packet, PacketType


class Charon(FakeCharon):
    """Lists and tells what a test says."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.known |= set(EVENTS)
        self.ikes: dict[int, Message] = {}
        # Whoever a peer is, some CA says so.
        self.list_conn({"class": b"public key", "cacerts": [b"CN=ca"]})
        self.list("certs")
        self.list_sas()

    def list(self, what: str, *messages: Message) -> None:
        event = f"list-{what[:-1]}"
        packets = [Packet(PacketType.EVENT, event, message) for message in messages]
        self.answers[f"list-{what}"] = Packet(PacketType.CMD_RESPONSE), packets

    def list_conn(self, remote: Message) -> None:
        """Have one connection, ``net``, under which peers prove themselves like this."""
        self.list("conns", {"net": {"version": b"IKEv2", "remote-1": remote}})

    def list_sas(self) -> None:
        self.list("sas", *self.ikes.values())

    def ike(self, peer: str, *, number: int = 1, name: str = "net", **fields: str) -> Message:
        """Return the section of an IKE SA."""
        section: Message = {
            "uniqueid": b"%d" % number,
            "version": b"2",
            "state": b"ESTABLISHED",
            "local-host": b"192.0.2.1",
            "remote-host": b"192.0.2.2",
            "local-id": b"here.example.org",
            "remote-id": peer.encode(),
            "initiator-spi": b"%016x" % number,
            "responder-spi": b"%016x" % 0xFF,
        }
        section |= {key.replace("_", "-"): value.encode() for key, value in fields.items()}
        return {name: section}

    def child(self, spi: int, *, number: int | None = None, **fields: str) -> Message:
        section: Message = {
            "name": b"net",
            "uniqueid": b"%d" % (spi if number is None else number),
            "reqid": b"1",
            "state": b"INSTALLED",
            "mode": b"TRANSPORT",
            "protocol": b"ESP",
            "spi-in": b"%08x" % spi,
            "spi-out": b"%08x" % (spi + 0x10000),
        }
        return section | {key.replace("_", "-"): value.encode() for key, value in fields.items()}

    def comes(self, ike: Message, *children: Message) -> None:
        """Tell of an IKE SA and its children that came up, and list them from now on."""
        (name,) = ike
        section = dict(ike[name])
        number = int(section["uniqueid"])
        if number not in self.ikes:
            self.raise_event("ike-updown", {"up": b"yes", name: section})
        known = self.ikes.get(number, {name: {}})[name].get("child-sas", {})
        told = {f"net-{int(child['uniqueid'])}": child for child in children}
        self.ikes[number] = {name: section | {"child-sas": known | told}}
        self.list_sas()
        if children:
            self.raise_event("child-updown", {"up": b"yes", name: section | {"child-sas": told}})

    def goes(self, ike: Message) -> None:
        (name,) = ike
        number = int(ike[name]["uniqueid"])
        gone = self.ikes.pop(number)
        self.list_sas()
        self.raise_event("ike-updown", {name: dict(ike[name])})
        self.raise_event("child-updown", gone)


class JoinedBench(FakeBench, IdentityBench):
    backend: XfrmViciBackend

    def __init__(self, backend: XfrmViciBackend, kernel: FakeKernel, charon: Charon) -> None:
        super().__init__(backend, kernel)
        self.charon = charon
        self.peers: dict[str, int] = {}

    async def identify(self, *, src: str, dst: str, spi: int, peer: str, local: str) -> None:
        number = self.peers.setdefault(peer, len(self.peers) + 1)
        ike = self.charon.ike(peer, number=number, local_id=local, local_host=dst, remote_host=src)
        self.charon.comes(ike, self.charon.child(spi))
        await until(self.backend, lambda: known(self.backend, spi))


def known(backend: XfrmViciBackend, spi: int) -> bool:
    """Whether charon's word on an SA was taken in."""
    backend.drain()
    now = backend.clock()
    answers = [backend.identities_of(each, now) for each in backend.mirror.sad.numbered(spi)]
    return any(isinstance(answer, Identities) and answer.peer for answer in answers)


async def until(backend: XfrmViciBackend, condition: Callable[[], object]) -> None:
    """Wait for what a change of the backend's facts makes true."""
    changed = asyncio.Event()
    unsubscribe = backend.subscribe(changed.set)
    try:
        async with asyncio.timeout(10):
            while not condition():
                changed.clear()
                await changed.wait()
    finally:
        unsubscribe()


async def joined(kernel: FakeKernel, charon: Charon, **more) -> XfrmViciBackend:
    client = ViciClient(str(charon.path), backoff=(0.001, 0.01))
    backend = XfrmViciBackend(client=client, socket_factory=kernel.socket, **more)
    await backend.start()
    return backend
