"""What this machine's kernel does under inbound policies, against what the SPD in memory says.

Clear datagrams come over a veth, and the kernel drops what a policy wants protected: XFRM alone is
needed for that, no ESP.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from random import Random
from typing import Any

import pytest
import xfrm_messages as m

import ipsec_aio
from ipsec_aio.backends.xfrm import XfrmBackend
from ipsec_aio.enums import Assurance, Direction, PolicyAction
from ipsec_aio.flow import Flow, pack_address
from ipsec_aio.policy import Policy
from ipsec_aio.spd import SPD
from ipsec_aio.wire.netlink import attribute

HERE = {2: "192.0.2.1", 10: "2001:db8::1"}
THERE = {2: ("192.0.2.2", "192.0.2.3"), 10: ("2001:db8::2", "2001:db8::3")}
PORTS = (4000, 4001)
SETUP = """
link set lo up
link add v0 type veth peer name v1 netns {peer}
addr add 192.0.2.1/24 dev v0
addr add 2001:db8::1/64 dev v0 nodad
link set v0 address 02:00:00:00:00:01
link set v0 up
"""
# Permanent neighbours: random policies block the search for them, too.
PEER_SETUP = """
addr add 192.0.2.2/24 dev v1
addr add 192.0.2.3/24 dev v1
addr add 2001:db8::2/64 dev v1 nodad
addr add 2001:db8::3/64 dev v1 nodad
link set v1 address 02:00:00:00:00:02
link set v1 up
neigh add 192.0.2.1 lladdr 02:00:00:00:00:01 dev v1 nud permanent
neigh add 2001:db8::1 lladdr 02:00:00:00:00:01 dev v1 nud permanent
"""


class Kernel:
    """Sets policies of the namespace, and has sockets here and at the other end of a veth."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 6)
        self.opened: list[socket.socket] = [self._sock]
        self.there: dict[tuple[str, int], socket.socket] = {}

    def ask(self, kind: int, payload: bytes, flags: int = 0) -> None:
        self._sock.send(m.message(kind, payload, flags=5 | flags))
        (error,) = struct.unpack_from("=i", self._sock.recv(65536), 16)
        if error:
            raise OSError(-error, os.strerror(-error))

    def block(self, blocked: bool) -> None:
        """Set the default action for what comes in."""
        self.ask(m.SETDEFAULT, bytes([1 + (not blocked), 2, 2, 0]))

    def flush(self) -> None:
        self.ask(m.FLUSHPOLICY, b"")

    def bind(self, address: str, port: int, kind: int = socket.SOCK_DGRAM) -> socket.socket:
        """Bind a socket in the namespace that this thread is in."""
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
        sock.setblocking(False)
        sock.bind((address, port))
        self.opened.append(sock)
        return sock


def ip(lines: str) -> None:
    done = subprocess.run(
        ["ip", "-batch", "-"], input=lines.encode(), capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no veth here: {done.stderr.decode()}")


@pytest.fixture
def kernel(elsewhere: Any) -> Iterator[Kernel]:
    try:
        made = Kernel()
        made.flush()
    except OSError as error:
        pytest.skip(f"no XFRM here: {error}")
    ip(SETUP.format(peer=elsewhere.path))
    with elsewhere:
        ip(PEER_SETUP)
        for address in (*THERE[2], *THERE[10]):
            for port in PORTS:
                made.there[address, port] = made.bind(address, port)
    yield made
    for sock in made.opened:
        sock.close()


# Random policies


def drawn(rnd: Random, family: int) -> bytes:
    """Build the request for a policy, and now and then for one that was there before."""
    size = 8 * len(pack_address(HERE[family]))
    ends = []
    for addresses in (THERE[family], (HERE[family],)):
        prefix = rnd.choice([0, size - 8, size - 1, size, size])
        ends.append((pack_address(rnd.choice(addresses)) if prefix else bytes(size // 8), prefix))
    (source, source_prefix), (destination, destination_prefix) = ends
    sel = m.selector(
        source,
        destination,
        family=family,
        source_prefix=source_prefix,
        destination_prefix=destination_prefix,
        ports=(
            *rnd.choice([(0, 0), (0, 0), (5000, 0xFFFF), (5001, 1), (5000, 1)]),
            *rnd.choice([(0, 0), (0, 0), (4000, 0xFFFF), (1, 1), (4002, 3)]),
        ),
        proto=rnd.choice([0, 0, 17, 17, 6]),
    )
    payload = m.policy_info(sel, priority=rnd.randint(0, 5), index=0, action=rnd.choice([0, 0, 1]))
    if not payload[-7] and rnd.random() < 0.5:
        payload += attribute(5, m.template(family=family, optional=rnd.choice([0, 0, 1])))
    if rnd.random() < 0.3:
        # The last two fit nothing, not even a packet whose mark is 0.
        payload += m.mark(*rnd.choice([(0, 0xFF), (5, 0xFF), (5, 0), (0x100, 0xFF)]))
    if rnd.random() < 0.1:
        payload += m.if_id(7)
    return payload


def passes(policy: Policy | None, default: PolicyAction) -> bool:
    if policy is None:
        return default is PolicyAction.ALLOW
    return policy.action is PolicyAction.ALLOW and not policy.protects


def received(sock: socket.socket) -> set[bytes]:
    found = set()
    with suppress(BlockingIOError):
        while True:
            found.add(sock.recv(100))
    return found


@pytest.mark.parametrize("seed", range(3))
async def test_a_look_up_says_what_the_kernel_does(kernel: Kernel, seed: int) -> None:
    rnd = Random(seed)
    servers = {
        (family, port): kernel.bind(HERE[family], port) for family in HERE for port in (5000, 5001)
    }
    backend = XfrmBackend(stamp="off")
    await backend.start()
    checked = dropped = 0
    for _ in range(12):
        kernel.flush()
        for _ in range(rnd.randint(1, 8)):
            with suppress(FileExistsError):
                kind = rnd.choice([m.NEWPOLICY, m.UPDPOLICY])
                kernel.ask(kind, drawn(rnd, rnd.choice([2, 2, 10])))
        kernel.block(rnd.random() < 0.3)
        backend.drain()
        mirror = backend.mirror
        for (family, port), server in servers.items():
            expected, uncertain = set(), set()
            for (address, source_port), client in kernel.there.items():
                if address not in THERE[family]:
                    continue
                tag = f"{address} {source_port}".encode()
                ends = (pack_address(address), pack_address(HERE[family]))
                flow = Flow(*ends, 17, source_port, port)
                first = mirror.policy(flow, Direction.IN)
                if passes(first, mirror.defaults.inbound):
                    expected.add(tag)
                ties = mirror.spd.ties(flow, Direction.IN)
                if any(len({passes(p, PolicyAction.ALLOW) for p in group}) > 1 for group in ties):
                    uncertain.add(tag)
                client.sendto(tag, (HERE[family], port))
                checked += 1
            found: set[bytes] = set()
            end = time.monotonic() + 1
            while not found >= expected - uncertain and time.monotonic() < end:
                found |= received(server)
            assert found - uncertain == expected - uncertain, list(mirror.spd)
            dropped += len(kernel.there) // 2 - len(found)
    await backend.aclose()
    assert checked == 12 * 16
    assert 20 < dropped < checked - 20, "it tells nothing where all are alike"


@pytest.mark.parametrize(("device", "arrives"), [("v0", True), ("lo", False), ("", False)])
def test_an_interface_is_compared_with_the_route_s(
    kernel: Kernel, device: str, arrives: bool
) -> None:
    """What is delivered here is routed to lo, whatever it came in by: so nobody can tell."""
    server = kernel.bind(HERE[2], 5000)
    index = socket.if_nametoindex(device) if device else 0
    payload = m.policy_info(m.selector(family=2, ifindex=index))
    kernel.ask(m.NEWPOLICY, payload + attribute(5, m.template()))
    kernel.there[THERE[2][0], 4000].sendto(b"clear", (HERE[2], 5000))
    assert (received(server) == {b"clear"}) is arrives


# What waits in queues


class Sink(ipsec_aio.DatagramProtocol):
    def __init__(self) -> None:
        self.told: list[Assurance] = []

    def datagram_received(self, data: bytes, addr: Any, ptoken: ipsec_aio.PToken) -> None:
        self.told.append(ptoken.assurance)


PROTECT = m.policy_info(m.selector(family=2), priority=20) + attribute(5, m.template())
BYPASS = m.selector(family=2, proto=17)


def add(kernel: Kernel) -> None:
    kernel.ask(m.NEWPOLICY, PROTECT)


def bypass_goes(kernel: Kernel) -> None:
    kernel.ask(m.DELPOLICY, m.policy_id(BYPASS))


@pytest.mark.parametrize("change", [add, bypass_goes])
@pytest.mark.parametrize("guards", [True, False], ids=["guarded", "unguarded"])
async def test_what_was_queued_before_a_policy(
    kernel: Kernel,
    change: Callable[[Kernel], None],
    guards: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Clear datagrams, and a policy that lets in none such, but did not when they came."""
    if not guards:
        monkeypatch.setattr(SPD, "stood", lambda *_: True)
    if change is bypass_goes:
        add(kernel)
        kernel.ask(m.NEWPOLICY, m.policy_info(BYPASS, priority=10))
    async with ipsec_aio.open_backend("xfrm", stamp="off", trust_policy=True) as backend:
        transport, sink = await ipsec_aio.create_datagram_endpoint(
            Sink, (HERE[2], 5000), backend=backend
        )
        client = kernel.there[THERE[2][0], 4000]
        for _ in range(150):
            client.sendto(b"clear", (HERE[2], 5000))
        change(kernel)
        client.sendto(b"dropped", (HERE[2], 5000))
        await until(lambda: len(sink.told) == 150)
        expected = Assurance.UNKNOWN if guards else Assurance.POLICY
        assert set(sink.told) == {expected}
        transport.close()


@pytest.mark.parametrize("guards", [True, False], ids=["guarded", "unguarded"])
async def test_who_waited_to_be_accepted_before_a_policy(
    kernel: Kernel, elsewhere: Any, guards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not guards:
        monkeypatch.setattr(SPD, "stood", lambda *_: True)
    tokens: list[ipsec_aio.PToken] = []

    class Noting(ipsec_aio.Protocol):
        def connection_made(self, transport: Any, ptoken: ipsec_aio.PToken) -> None:
            tokens.append(ptoken)
            transport.abort()

    async with ipsec_aio.open_backend("xfrm", stamp="off", trust_policy=True) as backend:
        server = await ipsec_aio.create_server(Noting, HERE[2], 5000, backend=backend)
        with elsewhere:
            client = kernel.bind(THERE[2][0], 0, socket.SOCK_STREAM)
        assert client.connect_ex((HERE[2], 5000)) in (0, errno.EINPROGRESS)
        # The handshake is done by the time that connect() returns, and nobody has accepted it.
        assert client.connect_ex((HERE[2], 5000)) == 0
        add(kernel)
        await until(lambda: tokens)
        assert tokens[0].assurance is (Assurance.UNKNOWN if guards else Assurance.POLICY)
        server.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)
