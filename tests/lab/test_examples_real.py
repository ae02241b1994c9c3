"""An example on real IPsec; ``make demo`` shows the others."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import Host, protect

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PORT = 5000
PATIENCE = 60.0


@pytest.fixture
def refusing(bob: Host) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, str(EXAMPLES / "03_refuse_clear.py"), "--port", str(PORT)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server
            server.send_signal(signal.SIGINT)  # to be killed leaves the sysctl as it is
            server.wait(PATIENCE)
        finally:
            server.kill()


def test_refuse_clear(
    bob: Host, alice: Host, mallory: Host, refusing: subprocess.Popen[str]
) -> None:
    def line() -> str:
        assert refusing.stdout is not None
        return refusing.stdout.readline()

    protect(alice, bob)
    assert "serving at" in line()
    with alice.udp() as client:
        client.settimeout(PATIENCE)
        client.sendto(b"hello", (bob.v4, PORT))
        assert client.recv(100) == b"you are safe here\n"
        assert f"udp from {alice.v4}: served, encrypted and authenticated by esp" in line()
    with mallory.udp() as client:
        client.sendto(b"hello", (bob.v4, PORT))
        assert f"udp from {mallory.v4}: refused, encrypted: this is NONE (clear)" in line()
    with alice.tcp() as client:
        client.settimeout(PATIENCE)
        client.connect((bob.v4, PORT))
        assert client.recv(100) == b"you are safe here\n"
        assert f"tcp from {alice.v4}: served, encrypted and authenticated by esp" in line()
    with mallory.tcp() as client:
        client.settimeout(PATIENCE)
        client.connect((bob.v4, PORT))
        with pytest.raises(ConnectionResetError):
            client.recv(100)
