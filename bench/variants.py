"""The endpoints that are compared, each on a loop of its own, all in one process and thread."""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop
from traffic import FIRST_SPI, peer_address, visitor_network

import ipsec_aio
from ipsec_aio.backends.contract import Registration
from ipsec_aio.backends.tables import TableBackend
from ipsec_aio.evidence import Evidence
from ipsec_aio.kernel.sockopts import SO_MARK, SO_RCVBUFFORCE, receive_marks
from ipsec_aio.require import Require
from ipsec_aio.tokens import PToken

_RECEIVE_BUFFER = 64 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class Marked(ipsec_aio.MemoryBackend):
    """The memory backend's SAs, and the kernel's own marks: what a stamp costs is paid."""

    def __init__(self, peers: int) -> None:
        super().__init__()
        for index in range(peers):
            self.add_sa(src=peer_address(index), dst="127.0.0.1", spi=FIRST_SPI + index)

    def add_visitors(self) -> None:
        """One tunnel for all visitors, each of whom is a channel of its own."""
        selector = ipsec_aio.backends.memory.selector(visitor_network(), "127.0.0.1")
        self.add_sa(
            src="127.0.0.2", dst="127.0.0.1", spi=FIRST_SPI, mode="tunnel", selector=selector
        )

    async def register(self, protocol: int, port: int) -> Registration:
        del protocol, port
        self.check_loop()
        return _Stamp(self)

    def resolve(self, evidence: Evidence) -> PToken:
        return TableBackend.resolve(self, evidence)

    def ignores_ports(self, evidence: Evidence) -> bool:
        return TableBackend.ignores_ports(self, evidence)


class _Stamp(Registration):
    def __init__(self, backend: Marked) -> None:
        self._backend = backend

    @property
    def generation(self) -> int:
        return self._backend.resolver.generation

    @property
    def reads_marks(self) -> bool:
        return True

    @property
    def keeps_fragments(self) -> bool:
        return False

    def close(self) -> None:
        pass


def may_mark() -> bool:
    """Whether this process may mark packets, and this kernel tells marks."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_MARK, 1)
        except OSError:
            return False
        return receive_marks(sock)


def facts(peers: int) -> ipsec_aio.MemoryBackend:
    """A backend under which so many peers are protected."""
    if may_mark():
        return Marked(peers)
    backend = ipsec_aio.MemoryBackend()
    for index in range(peers):
        backend.add_sa(src=peer_address(index), dst="127.0.0.1")
    return backend


class Plain(asyncio.DatagramProtocol):
    """Counts."""

    left = 0
    transport: Any

    def __init__(self, finish: Callable[[], None]) -> None:
        self.finish = finish

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.left -= 1
        if not self.left:
            self.finish()


class Tokened(ipsec_aio.DatagramProtocol):
    """Counts, and gets a token with each datagram."""

    left = 0
    transport: Any

    def __init__(self, finish: Callable[[], None]) -> None:
        self.finish = finish

    def connection_made(self, transport: Any, ptoken: PToken | None) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any, ptoken: PToken) -> None:
        self.left -= 1
        if not self.left:
            self.finish()


class PlainEcho(Plain):
    """Sends back."""

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(data, addr)


class TokenedEcho(Tokened):
    """Sends back."""

    def datagram_received(self, data: bytes, addr: Any, ptoken: PToken) -> None:
        self.transport.sendto(data, addr)


class Variant:
    """One way to receive datagrams, on a bound socket and a loop of its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, _RECEIVE_BUFFER)
        except PermissionError:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        self.sock.bind(("127.0.0.1", 0))
        self.sock.setblocking(False)
        self.port = int(self.sock.getsockname()[1])

    def holds(self, size: int) -> int:
        """How many datagrams of a size the socket's queue surely takes."""
        room = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        return int(room // (1280 + 2 * size))

    def receive(self, count: int) -> int:
        """Receive what is queued; return the CPU time, in ns."""
        raise NotImplementedError

    def close(self) -> None:
        """Close what was opened."""
        self.sock.close()


class Floor(Variant):
    """recvmmsg in C, and nothing else."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__("C recvmmsg, discarding")
        self._library = library
        receive_marks(self.sock)

    def receive(self, count: int) -> int:
        start = time.thread_time_ns()
        got = self._library.drain(self.sock.fileno(), count)
        spent = time.thread_time_ns() - start
        if got != count:
            raise RuntimeError(f"{self.name}: {got} of {count} came")
        return spent


class Endpoint(Variant):
    """A datagram endpoint of a loop: stock where there is no backend."""

    def __init__(
        self,
        name: str,
        loop: asyncio.AbstractEventLoop,
        backend: ipsec_aio.MemoryBackend | None = None,
        require: Require | None = None,
        *,
        echo: bool = False,
    ) -> None:
        super().__init__(name)
        self.loop = loop
        if backend is None:
            kind: Any = PlainEcho if echo else Plain
            opening: Any = loop.create_datagram_endpoint(lambda: kind(loop.stop), sock=self.sock)
        else:
            kind = TokenedEcho if echo else Tokened
            opening = ipsec_aio.create_datagram_endpoint(
                lambda: kind(loop.stop), sock=self.sock, backend=backend, require=require
            )
        self.transport, self.protocol = loop.run_until_complete(opening)

    def receive(self, count: int) -> int:
        self.protocol.left = count
        start = time.thread_time_ns()
        self.loop.run_forever()
        return time.thread_time_ns() - start

    def serve(self, until: Callable[[], Any]) -> Any:
        """Run the loop while ``until`` runs in another thread; return its answer."""
        answers: list[Any] = []

        def wait() -> None:
            try:
                answers.append(until())
            finally:
                self.loop.call_soon_threadsafe(self.loop.stop)

        thread = threading.Thread(target=wait)
        thread.start()
        self.loop.run_forever()
        thread.join()
        return answers[0]

    def close(self) -> None:
        self.transport.abort()
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.run_until_complete(asyncio.sleep(0))
        self.loop.close()
        super().close()


def keep_heap() -> None:
    """Have malloc keep large blocks, as glibc learns to when one was freed: a warm heap.

    asyncio asks for 256 KiB per datagram.
    """
    malloc = ctypes.CDLL(None)
    if hasattr(malloc, "mallopt"):
        malloc.mallopt(_M_TRIM_THRESHOLD, 512 << 20)
        malloc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)


class Fresh(Variant):
    """asyncio's own endpoint in another process, whose malloc maps each large block by itself."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("fresh.py"), str(self.sock.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            pass_fds=[self.sock.fileno()],
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 << 10)},
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def receive(self, count: int) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{count}\n")
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate("")
        super().close()


def asyncio_loop() -> asyncio.AbstractEventLoop:
    """Asyncio's own."""
    return asyncio.new_event_loop()


def uvloop_loop() -> asyncio.AbstractEventLoop:
    """Uvloop's."""
    return uvloop.new_event_loop()
