"""The process that makes the traffic: ``traffic.c`` where a compiler is, else this file itself."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
BUILT = HERE.parent / "build" / "bench"
SO_MARK = 36
FIRST_SPI = 0x1001
"""The first peer's mark; the next one's is one more."""


def peer_address(index: int) -> str:
    """The address of a peer: 127.0.0.1, then 127.1.0.1 and on."""
    return f"127.1.{index // 256}.{index % 256}" if index else "127.0.0.1"


def visitor_network() -> str:
    """Where visitors come from."""
    return "127.64.0.0/10"


def compiled(name: str, *options: str) -> Path | None:
    """Compile traffic.c; None where nothing can."""
    cc = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if cc is None:
        return None
    BUILT.mkdir(parents=True, exist_ok=True)
    target = BUILT / name
    source = HERE / "traffic.c"
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        subprocess.run([cc, "-O2", *options, "-o", str(target), str(source)], check=True)
    return target


class Traffic:
    """The process, and what to ask of it."""

    def __init__(self) -> None:
        program = compiled("traffic")
        self.compiled = program is not None
        command = [str(program)] if program else [sys.executable, __file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._peers = 0

    def start(self, *words: object) -> None:
        """Give a command; see traffic.c."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()

    def finish(self) -> list[int]:
        """Wait for the answer to a command."""
        assert self._process.stdout is not None
        word, *numbers = self._process.stdout.readline().split() or ["nothing"]
        if word != "ok":
            raise RuntimeError(f"the traffic process says {word} {' '.join(numbers)}")
        return [int(number) for number in numbers]

    def do(self, *words: object) -> list[int]:
        """Give a command and wait for its answer."""
        self.start(*words)
        return self.finish()

    def peers(self, count: int) -> None:
        """Be so many peers."""
        if count != self._peers:
            self.do("peers", count)
            self._peers = count

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def floor() -> ctypes.CDLL | None:
    """The C loop that receives with recvmmsg and discards; None without a compiler."""
    library = compiled("floor.so", "-shared", "-fPIC")
    return None if library is None else ctypes.CDLL(str(library))


class _Peers:
    """traffic.c's commands in Python, for machines without a compiler."""

    def __init__(self) -> None:
        self.socks: list[socket.socket] = []
        self.connections: list[socket.socket] = []

    @staticmethod
    def _open(host: str, spi: int) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((host, 0))
        with contextlib.suppress(PermissionError):
            sock.setsockopt(socket.SOL_SOCKET, SO_MARK, spi.to_bytes(4, "big"))
        return sock

    def peers(self, count: int) -> None:
        for sock in self.socks:
            sock.close()
        self.socks = [self._open(peer_address(i), FIRST_SPI + i) for i in range(count)]

    def fill(self, port: int, size: int, count: int) -> None:
        data, to = b"x" * size, ("127.0.0.1", port)
        if len(self.socks) > 1:
            for index in range(count):
                self.socks[index % len(self.socks)].sendto(data, to)
            return
        # UDP_SEGMENT: one call, many datagrams.
        step = max(1, min(64, 65000 // size))
        told = [(socket.IPPROTO_UDP, 103, struct.pack("=H", size))]
        for start in range(0, count, step):
            self.socks[0].sendmsg([data * min(step, count - start)], told, 0, to)

    def pace(self, port: int, size: int, count: int, rate: int) -> None:
        data, to = b"x" * size, ("127.0.0.1", port)
        start = time.monotonic()
        for index in range(count):
            while time.monotonic() < start + index / rate:
                pass
            self.socks[index % len(self.socks)].sendto(data, to)

    def echo(self, port: int, size: int, count: int) -> str:
        data, to = b"x" * size, ("127.0.0.1", port)
        times: list[int] = []
        for index in range(count):
            sock = self.socks[index % len(self.socks)]
            sock.settimeout(2)
            start = time.monotonic_ns()
            sock.sendto(data, to)
            sock.recv(65536)
            times.append(time.monotonic_ns() - start)
        times.sort()
        return f"{times[count // 2]} {times[count * 99 // 100]}"

    def visit(self, port: int, first: int, count: int) -> None:
        for index in range(first, first + count):
            host = socket.inet_ntoa(((127 << 24 | 64 << 16) + index).to_bytes(4, "big"))
            with self._open(host, FIRST_SPI) as sock:
                sock.sendto(b"x" * 16, ("127.0.0.1", port))

    def connect(self, port: int, count: int) -> None:
        for _ in range(count):
            self.connections.append(socket.create_connection(("127.0.0.1", port)))

    def drop(self) -> None:
        for sock in self.connections:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
            sock.close()
        self.connections.clear()


def main() -> None:
    """Answer commands until there are no more."""
    peers = _Peers()
    for line in sys.stdin:
        verb, *numbers = line.split()
        answer = getattr(peers, verb)(*map(int, numbers))
        print("ok", answer or "", flush=True)


if __name__ == "__main__":
    main()
