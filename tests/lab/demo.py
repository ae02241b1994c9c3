"""The demonstration: two hosts, keyed by strongSwan, a clear one next door, and the echo servers.

It runs in the lab (``make demo``), shows what the servers say of each peer, and holds it against
what the kernel and strongSwan say. Its exit status is 0 only if all of that agrees.
"""

from __future__ import annotations

import os
import re
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import NoReturn

from charon import Charon, connect
from hosts import Host, Network

from ipsec_aio.__main__ import main as ipsec_aio
from ipsec_aio.cli.transcript import Transcript

PROJECT = Path(__file__).resolve().parents[2]
PORT = 5000
PATIENCE = 60.0
LIMIT = 120
"""Seconds that all of it may take, the start of a virtual machine included."""


class Program:
    """A Python program on a host, and the lines that it prints.

    It is a fork: Python and the package are loaded already, which takes seconds in the machine.
    """

    def __init__(self, script: Transcript, host: Host, program: Callable[[], object]) -> None:
        self._script = script
        sys.stdout.flush()
        out, into = os.pipe()
        with host:
            self._pid = os.fork()
            if self._pid == 0:
                os.dup2(into, 1)
                os.close(out)
                _become(program)
        os.close(into)
        self._out = os.fdopen(out)

    def line(self, who: str) -> str:
        """Wait for its next line, and show it; an empty one when it has ended."""
        line = self._out.readline().rstrip()
        if line:
            self._script.say(who, line)
        return line

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGTERM)
        os.waitpid(self._pid, 0)
        self._out.close()


def _become(program: Callable[[], object]) -> NoReturn:
    code = 1
    try:
        code = int(program() or 0)  # type: ignore[call-overload]
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def example(name: str) -> Callable[[], object]:
    """An example as a program."""
    sys_argv = [str(PROJECT / "examples" / name), "--port", str(PORT)]

    def program() -> None:
        sys.argv = sys_argv
        runpy.run_path(sys_argv[0], run_name="__main__")

    return program


def main() -> int:
    begin = float(os.environ.get("LAB_BEGAN") or time.time())
    script = Transcript(sys.stdout)
    script.title("An asyncio server that knows what IPsec did: real ESP, keyed by real strongSwan")
    with ExitStack() as stack:
        network = stack.enter_context(closing(Network()))
        bob, alice, mallory = (network.hosts[n] for n in ("bob", "alice", "mallory"))
        script.step("the hosts")
        script.say("bob", f"{bob.v4} runs examples/01_udp_echo.py and 02_tcp_echo.py")
        script.say("alice", f"{alice.v4} has an IKEv2 connection with bob, by a shared secret")
        script.say("mallory", f"{mallory.v4} has no IPsec at all")
        ours, theirs = Charon(bob), Charon(alice)
        for charon in (ours, theirs):
            charon.start()

        script.step("the stamp on bob, and the servers")
        install = "stamp install --port udp/5000 --port tcp/5000"
        script.say("bob", f"$ ipsec-aio {install}")
        with closing(Program(script, bob, lambda: ipsec_aio(install.split()))) as stamp:
            while stamp.line(""):
                pass
        udp, tcp = (
            stack.enter_context(closing(Program(script, bob, example(name))))
            for name in ("01_udp_echo.py", "02_tcp_echo.py")
        )
        for server in (udp, tcp):
            if not server.line("server"):
                raise SystemExit("a server did not start")

        script.step("strongSwan on both hosts")
        for charon in (ours, theirs):
            stack.enter_context(charon)
        connect(ours, theirs)
        for charon in (ours, theirs):
            script.say(charon.host.name, "charon is up, trap policies are installed")
        Demonstration(script, udp, tcp, ours, theirs, mallory).run()
    script.step("what it took")
    took = time.time() - begin
    script.check(f"under two minutes: {took:.0f} s", holds=took < LIMIT)
    return script.end()


class Demonstration:
    """What is done and what must be seen."""

    def __init__(
        self,
        script: Transcript,
        udp: Program,
        tcp: Program,
        ours: Charon,
        theirs: Charon,
        mallory: Host,
    ) -> None:
        self.script, self.udp, self.tcp = script, udp, tcp
        self.ours, self.theirs = ours, theirs
        self.bob, self.alice, self.mallory = ours.host, theirs.host, mallory

    def run(self) -> None:
        script = self.script
        script.step("alice sends a datagram: it meets the trap policy, and IKE begins")
        line = self.datagram(self.alice)
        first = self.protected("alice's datagram", line)

        script.step("alice connects")
        self.protected("alice's connection", self.connection(self.alice))

        script.step("mallory does the same, in clear")
        self.clear("mallory's datagram", self.datagram(self.mallory))
        self.clear("mallory's connection", self.connection(self.mallory))

        script.step("strongSwan rekeys in mid-stream")
        self.theirs.rekey()
        second = self.protected("alice's next datagram", self.datagram(self.alice))
        script.check("it is another SA", holds=first != second)

    def datagram(self, host: Host) -> str:
        """Send datagrams until one is echoed; returns the line that the server printed of it."""
        with host.udp() as client:
            client.settimeout(1)
            waits = False
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end:
                client.sendto(b"hello", (self.bob.v4, PORT))
                try:
                    client.recv(100)
                except TimeoutError:
                    if not waits:
                        self.script.say(host.name, "no answer, IKE negotiates: she sends again")
                    waits = True
                    continue
                return self.udp.line("server")
        logs = (f"{c.identity}\n{c.log}" for c in (self.ours, self.theirs))
        raise SystemExit("\n".join(("no answer. strongSwan says:", *logs)))

    def connection(self, host: Host) -> str:
        """Connect and wait for the echo; returns the line that the server printed of it."""
        with host.tcp() as client:
            client.settimeout(PATIENCE)
            client.connect((self.bob.v4, PORT))
            client.sendall(b"hello")
            client.recv(100)
            return self.tcp.line("server")

    def protected(self, what: str, line: str) -> int:
        """Check that the server called it protected, by an SA that both others know."""
        found = re.search(r"PROTECTED, EXACT, by esp/transport spi 0x([0-9a-f]{8})", line)
        self.script.check(f"{what} is PROTECTED, and known to be (EXACT)", holds=found is not None)
        if found is None:
            return 0
        spi = int(found[1], 16)
        kernel = self.bob.show("ip", "xfrm", "state")
        self.script.check(
            f"`ip xfrm state` has that SA, from {self.alice.v4} to {self.bob.v4}: spi {spi:#010x}",
            holds=re.search(
                rf"src {self.alice.v4} dst {self.bob.v4}\s+proto esp spi {spi:#010x} ", kernel
            )
            is not None,
        )
        self.script.check(
            "and so has strongSwan (`swanctl --list-sas`)", holds=spi in self.ours.spis()
        )
        return spi

    def clear(self, what: str, line: str) -> None:
        """Check that the server called it clear."""
        self.script.check(f"{what} is seen to be CLEAR", holds=line.endswith(": CLEAR"))


if __name__ == "__main__":
    sys.exit(main())
