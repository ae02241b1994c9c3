"""``python bench [--quick]``: what tokens cost, beside the loops that have none.

Rules:

* The receiver is the bottleneck: what it receives is queued by another process beforehand, or
  paced by it. Cost is the receiving thread's CPU time, the kernel's share in it included.
* All variants run in one process and thread, in paired rounds: each once per round, in a random
  order. A figure is the median over the rounds, with its quartiles; a ratio is taken in each round.
* Everything goes through the public functions with their default settings.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import report
import uvloop
from measure import paired, spread, table
from traffic import Traffic, floor
from variants import (
    Endpoint,
    Floor,
    Fresh,
    Variant,
    asyncio_loop,
    facts,
    keep_heap,
    may_mark,
    uvloop_loop,
)

import ipsec_aio
from ipsec_aio import Require

DOCS = Path(__file__).parent.parent / "docs"
CELLS = [(size, peers) for size in (64, 1200) for peers in (1, 1000)]
STOCK = "uvloop, stock"
REQUIRE = Require(encrypted=True)
LOOPS = {"asyncio": asyncio_loop, "uvloop": uvloop_loop}
CHUNK = 6400


class Bench:
    """One run."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.traffic = Traffic()
        self.floor = floor()

    def endpoints(self, peers: int, *, fresh: bool = False, **options: Any) -> list[Variant]:
        """Stock and ours, on both loops."""
        backend = facts(peers)
        made: list[Variant] = [
            Endpoint("asyncio, stock", asyncio_loop(), **options),
            Endpoint(STOCK, uvloop_loop(), **options),
        ]
        if fresh:
            made.insert(1, Fresh("asyncio, stock, fresh heap"))
        for loop, make in LOOPS.items():
            for require in (None, REQUIRE):
                name = f"{loop}, ours" + ("" if require is None else ", require=")
                made.append(Endpoint(name, make(), backend, require, **options))
        return made

    def saturated(self) -> list[dict[str, Any]]:
        """Queues that are never empty."""
        cells: list[dict[str, Any]] = []
        for size, peers in CELLS:
            self.traffic.peers(peers)
            variants = self.endpoints(peers, fresh=True)
            if self.floor is not None:
                variants.append(Floor(self.floor))
            count = min(CHUNK, *(variant.holds(size) for variant in variants))

            def sample(variant: Variant, size: int = size, count: int = count) -> float:
                # One mmap per datagram is slow enough to be measured by fewer.
                some = count // 8 if "fresh" in variant.name else count
                self.traffic.do("fill", variant.port, size, some)
                return variant.receive(some) / some

            what = f"saturated, {size} bytes, {peers} peer(s)"
            found = paired({v.name: lambda v=v: sample(v) for v in variants}, self.rounds, what)
            cells.append({"size": size, "peers": peers, "rows": table(found, STOCK)})
            for variant in variants:
                variant.close()
        return cells

    def paced(self, rate: int = 20_000) -> list[dict[str, Any]]:
        """One datagram now and then, evenly."""
        cells: list[dict[str, Any]] = []
        for size, peers in CELLS:
            self.traffic.peers(peers)
            variants = self.endpoints(peers)

            def sample(variant: Any, size: int = size) -> float:
                count = rate // 40
                variant.protocol.left = many = 1 << 40
                start = time.thread_time_ns()
                variant.serve(lambda: self.traffic.do("pace", variant.port, size, count, rate))
                return (time.thread_time_ns() - start) / (many - variant.protocol.left)

            what = f"{rate} a second, {size} bytes, {peers} peer(s)"
            found = paired({v.name: lambda v=v: sample(v) for v in variants}, self.rounds, what)
            cells.append({"size": size, "peers": peers, "rows": table(found, STOCK)})
            for variant in variants:
                variant.close()
        return cells

    def echo(self) -> list[dict[str, Any]]:
        """Round trips: one at a time."""
        self.traffic.peers(1)
        variants = self.endpoints(1, echo=True)
        worst: dict[str, list[float]] = {variant.name: [] for variant in variants}

        def sample(variant: Any) -> float:
            half, most = variant.serve(lambda: self.traffic.do("echo", variant.port, 64, 500))
            worst[variant.name].append(most)
            return float(half)

        found = paired({v.name: lambda v=v: sample(v) for v in variants}, self.rounds, "echo")
        # The first sample is the one that warms up.
        p99 = {name: values[1:] for name, values in worst.items()}
        for variant in variants:
            variant.close()
        return [
            {"percentile": 50, "rows": table(found, STOCK)},
            {"percentile": 99, "rows": table(p99, STOCK)},
        ]

    def sending(self) -> list[dict[str, Any]]:
        """Datagrams to a socket that nobody reads."""
        cells: list[dict[str, Any]] = []
        for size in (64, 1200):
            sink = Variant("sink")
            to, data, count = ("127.0.0.1", sink.port), b"x" * size, 2000
            variants = self.endpoints(1)

            def sample(variant: Any, to: Any = to, data: bytes = data, count: int = count) -> float:
                sendto = variant.transport.sendto
                start = time.thread_time_ns()
                for _ in range(count):
                    sendto(data, to)
                return (time.thread_time_ns() - start) / count

            samples = {v.name: lambda v=v: sample(v) for v in variants if "require" not in v.name}

            def many(variant: Any, to: Any = to, data: bytes = data, count: int = count) -> float:
                datagrams = [data] * count
                start = time.thread_time_ns()
                variant.transport.sendto_many(datagrams, to)
                return (time.thread_time_ns() - start) / count

            samples |= {
                f"{v.name}, sendto_many": lambda v=v: many(v)
                for v in variants
                if v.name.endswith("ours")
            }
            found = paired(samples, self.rounds, f"sendto, {size} bytes")
            cells.append({"size": size, "rows": table(found, STOCK)})
            for variant in [*variants, sink]:
                variant.close()
        return cells

    def accepting(self) -> list[dict[str, Any]]:
        """Connections that wait to be accepted, 200 at once, until all are with their protocols."""
        cells: list[dict[str, Any]] = []
        for name, make in LOOPS.items():
            servers = {
                f"{name}, stock": Server(make(), None),
                f"{name}, ours": Server(make(), facts(0)),
            }

            def sample(server: Server) -> float:
                self.traffic.do("connect", server.port, 200)
                spent = server.accept(200)
                self.traffic.do("drop")
                server.settle()
                return spent / 200

            found = paired(
                {key: lambda s=s: sample(s) for key, s in servers.items()},
                self.rounds,
                f"accept on {name}",
            )
            stock, ours = found.values()
            extra = spread([b - a for a, b in zip(stock, ours, strict=True)])
            cells.append({"loop": name, "rows": table(found, f"{name}, stock"), "extra": extra})
            for server in servers.values():
                server.close()
        return cells

    def memory(self, peers: int) -> dict[str, Any]:
        """Bytes per peer of an endpoint that has heard from very many."""
        print(f"  memory of {peers} peers", file=sys.stderr)
        backend = facts(0)
        if not hasattr(backend, "add_visitors"):
            return {}
        backend.add_visitors()
        endpoint = Endpoint("uvloop, ours", uvloop_loop(), backend, REQUIRE)
        # What everybody shares is there by then.
        self.traffic.do("visit", endpoint.port, 0, 100)
        endpoint.receive(100)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        epoch = backend.epoch
        step = 1000
        for first in range(100, peers, step):
            count = min(step, peers - first)
            self.traffic.do("visit", endpoint.port, first, count)
            endpoint.receive(count)
        heard = endpoint.transport.ipsec_stats.protected
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        if backend.epoch != epoch:
            raise RuntimeError("the peers were forgotten meanwhile")
        endpoint.close()
        return {"peers": heard, "bytes_per_peer": grown / max(heard - 100, 1)}


def tables(records: int, rounds: int) -> list[dict[str, Any]]:
    """A gateway's tables, in a process of their own."""
    print(f"  tables of {records} SAs and policies", file=sys.stderr)
    script = Path(__file__).with_name("tables.py")
    command = [sys.executable, script, "--records", str(records), "--rounds", str(rounds)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in told.splitlines()]


class Server:
    """A TCP server whose connections do nothing."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, backend: ipsec_aio.MemoryBackend | None
    ) -> None:
        self.loop = loop
        self.left = 0
        self.transports: list[Any] = []
        options: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "backlog": 1024}
        if backend is None:
            opening: Any = loop.create_server(lambda: StockStream(self), **options)
        else:
            opening = ipsec_aio.create_server(
                lambda: TokenedStream(self), backend=backend, **options
            )
        self.server = loop.run_until_complete(opening)
        self.port = int(self.server.sockets[0].getsockname()[1])

    def made(self, transport: Any) -> None:
        self.transports.append(transport)
        self.left -= 1
        if not self.left:
            self.loop.stop()

    def accept(self, count: int) -> int:
        self.left = count
        start = time.thread_time_ns()
        self.loop.run_forever()
        return time.thread_time_ns() - start

    def settle(self) -> None:
        for transport in self.transports:
            transport.abort()
        self.transports.clear()
        for _ in range(3):
            self.loop.run_until_complete(asyncio.sleep(0))
        # What closed connections have left behind is no cost of the next ones.
        gc.collect()

    def close(self) -> None:
        self.server.close()
        self.loop.run_until_complete(self.server.wait_closed())
        self.loop.close()


class StockStream(asyncio.Protocol):
    """A connection."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def connection_made(self, transport: Any) -> None:
        self.server.made(transport)


class TokenedStream(ipsec_aio.Protocol):
    """A connection with a token."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def connection_made(self, transport: Any, ptoken: Any) -> None:
        self.server.made(transport)


def machine(bench: Bench) -> dict[str, Any]:
    """What it ran on."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "processor": model,
        "processors": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "uvloop": uvloop.__version__,
        "senders": "C" if bench.traffic.compiled else "Python",
        "marks": may_mark(),
        "load": os.getloadavg()[0],
        "rounds": bench.rounds,
    }


def main() -> None:
    """Run what is asked for, print it, and write it down."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds, and nothing is written")
    parser.add_argument("--rounds", type=int, default=0, help="paired rounds (40; quick: 8)")
    parser.add_argument("--only", action="append", help="saturated, paced, echo, …")
    parser.add_argument("--output", type=Path, help="where JSON and SVG go (docs)")
    arguments = parser.parse_args()
    bench = Bench(arguments.rounds or (8 if arguments.quick else 40))
    keep_heap()
    parts = {
        "saturated": bench.saturated,
        "paced": bench.paced,
        "echo": bench.echo,
        "sending": bench.sending,
        "accepting": bench.accepting,
        "memory": lambda: bench.memory(10_000 if arguments.quick else 100_000),
        "tables": lambda: tables(*((10_000, 2) if arguments.quick else (100_000, 5))),
    }
    found: dict[str, Any] = {"machine": machine(bench)}
    started = time.monotonic()
    for name, part in parts.items():
        if not arguments.only or name in arguments.only:
            found[name] = part()
            report.show(name, found[name])
    bench.traffic.close()
    print(f"\n{report.described(found['machine'])}\ntook {time.monotonic() - started:.0f} s")
    target = arguments.output or (None if arguments.quick or arguments.only else DOCS)
    if target is not None:
        (target / "performance.json").write_text(json.dumps(found, indent=1) + "\n")
        (target / "performance.svg").write_text(report.plot(found))
        page = target / "performance.md"
        if page.exists():
            page.write_text(report.filled(page.read_text(), found))


if __name__ == "__main__":
    main()
