"""``chain.py [--rounds N]``: what the whole chain costs: real ESP, the stamp, a requirement.

Rules:

* It runs in the lab (``tests/lab/run.py``), on hosts in network namespaces, and prints JSON.
* alice sends until bob's queue holds a round's datagrams. Packets are decrypted, stamped and
  queued inside her system call, so what bob's kernel does is her time, less that of sending the
  same to carol, who drops ESP as it arrives.
* Then bob receives them. What a C loop with recvmmsg takes for that is the kernel's; the rest is
  the loop's, the package's and the callback's.
* Every datagram that counts came with a token that is EXACT and protected.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from measure import spread
from traffic import floor
from variants import asyncio_loop, uvloop_loop

import ipsec_aio
from ipsec_aio import Assurance, Require
from ipsec_aio.kernel.sockopts import SO_RCVBUFFORCE, receive_marks

sys.path.append(str(Path(__file__).parent.parent / "tests" / "lab"))

from hosts import GCM, Host, Network, protect

COUNT = 1024
SIZES = (64, 1200)
LOOPS = {"asyncio": asyncio_loop, "uvloop": uvloop_loop}
FLOOR, DROPPED = "C recvmmsg, discarding", "dropped"


class Counting:
    """What both kinds of protocol do: count, and tell when all have come."""

    def __init__(self) -> None:
        self.left = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def expect(self, count: int) -> None:
        self.left = count
        self.done = asyncio.get_running_loop().create_future()

    def came(self) -> None:
        self.left -= 1
        if not self.left:
            self.done.set_result(None)


class Plain(Counting, asyncio.DatagramProtocol):
    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.came()


class Tokened(Counting, ipsec_aio.DatagramProtocol):
    def __init__(self) -> None:
        super().__init__()
        self.tokens: set[ipsec_aio.PToken] = set()

    def datagram_received(self, data: bytes, addr: Any, ptoken: ipsec_aio.PToken) -> None:
        self.tokens.add(ptoken)
        self.came()


def queue(bob: Host) -> socket.socket:
    """A socket of bob's whose queue takes a round."""
    sock = bob.udp()
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
    return sock


async def measured(name: str, network: Network, size: int, rounds: int) -> list[dict[str, Any]]:
    """All variants on the running loop: rows with the kernel's cost and the receiver's."""
    alice, bob, carol = (network.hosts[each] for each in ("alice", "bob", "carol"))
    data, drain = b"x" * size, floor()
    client = alice.udp()
    filled: dict[str, list[float]] = {}
    counters: dict[str, Any] = {}
    loop = asyncio.get_running_loop()

    def fill(variant: str, to: Any) -> None:
        send = client.sendto
        start = time.perf_counter_ns()
        for _ in range(COUNT):
            send(data, to)
        filled.setdefault(variant, []).append((time.perf_counter_ns() - start) / COUNT)

    async with ipsec_aio.open_backend("xfrm", stamp="install") as backend:
        socks = {each: queue(bob) for each in (FLOOR, "stock", "ours", "ours, require=")}
        transports = []
        for each, sock in socks.items():
            if each == "stock":
                made: Any = await loop.create_datagram_endpoint(Plain, sock=sock)
            elif each.startswith("ours"):
                require = Require(encrypted=True) if "require" in each else None
                made = await ipsec_aio.create_datagram_endpoint(
                    Tokened, sock=sock, backend=backend, require=require
                )
            else:
                receive_marks(sock)
                continue
            transports.append(made[0])
            counters[each] = made[1]

        def discard() -> float:
            sock = socks[FLOOR]
            fill(FLOOR, sock.getsockname())
            assert drain is not None
            start = time.thread_time_ns()
            got = drain.drain(sock.fileno(), COUNT)
            spent = time.thread_time_ns() - start
            if got != COUNT:
                raise RuntimeError(f"{got} of {COUNT} came")
            return spent / COUNT

        def drop() -> float:
            fill(DROPPED, (carol.v4, 5000))
            return 0.0

        async def receive(each: str) -> float:
            counter = counters[each]
            counter.expect(COUNT)
            fill(each, socks[each].getsockname())
            start = time.thread_time_ns()
            async with asyncio.timeout(60):
                await counter.done
            return (time.thread_time_ns() - start) / COUNT

        found: dict[str, list[float]] = {}
        for turn in range(rounds + 1):
            for each in counters:
                found.setdefault(each, []).append(await receive(each))
            if drain is not None:
                found.setdefault(FLOOR, []).append(discard())
            drop()
            print(f"chain: {name}, {size} bytes: {turn} of {rounds}", file=sys.stderr)
        for counter in counters.values():
            for token in getattr(counter, "tokens", ()):
                assert token.assurance is Assurance.EXACT
                assert token.protected
        for transport in transports:
            transport.close()
        await asyncio.sleep(0)
        socks[FLOOR].close()
    client.close()
    base = filled[DROPPED]
    rows = []
    for each, spent in found.items():
        kernel = [some - none for some, none in zip(filled[each], base, strict=True)][1:]
        own = [one - least for one, least in zip(spent, found.get(FLOOR, spent), strict=True)][1:]
        share = [o / (k + s) for o, k, s in zip(own, kernel, spent[1:], strict=True)]
        rows.append(
            {
                "variant": each if each == FLOOR else f"{name}, {each}",
                "kernel": spread(kernel),
                "cost": spread(spent[1:]),
                "share": spread(share),
            }
        )
    return rows


def main() -> None:
    """Print a list of cells, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    cells: list[dict[str, Any]] = []
    with closing(Network()) as network:
        alice, bob, carol = (network.hosts[each] for each in ("alice", "bob", "carol"))
        protect(alice, bob, GCM)
        protect(alice, carol, GCM)
        carol.nft(
            "table ip gone { chain gone { type filter hook prerouting priority -500;"
            " ip protocol esp drop; }; }\n"
        )
        for size in SIZES:
            for name, make in LOOPS.items():
                with bob, asyncio.Runner(loop_factory=make) as runner:
                    rows = runner.run(measured(name, network, size, rounds))
                    cells.append({"size": size, "loop": name, "rows": rows})
        network.reset()
    print(json.dumps(cells))


if __name__ == "__main__":
    main()
