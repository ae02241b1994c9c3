"""The examples on real IPsec, as somebody would start them."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hosts import Host, protect, refused

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PORT = 5000
PATIENCE = 60.0


@contextmanager
def serving(name: str) -> Iterator[Callable[[], str]]:
    """Run an example as a server; gives what reads its next line."""
    words = [sys.executable, str(EXAMPLES / name), "--port", str(PORT)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        late = threading.Timer(PATIENCE, server.kill)  # then there are no more lines
        late.start()
        try:
            assert server.stdout is not None
            yield server.stdout.readline
            server.send_signal(signal.SIGINT)  # to be killed leaves the sysctl as it is
            server.wait(PATIENCE)
        finally:
            late.cancel()
            server.kill()


def patient(client: socket.socket, bob: Host) -> socket.socket:
    client.settimeout(PATIENCE)
    client.connect((bob.v4, PORT))
    return client


def test_udp_echo(bob: Host, alice: Host, mallory: Host) -> None:
    pair = protect(alice, bob)
    with serving("01_udp_echo.py") as line:
        assert "echoing datagrams" in line()
        with patient(alice.udp(), bob) as client, patient(mallory.udp(), bob) as clear:
            for each in (client, clear):
                each.send(b"hello")
                assert each.recv(100) == b"hello"
            told = line()
            assert f"udp from {alice.v4} port" in told
            assert "PROTECTED, EXACT" in told
            assert f"0x{pair.spi(bob):08x}" in told
            assert f"udp from {mallory.v4} port {clear.getsockname()[1]}: CLEAR" in line()


def test_tcp_echo(bob: Host, alice: Host, mallory: Host) -> None:
    pair = protect(alice, bob)
    with serving("02_tcp_echo.py") as line:
        assert "echoing connections" in line()
        for host in (alice, mallory):
            with patient(host.tcp(), bob) as client:
                client.send(b"hello")
                assert client.recv(100) == b"hello"
        told = line()
        assert f"tcp from {alice.v4} port" in told
        assert "PROTECTED, EXACT" in told
        assert f"0x{pair.spi(bob):08x}" in told
        told = line()
        assert f"tcp from {mallory.v4} port" in told
        assert told.endswith(": CLEAR\n")


def test_refuse_clear(bob: Host, alice: Host, mallory: Host) -> None:
    """The policies tell what the kernel is to demand for it, so it refuses by itself."""
    protect(alice, bob)
    with serving("03_refuse_clear.py") as line:
        assert "serving at" in line()
        with mallory.udp() as clear:
            asyncio.run(refused(bob, lambda: clear.sendto(b"hello", (bob.v4, PORT))))
        with mallory.tcp() as clear:
            asyncio.run(refused(bob, lambda: clear.connect_ex((bob.v4, PORT))))
        with patient(alice.udp(), bob) as client:
            client.send(b"hello")
            assert client.recv(100) == b"you are safe here\n"
            assert f"udp from {alice.v4}: served, encrypted and authenticated by esp" in line()
        with patient(alice.tcp(), bob) as client:
            assert client.recv(100) == b"you are safe here\n"
            assert f"tcp from {alice.v4}: served, encrypted and authenticated by esp" in line()


def test_refuse_clear_where_no_policy_tells_how(bob: Host, alice: Host, mallory: Host) -> None:
    protect(alice, bob, policies=False).demand(alice)
    with serving("03_refuse_clear.py") as line:
        assert "serving at" in line()
        with mallory.udp() as clear:
            clear.sendto(b"hello", (bob.v4, PORT))
            assert f"udp from {mallory.v4}: refused, encrypted: this is NONE (clear)" in line()
        with patient(mallory.tcp(), bob) as clear, pytest.raises(ConnectionResetError):
            clear.recv(100)
        with alice.udp() as client:
            client.sendto(b"hello", (bob.v4, PORT))
            assert f"udp from {alice.v4}: served, encrypted and authenticated by esp" in line()
