"""``python bench/tables.py [--records N]``: a gateway's tables, read and followed.

Rules:

* The xfrm backend as it is, on sockets that stand in for the kernel's: they give what the kernel
  would, by the datagram, made beforehand. CPU time is this process's, the loop's turns in it.
* Half of the SAs and policies are one way, half the other; each peer has its own. In transport
  mode each SA has the selector of its peer, in tunnel mode each template has its ends.
* Memory is what Python has allocated for the tables, in a run of its own; of times the best of
  several rounds counts. The SAs have carried nothing yet; counters of their own, which after a
  while all have, take about 200 bytes for each SA and its policy.
* Strangers are peers for whom there is neither an SA nor a policy: what tokens of theirs cost.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import gc
import json
import socket
import struct
import time
import tracemalloc
from collections import deque
from collections.abc import Awaitable, Iterable
from typing import Any

from ipsec_aio.backends.xfrm import XfrmBackend
from ipsec_aio.evidence import IPPROTO_UDP, Evidence
from ipsec_aio.wire.netlink import attribute

NEWSA, DELSA, GETSA, NEWPOLICY, _, GETPOLICY = range(0x10, 0x16)
GETDEFAULT = 0x28
NLMSG_DONE = 3
NETLINK_XFRM = 6
DATAGRAM = 32_000
LOCAL = bytes([192, 0, 2, 1])
ENDLESS = struct.pack("=8Q", *[2**64 - 1] * 4, 0, 0, 0, 0)
LIMITED = struct.pack("=8Q", *[2**64 - 1] * 4, 3000, 3600, 0, 0)
ANY = struct.pack("=40xH14x", 2)
KEY = bytes(20)
AEAD = attribute(18, b"rfc4106(gcm(aes))".ljust(64, b"\0") + struct.pack("=II", 160, 128) + KEY)
REPLAY = struct.Struct("=6I")
STRANGERS = 200


class Gateway:
    """What the kernel of a gateway tells: ``mode`` 0 is transport, 1 is tunnel."""

    def __init__(self, records: int, mode: int) -> None:
        self.mode = mode
        self.sas = [self.sa(n, 0xC0000000 + n) for n in range(records)]
        self.policies = [self.policy(n) for n in range(records)]
        self.answers: dict[tuple[int, int, int], list[bytes]] = {}

    def ends(self, n: int) -> tuple[bytes, bytes]:
        peer = (0x0A000000 + n // 2).to_bytes(4, "big")
        return (LOCAL, peer) if n % 2 else (peer, LOCAL)

    def selector(self, n: int) -> bytes:
        source, destination = self.ends(n)
        if self.mode:
            prefix, inside = 24, (0x14000000 + (n // 2 << 8)).to_bytes(5, "big")[1:]
            source, destination = (bytes(4), inside) if n % 2 else (inside, bytes(4))
            lengths = (prefix, 0) if n % 2 else (0, prefix)
        else:
            lengths = 32, 32
        return struct.pack("@16s16s8xHBB4xiI", destination, source, 2, *lengths, 0, 0)

    def sa(self, n: int, spi: int) -> bytes:
        source, destination = self.ends(n)
        return (
            (ANY if self.mode else self.selector(n))
            + struct.pack(">16sIB3x16s", destination, spi, 50, source)
            + LIMITED
            + struct.pack("=4Q12x", 0, 0, 1_790_000_000 + n // 20, 0)
            + struct.pack("=IIHBBB7x", 0, n // 2 + 1, 2, self.mode, 0, 128)
            + AEAD
            + attribute(23, REPLAY.pack(4, n, n, 0, 0, 128) + bytes(16))
            + attribute(33, bytes([1 + n % 2]))
        )

    def policy(self, n: int) -> bytes:
        ends = self.ends(n) if self.mode else (bytes(4), bytes(4))
        return (
            self.selector(n)
            + ENDLESS
            + struct.pack("=4Q", 0, 0, 1_790_000_000 + n // 20, 0)
            + struct.pack("=IIBBBB4x", 2000, 8 * (n + 1) + n % 2, n % 2, 0, 0, 0)
            + attribute(
                5,
                struct.pack("@16s4xB3xHxx16sIBBB3I", ends[1], 50, 2, ends[0],
                            n // 2 + 1 if self.mode else 1, self.mode, 0, 0, *[2**32 - 1] * 3),
            )
            + attribute(16, bytes(6))
        )  # fmt: skip

    def rekey(self, n: int, spi: int) -> list[bytes]:
        """A new SA, and the old one deleted."""
        body = struct.pack(">16sI", self.ends(n)[1], 0xC0000000 + n) + struct.pack("=HBx", 2, 50)
        return [message(NEWSA, self.sa(n, spi), 0), message(DELSA, body, 0)]

    def answer(self, protocol: int, kind: int, sequence: int) -> list[bytes]:
        """Return the datagrams that answer a request, the same ones each time."""
        asked = protocol, kind, sequence
        if asked not in self.answers:
            self.answers[asked] = list(self.answered(*asked))
        return self.answers[asked]

    def answered(self, protocol: int, kind: int, sequence: int) -> Iterable[bytes]:
        records: list[bytes] = []
        if protocol == NETLINK_XFRM:
            if kind == GETDEFAULT:
                yield message(GETDEFAULT, bytes([2, 2, 2, 0]), sequence)
                return
            records, kind = (self.sas, NEWSA) if kind == GETSA else (self.policies, NEWPOLICY)
        datagram = b""
        for record in records:
            datagram += message(kind, record, sequence)
            if len(datagram) > DATAGRAM:
                yield datagram
                datagram = b""
        yield datagram + message(NLMSG_DONE, bytes(4), sequence)


class Socket:
    """A netlink socket's stand-in."""

    def __init__(self, gateway: Gateway, protocol: int, sockets: list[Socket]) -> None:
        self.gateway = gateway
        self.protocol = protocol
        self.groups = 0
        self.queue: deque[bytes | OSError] = deque()
        self.ready, self.signal = socket.socketpair()
        sockets.append(self)

    def setblocking(self, flag: bool) -> None: ...

    def bind(self, address: tuple[int, int]) -> None: ...

    def setsockopt(self, level: int, option: int, value: int) -> None:
        self.groups += (level, option) == (270, 1)

    def fileno(self) -> int:
        return self.ready.fileno()

    def send(self, data: bytes) -> int:
        _, kind, _, sequence, _ = struct.unpack_from("=IHHII", data)
        self.queue.extend(self.gateway.answer(self.protocol, kind, sequence))
        return len(data)

    def tell(self, datagrams: Iterable[bytes | OSError]) -> None:
        self.queue.extend(datagrams)
        self.signal.send(b"!")

    def recvmsg_into(self, buffers: list[memoryview]) -> tuple[int, list[object], int, Any]:
        if not self.queue:
            if self.groups:
                self.ready.setblocking(False)
                self.ready.recv(1 << 16)
            raise BlockingIOError
        datagram = self.queue.popleft()
        if isinstance(datagram, OSError):
            raise datagram
        buffers[0][: len(datagram)] = datagram
        return len(datagram), [], 0, (0, 0)

    def close(self) -> None:
        self.ready.close()
        self.signal.close()


def message(kind: int, payload: bytes, sequence: int) -> bytes:
    """One message of the kernel's."""
    size = 16 + len(payload)
    return struct.pack("=IHHII", size, kind, 2, sequence, 0) + payload + bytes(-size % 4)


def evidence(peer: int) -> Evidence:
    """Of a datagram without a stamp that waited in no queue."""
    return Evidence(
        IPPROTO_UDP, LOCAL, 5000, peer.to_bytes(4, "big"), 40_000, mark=0, after=1 << 62
    )


async def seconds(work: Awaitable[None]) -> float:
    """CPU time."""
    start = time.process_time()
    await work
    return time.process_time() - start


async def synced(backend: XfrmBackend) -> None:
    """Wait until the tables are certain again."""
    changed = asyncio.Event()
    unsubscribe = backend.subscribe(changed.set)
    while not backend.mirror.synced:
        changed.clear()
        await changed.wait()
    unsubscribe()


class Run:
    """A backend and what it opened."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.sockets: list[Socket] = []
        factory: Any = lambda _, __, protocol: Socket(gateway, protocol, self.sockets)  # noqa: E731
        self.backend = XfrmBackend(stamp="off", socket_factory=factory)

    async def memory(self) -> float:
        """Bytes that are allocated for the tables."""
        gc.collect()
        tracemalloc.start()
        await self.backend.start()
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        await self.backend.aclose()
        return grown

    async def times(self, rekeys: int) -> dict[str, float]:
        """Seconds to read everything, to follow a rekey, and to read everything after a loss."""
        gc.collect()
        found = {"load": await seconds(self.backend.start())}
        datagrams = [
            datagram
            for n in range(min(rekeys, len(self.gateway.sas)))
            for datagram in self.gateway.rekey(n, 0xD0000000 + n)
        ]
        events = next(s for s in self.sockets if s.groups and s.protocol == NETLINK_XFRM)
        start = time.process_time()
        # As they would come to a loop that turns a hundred times a second.
        for first in range(0, len(datagrams), 200):
            events.tell(datagrams[first : first + 200])
            self.backend.drain()
        found["rekey"] = 2 * (time.process_time() - start) / len(datagrams)
        strangers = [evidence(0x7F000000 + n) for n in range(STRANGERS)]
        start = time.process_time()
        for stranger in strangers:
            self.backend.resolve(stranger)
        found["stranger"] = (time.process_time() - start) / STRANGERS
        events.tell([OSError(errno.ENOBUFS, "")])
        self.backend.drain()
        found["resync"] = await seconds(synced(self.backend))
        await self.backend.aclose()
        return found


def measure(records: int, rounds: int = 5) -> list[dict[str, Any]]:
    """Best of several rounds, by mode."""
    found: list[dict[str, Any]] = []
    for mode, name in enumerate(("transport", "tunnel")):
        gateway = Gateway(records, mode)
        taken = [asyncio.run(Run(gateway).times(20_000)) for _ in range(rounds)]
        # By now the gateway has made all its answers, which are none of the tables.
        memory = asyncio.run(Run(gateway).memory())
        best = {key: min(each[key] for each in taken) for key in taken[0]}
        found.append(
            {
                "mode": name,
                "sas": records,
                "policies": records,
                "load_seconds": best["load"],
                "resync_seconds": best["resync"],
                "rekey_microseconds": best["rekey"] * 1e6,
                "stranger_microseconds": best["stranger"] * 1e6,
                "megabytes": memory / 1e6,
            }
        )
    return found


def main() -> None:
    """Print what is measured, as JSON."""
    parser = argparse.ArgumentParser(prog="tables", description=__doc__)
    parser.add_argument("--records", type=int, default=100_000, help="SAs, and policies as many")
    parser.add_argument("--rounds", type=int, default=5, help="of which the best counts")
    arguments = parser.parse_args()
    for row in measure(arguments.records, arguments.rounds):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
