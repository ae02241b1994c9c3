"""The examples, run as a reader would run them, on the memory backend."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

import ipsec_aio

PROJECT = Path(__file__).parents[2]
EXAMPLES = sorted((PROJECT / "examples").glob("*.py"))
BACKEND = f"memory:{PROJECT / 'examples/peers.toml'}"
ALICE, MALLORY, CAROL = "127.0.0.2", "127.0.0.3", "127.0.0.4"


class Example:
    """A running example: its lines as they come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        found = re.search(r"\('127\.0\.0\.1', (\d+)\)", self.line())
        assert found
        self.address = ("127.0.0.1", int(found[1]))

    def line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def ask(self, source: str) -> bytes:
        with self.tell(source) as client:
            return client.recv(100)

    def tell(self, source: str) -> closing[socket.socket]:
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        client.settimeout(10)
        client.bind((source, 0))
        client.sendto(b"hello", self.address)
        return closing(client)

    def call(self, source: str) -> bytes:
        with socket.create_connection(self.address, 10, (source, 0)) as client:
            client.sendall(b"hello")
            return client.recv(100)


@contextmanager
def running(name: str, *given: str) -> Iterator[Example]:
    words = [*given, "--host", "127.0.0.1", "--port", "0", "--backend", BACKEND]
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-X", "dev", str(PROJECT / "examples" / name), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONASYNCIODEBUG": "0"},
    ) as process:
        try:
            yield Example(process)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=10)
        finally:
            process.kill()
    assert process.returncode == 0
    assert not re.search("Traceback|Warning", errors), errors


def test_udp_echo() -> None:
    with running("01_udp_echo.py") as example:
        assert example.ask(ALICE) == b"hello"
        assert "from 127.0.0.2" in (line := example.line())
        assert "PROTECTED, EXACT, by esp/transport spi 0x00001001" in line
        assert example.ask(MALLORY) == b"hello"
        assert re.search(r"from 127\.0\.0\.3 port \d+: CLEAR$", example.line())


def test_tcp_echo() -> None:
    with running("02_tcp_echo.py") as example:
        assert example.call(ALICE) == b"hello"
        assert "PROTECTED, EXACT, by esp/transport spi 0x00001001" in example.line()
        assert example.call(MALLORY) == b"hello"
        assert re.search(r"from 127\.0\.0\.3 port \d+: CLEAR$", example.line())


def test_refuse_clear() -> None:
    with running("03_refuse_clear.py") as example:
        assert example.ask(ALICE) == b"you are safe here\n"
        assert "127.0.0.2: served, encrypted and authenticated by esp" in example.line()
        assert example.call(ALICE) == b"you are safe here\n"
        assert "tcp from 127.0.0.2: served" in example.line()
        with pytest.raises(ConnectionResetError):
            example.call(MALLORY)
        with example.tell(MALLORY):
            assert "127.0.0.3: refused, encrypted: this is NONE (clear)" in example.line()


def test_allow_list() -> None:
    with running("04_allow_list.py", "*.example.org", "dora.example.net") as example:
        assert example.ask(ALICE) == b"welcome, alice.example.org\n"
        assert "127.0.0.2: served, alice.example.org" in example.line()
        with example.tell(CAROL):
            assert "127.0.0.4: refused, peer" in example.line()
        with example.tell(MALLORY):
            assert "127.0.0.3: refused, encrypted: this is NONE (clear)" in example.line()


def test_latched_tcp() -> None:
    with running("05_latched_tcp.py") as example:
        assert example.call(ALICE) == b"hello"
        line = example.line()
        assert "127.0.0.2: latched to alice.example.org, held by the user, encrypted" in line
        assert example.line() == "tcp from 127.0.0.2: gone\n"
        with pytest.raises(ConnectionResetError):
            example.call(MALLORY)


async def test_latched_tcp_breaks_and_is_restored(capsys: pytest.CaptureFixture[str]) -> None:
    """The same protocol, beside tables that change."""
    example = runpy.run_path(str(PROJECT / "examples/05_latched_tcp.py"))
    backend = ipsec_aio.MemoryBackend.from_toml(PROJECT / "examples/peers.toml")
    sa = next(sa for sa in backend.mirror.sas() if sa.reqid == 1)
    server = await ipsec_aio.create_server(
        example["Service"], "127.0.0.1", 0, backend=backend, latch=example["LATCH"]
    )
    address = server.sockets[0].getsockname()
    reader, writer = await asyncio.open_connection(*address, local_addr=(ALICE, 0))
    writer.write(b"one")
    assert await reader.readexactly(3) == b"one"
    backend.delete_sa(sa)
    await asyncio.sleep(0)
    writer.write(b"two")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(3), 0.05)
    backend.rekey(sa, peer="alice.example.org")
    assert await reader.readexactly(3) == b"two"
    writer.close()
    await writer.wait_closed()
    server.close()
    said = [line.split(": ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert said[1:3] == ["BROKEN by LOST: nothing is read or written", "restored"]


def test_pinned_reply() -> None:
    with running("06_pinned_reply.py") as example:
        assert example.ask(ALICE) == b"the answer to hello"
        assert "127.0.0.2: answered, encrypted and authenticated by esp" in example.line()
        with example.tell(MALLORY):
            assert "127.0.0.3: not answered: the token is not protected" in example.line()


def test_examples_are_short_and_use_public_names_only() -> None:
    assert [path.name for path in EXAMPLES] == [
        "01_udp_echo.py",
        "02_tcp_echo.py",
        "03_refuse_clear.py",
        "04_allow_list.py",
        "05_latched_tcp.py",
        "06_pinned_reply.py",
    ]
    for path in EXAMPLES:
        text = path.read_text()
        assert len(text.splitlines()) < 60, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                assert node.module in ("__future__", "ipsec_aio"), path.name


def test_the_readme_shows_a_program_of_public_names() -> None:
    found = re.search(r"```python\n(.*?)```", (PROJECT / "README.md").read_text(), re.DOTALL)
    assert found
    used = {
        node.attr
        for node in ast.walk(ast.parse(found[1]))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "ipsec_aio"
    }
    assert used
    assert used <= set(ipsec_aio.__all__)


def test_links_of_the_documents_lead_somewhere() -> None:
    for path in (*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path.name}: {target}"
