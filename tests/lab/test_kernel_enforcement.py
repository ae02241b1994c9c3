"""Requirements that the kernel enforces, on real IPsec: what never reaches Python, or the wire."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hosts import GCM, MODES, NULL, PATIENCE, Host, eventually, lenient, protect, sniffing
from lies import lasting_stamp
from packets import half_forged

import ipsec_aio
from ipsec_aio import Assurance, ProtectionError, Require
from ipsec_aio.backends.tables import TableBackend
from ipsec_aio.enums import Direction
from ipsec_aio.flow import Selector
from ipsec_aio.kernel import stamp_table
from ipsec_aio.kernel.sockopts import clear_policies, set_policy
from ipsec_aio.net import connect, enforce, witness
from ipsec_aio.policy import Policy, Template
from ipsec_aio.truth import TruthTable
from ipsec_aio.wire.sockpolicy import encode

PORT = 5000
ENCRYPTED = Require(encrypted=True)
SILENCE = 1.0
"""Seconds in which nothing must come."""
FLOOD, BURSTS = 200_000, 5
PACE = 100
"""Protected datagrams in a second: about half of what an emulated receiver could take."""
QUIET = 4.0
"""Seconds without the flood, before each of its bursts."""

_SO_RCVBUFFORCE, _XFRMNLGRP_ACQUIRE = 33, 1


class Sink(ipsec_aio.DatagramProtocol):
    def __init__(self) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()

    def datagram_received(self, data, addr, ptoken):
        self.queue.put_nowait((data, addr[0], ptoken))

    async def next(self, data: bytes, peer: str) -> ipsec_aio.PToken:
        """Return the token of the next datagram, which must be this one."""
        async with asyncio.timeout(PATIENCE):
            found = await self.queue.get()
        assert found[:2] == (data, peer)
        return found[2]


class Peer(ipsec_aio.Protocol):
    def __init__(self) -> None:
        self.made = asyncio.get_running_loop().create_future()
        self.lost = asyncio.get_running_loop().create_future()
        self.received = b""

    def connection_made(self, transport, ptoken):
        self.transport = transport
        self.made.set_result(ptoken)

    def data_received(self, data):
        self.received += data

    def connection_lost(self, exc):
        self.lost.set_result(exc)


@asynccontextmanager
async def opened(stamp: str = "off", **options: Any) -> AsyncIterator[Any]:
    async with ipsec_aio.open_backend("xfrm", stamp=stamp, **options) as backend:
        yield backend


@asynccontextmanager
async def receiving(
    address: Any, stamp: str = "off", require: Require | None = ENCRYPTED, **options: Any
) -> AsyncIterator[tuple[Any, Sink]]:
    where = {"local_addr": address} if isinstance(address, tuple) else {"sock": address}
    async with opened(stamp) as backend:
        transport, sink = await ipsec_aio.create_datagram_endpoint(
            Sink, backend=backend, require=require, **where, **options
        )
        with closing(transport):
            yield transport, sink


@asynccontextmanager
async def serving(
    address: Any, stamp: str = "off", require: Require | None = ENCRYPTED, **options: Any
) -> AsyncIterator[tuple[Any, list[Peer]]]:
    peers: list[Peer] = []

    def factory() -> Peer:
        peers.append(Peer())
        return peers[-1]

    where = {"sock": address}
    if isinstance(address, tuple):
        where = {"host": address[0], "port": address[1]}
    async with (
        opened(stamp) as backend,
        await ipsec_aio.create_server(
            factory, backend=backend, require=require, **where, **options
        ) as server,
    ):
        yield server, peers
        for peer in peers:
            peer.transport.abort()


# A flood


SENDER = """
import socket, sys, time
host, port, count, pace, name = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.connect((host, port))
for line in sys.stdin:
    begun = time.monotonic()
    times = []
    for number in range(count):
        while pace and time.monotonic() < begun + number / pace:
            time.sleep(0.001)
        sent = b"%f" % time.monotonic()
        if pace:
            times.append(sent.decode())
        try:
            sock.send(b"%s %d %s" % (name.encode(), number, sent))
        except OSError:
            pass
    print(begun, time.monotonic(), *times, flush=True)
"""


@contextmanager
def sender(host: Host, to: str, count: int, pace: int, name: str) -> Iterator[Any]:
    """A process of its own that sends so many each time that it is told to."""
    words = [sys.executable, "-c", SENDER, to, str(PORT), str(count), str(pace), name]
    with host:
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def go(process: Any) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


async def done(process: Any) -> tuple[float, float, list[float]]:
    """Wait for it; when it began and ended, and when it sent what was sent at a pace."""
    line = await asyncio.to_thread(process.stdout.readline)
    begun, ended, *times = map(float, line.split())
    return begun, ended, times


class Counting(ipsec_aio.DatagramProtocol):
    def __init__(self) -> None:
        self.arrived: list[tuple[bytes, float, float]] = []
        self.assurances: Counter[Assurance] = Counter()

    def datagram_received(self, data, addr, ptoken):
        name, _, sent = data.split()
        self.arrived.append((name, float(sent), time.monotonic()))
        self.assurances[ptoken.assurance] += 1


@dataclass
class Tally:
    """Of protected datagrams, with and without a flood beside them.

    ``beside`` are those that were sent, and received, of what was sent while the flood lasted.
    """

    sent: int = 0
    received: int = 0
    beside: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    cpu: float = 0.0
    late: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.received / self.seconds


@pytest.mark.parametrize("choice", ["kernel", "user"])
async def test_a_clear_flood(
    bob: Host, alice: Host, mallory: Host, choice: str, record_property: Callable[..., None]
) -> None:
    """200,000 clear datagrams beside protected ones, in bursts between quiet times.

    The protected ones come at a pace, from a process of their own, and say when they were sent, so
    those that were sent within a burst say how much of them it takes; ``cpu`` what it costs the
    receiving process.
    """
    protect(alice, bob)
    bursts = 1 if choice == "user" else BURSTS
    # User space takes nothing without the stamp.
    async with opened("off" if choice == "kernel" else "install") as backend:
        transport, counting = await ipsec_aio.create_datagram_endpoint(
            Counting,
            local_addr=(bob.v4, PORT),
            backend=backend,
            require=ENCRYPTED,
            enforce=choice,
        )
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 21)
        tallies = {"quiet": Tally(), "flood": Tally()}
        count = FLOOD // BURSTS
        with (
            closing(transport),
            sender(mallory, bob.v4, count, 0, "clear") as flooding,
            sender(alice, bob.v4, int(PACE * QUIET), PACE, "good") as good,
        ):
            for _ in range(bursts):
                for kind, tally in tallies.items():
                    before, cpu = len(counting.arrived), time.process_time()
                    go(good)
                    first = last = 0.0
                    if kind == "flood":
                        go(flooding)
                    begun, ended, times = await done(good)
                    tally.cpu += time.process_time() - cpu
                    if kind == "flood":
                        first, last, _ = await done(flooding)
                        # Else the flood would have been elsewhere.
                        assert min(last, ended) - max(first, begun) > 0.25 * (ended - begun)
                    await asyncio.sleep(0.2)
                    arrived = counting.arrived[before:]
                    tally.sent += len(times)
                    tally.beside = (
                        tally.beside[0] + sum(first <= sent <= last for sent in times),
                        tally.beside[1] + sum(first <= sent <= last for _, sent, _ in arrived),
                    )
                    tally.received += len(arrived)
                    tally.seconds += ended - begun
                    tally.late += [got - sent for _, sent, got in arrived]
            stats = transport.ipsec_stats
        for kind, tally in tallies.items():
            late = sorted(tally.late)
            text = (
                f"{choice} {kind}: {tally.received} of {tally.sent} received, "
                f"{tally.rate:.1f}/s, beside it {tally.beside[1]} of {tally.beside[0]}, "
                f"cpu {tally.cpu / tally.seconds:.3f} s/s, "
                f"late median {late[len(late) // 2] * 1e3 if late else -1:.1f} ms"
            )
            record_property(kind, text)
            print(text)
        print(f"{choice}: {stats}")
    quiet, flood = tallies["quiet"], tallies["flood"]
    assert {name for name, _, _ in counting.arrived} <= {b"good"}
    if choice == "kernel":
        assert bob.statistics()["XfrmInTmplMismatch"] >= 0.99 * FLOOD
        assert stats.received == stats.protected == len(counting.arrived)
        assert stats.refused == 0, "nothing of it reached Python"
        assert set(counting.assurances) == {Assurance.ENFORCED}
        assert flood.received >= 0.9 * quiet.received
        assert flood.rate >= 0.9 * quiet.rate
        # What a flood takes while it lasts is not made up for by what comes after it.
        sent, received = flood.beside
        assert sent >= 0.25 * flood.sent
        assert received >= 0.9 * sent
    else:
        assert stats.refused > 1000, "without the kernel, it did"
        assert set(counting.assurances) == {Assurance.EXACT}


# What the kernel lets in, and what is said of it


@pytest.mark.parametrize("stamp", ["off", "install"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", [4, 6])
async def test_datagrams(
    bob: Host, alice: Host, mallory: Host, mode: str, family: int, stamp: str
) -> None:
    pair = protect(alice, bob, mode=mode, family=family)
    inner = mode == "tunnel"
    there = (bob.address(family, inner=inner), PORT)
    async with receiving(there, stamp) as (transport, sink):
        assert transport.get_extra_info("ipsec_enforced") == "kernel"
        with alice.udp(family=family, inner=inner) as client, mallory.udp(family=family) as clear:
            clear.sendto(b"clear", there)
            client.sendto(b"hello", there)
            ptoken = await sink.next(b"hello", pair.address(alice))
            assert ptoken.assurance is (Assurance.ENFORCED if stamp == "off" else Assurance.EXACT)
            assert ptoken.protected
            assert ptoken.privacy_protected is True
            assert [sa.spi for sa in ptoken.sas] == [pair.spi(bob)]
            clear.sendto(b"clear", there)
            client.sendto(b"again", there)
            await sink.next(b"again", pair.address(alice))
            assert transport.ipsec_stats.received == 2
            transport.sendto(b"answer", (pair.address(alice), client.getsockname()[1]))
            async with asyncio.timeout(PATIENCE):
                assert await asyncio.get_running_loop().sock_recv(client, 10) == b"answer"
    assert bob.statistics()["XfrmInTmplMismatch"] >= 2


@pytest.mark.parametrize("stamp", ["off", "install"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", [4, 6])
async def test_connections(
    bob: Host, alice: Host, mallory: Host, mode: str, family: int, stamp: str
) -> None:
    loop = asyncio.get_running_loop()
    pair = protect(alice, bob, mode=mode, family=family)
    inner = mode == "tunnel"
    there = (bob.address(family, inner=inner), PORT)
    async with serving(there, stamp) as (server, peers):
        assert server.enforcement == "kernel"
        with alice.tcp(family=family, inner=inner) as client, mallory.tcp(family=family) as clear:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(SILENCE):
                    await loop.sock_connect(clear, there)
            assert peers == []
            assert server.ipsec_stats.received == 0
            async with asyncio.timeout(PATIENCE):
                await loop.sock_connect(client, there)
                if inner and stamp == "off":
                    # Its segments may be put together of decrypted and clear fragments.
                    await eventually(lambda: server.ipsec_stats.refused == 1)
                    assert not peers.pop().made.done()
                    return
                await eventually(lambda: len(peers) == 1)
                ptoken = await peers[0].made
            assert ptoken.assurance is (Assurance.ENFORCED if stamp == "off" else Assurance.EXACT)
            assert ptoken.protected
            assert [sa.spi for sa in ptoken.sas] == [pair.spi(bob)]
            await loop.sock_sendall(client, b"x" * 100_000)
            await eventually(lambda: len(peers[0].received) == 100_000)
            pair.rekey()
            pair.retire()
            await loop.sock_sendall(client, b"y" * 1000)
            await eventually(lambda: len(peers[0].received) == 101_000)


async def test_enforced_says_no_more_than_the_weakest_sa_that_is_let_in(
    bob: Host, alice: Host
) -> None:
    """Without the stamp nobody knows which it was; a template does not look at ciphers."""
    protect(alice, bob, GCM)
    async with receiving((bob.v4, PORT), require=Require(integrity=True)) as (transport, sink):
        assert transport.get_extra_info("ipsec_enforced") == "kernel"
        protect(alice, bob, NULL, policies=False)
        with alice.udp() as client:
            client.sendto(b"hello", (bob.v4, PORT))
            ptoken = await sink.next(b"hello", alice.v4)
        assert ptoken.assurance is Assurance.ENFORCED
        assert ptoken.privacy_protected is False
        assert ptoken.integrity_protected is True


async def test_a_requirement_that_says_all_needs_no_policy(bob: Host, alice: Host) -> None:
    protect(alice, bob, policies=False).demand(alice)
    whole = Require(encrypted=True, mode="transport")
    async with receiving((bob.v4, PORT), require=whole, enforce="kernel") as (_, sink):
        with alice.udp() as client:
            client.sendto(b"hello", (bob.v4, PORT))
            assert (await sink.next(b"hello", alice.v4)).assurance is Assurance.ENFORCED


@pytest.mark.parametrize("v6only", [0, 1])
async def test_v4_mapped_traffic(bob: Host, alice: Host, mallory: Host, v6only: int) -> None:
    """No policy covers it on an IPv6 socket: the kernel enforces where it is kept out."""
    pair6 = protect(alice, bob, family=6)
    protect(alice, bob, family=4, reqid=2)
    with bob:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
    sock.bind(("::", PORT))
    async with receiving(sock, "install") as (transport, sink):
        place = transport.get_extra_info("ipsec_enforced")
        assert place == ("kernel" if v6only else "user")
        with alice.udp() as four, alice.udp(family=6) as six, mallory.udp() as clear:
            clear.sendto(b"clear", (bob.v4, PORT))
            four.sendto(b"four", (bob.v4, PORT))
            six.sendto(b"six", (bob.v6, PORT))
            if v6only:
                await sink.next(b"six", pair6.address(alice))
                assert transport.ipsec_stats.received == 1
            else:
                assert (await sink.next(b"four", f"::ffff:{alice.v4}")).protected
                await sink.next(b"six", pair6.address(alice))
                assert transport.ipsec_stats.refused == 1
    if not v6only:
        with pytest.raises(ValueError, match="V6ONLY"):
            async with receiving(("::", PORT), enforce="kernel"):
                pass


async def test_the_hole_that_v6only_closes(bob: Host, mallory: Host) -> None:
    with bob:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with sock, mallory.udp() as clear, mallory.udp(family=6) as clear6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.setblocking(False)
        set_policy(sock, encode(Policy(selector=Selector(family=10), templates=(Template(),))))
        sock.bind(("::", PORT))
        clear6.sendto(b"six", (bob.v6, PORT))
        clear.sendto(b"four", (bob.v4, PORT))
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(PATIENCE):
            assert await loop.sock_recv(sock, 10) == b"four"


async def test_policies_are_taken_away_again(bob: Host, mallory: Host) -> None:
    """Both directions at once; a socket that was lent is as it was."""
    with bob.udp(PORT) as sock, mallory.udp() as clear:
        async with opened() as backend:
            with pytest.raises(ZeroDivisionError):
                await ipsec_aio.create_datagram_endpoint(
                    lambda: 1 // 0,  # type: ignore[arg-type, return-value]
                    sock=sock,
                    backend=backend,
                    require=Require(encrypted=True, mode="transport"),
                    enforce="kernel",
                )
        clear.sendto(b"clear", (bob.v4, PORT))
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(PATIENCE):
            assert await loop.sock_recv(sock, 10) == b"clear"
        for direction in (0, 1):
            value = encode(
                Policy(
                    selector=Selector(family=2),
                    direction=Direction(direction),
                    templates=(Template(),),
                )
            )
            set_policy(sock, value)
        clear_policies(sock)
        clear.sendto(b"clear", (bob.v4, PORT))
        async with asyncio.timeout(PATIENCE):
            assert await loop.sock_recv(sock, 10) == b"clear"
        sock.sendto(b"out", clear.getsockname())
        async with asyncio.timeout(PATIENCE):
            assert await loop.sock_recv(clear, 10) == b"out"


# Lies


async def test_an_xfrm_interface_passes_socket_policies_by(bob: Host, alice: Host) -> None:
    """So nothing is ENFORCED where there is one."""
    protect(alice, bob)
    async with receiving((bob.v4, PORT), require=ENCRYPTED) as (transport, sink):
        with alice.udp() as client:
            client.sendto(b"before", (bob.v4, PORT))
            assert (await sink.next(b"before", alice.v4)).assurance is Assurance.ENFORCED
            bob.interface("ipsec7", 7)
            await eventually(lambda: _opaque(transport))
            client.sendto(b"after", (bob.v4, PORT))
            await eventually(lambda: transport.ipsec_stats.refused == 1)
    assert sink.queue.empty()


def _opaque(transport: Any) -> bool:
    backend = transport._witness._backend
    backend.drain()
    return bool(backend.resolver.opaque_interfaces)


@pytest.mark.parametrize("guarded", [False, True], ids=["unguarded", "guarded"])
async def test_another_sa_through_an_xfrm_interface(
    bob: Host, alice: Host, carol: Host, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """Its traffic is readable on the wire, and passes a policy by that demands another SA."""
    pair = protect(alice, bob, mode="tunnel")
    weak = protect(carol, bob, NULL, mode="tunnel", reqid=2, policies=False)
    bob.ip(*weak.states("delete"))
    weak.extra = "if_id 7"
    bob.ip(*weak.states("add"))
    demanded = f"tmpl src {carol.v4} dst {bob.v4} proto esp reqid 2 mode tunnel"
    bob.interface("ipsec7", 7)
    bob.ip(
        f"xfrm policy add src {alice.inner4} dst {bob.inner4} dir in if_id 7 priority 1 {demanded}"
    )
    carol.ip(
        f"addr add {alice.inner4}/32 dev lo",
        f"xfrm policy add src {alice.inner4} dst {bob.inner4} dir out {demanded}",
    )
    carol.after(lambda: carol.ip(f"addr del {alice.inner4}/32 dev lo"))
    if not guarded:
        opaque = property(lambda table: False, lambda table, value: None)
        monkeypatch.setattr(TruthTable, "opaque_interfaces", opaque, raising=False)
    async with receiving((bob.inner4, PORT), enforce="kernel") as (transport, sink):
        with carol:
            client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with client, alice.udp(inner=True) as honest:
            client.bind((alice.inner4, 4000))
            client.sendto(b"readable", (bob.inner4, PORT))
            if guarded:
                await eventually(lambda: transport.ipsec_stats.refused == 1)
            else:
                ptoken = await sink.next(b"readable", alice.inner4)
                assert ptoken.assurance is Assurance.ENFORCED
                assert ptoken.privacy_protected is True
                honest.sendto(b"honest", (bob.inner4, PORT))
                assert await sink.next(b"honest", alice.inner4) is ptoken
            assert sink.queue.empty()
    assert weak.packets(bob) == 1
    assert pair.packets(bob) == (not guarded)


@pytest.mark.parametrize("guarded", [False, True], ids=["unguarded", "guarded"])
async def test_one_peer_s_tunnel_does_not_speak_for_another(
    bob: Host, alice: Host, carol: Host, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """The SPD binds addresses to SAs; a policy that is open for two peers does not."""
    protect(carol, bob, mode="tunnel", reqid=2)
    pair = protect(alice, bob, mode="tunnel", reqid=1)
    alice.ip(
        f"addr add {carol.inner4}/32 dev lo",
        f"xfrm policy add src {carol.inner4} dst {bob.inner4} dir out "
        f"tmpl src {alice.v4} dst {bob.v4} proto esp reqid 1 mode tunnel",
    )
    alice.after(lambda: alice.ip(f"addr del {carol.inner4}/32 dev lo"))
    if not guarded:
        monkeypatch.setattr(TableBackend, "objection", lambda *_: "")
    async with receiving((bob.inner4, PORT), "install", enforce="kernel") as (transport, sink):
        with alice:
            client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with client, alice.udp(inner=True) as honest:
            client.bind((carol.inner4, 4000))
            client.sendto(b"forged", (bob.inner4, PORT))
            await eventually(lambda: pair.packets(bob) == 1)
            if guarded:
                await eventually(lambda: transport.ipsec_stats.refused == 1)
            else:
                assert (await sink.next(b"forged", carol.inner4)).protected
            honest.sendto(b"honest", (bob.inner4, PORT))
            ptoken = await sink.next(b"honest", alice.inner4)
            assert ptoken.assurance is Assurance.EXACT
    await asyncio.sleep(0)  # the transport's socket is closed
    with bob.udp(PORT, inner=True) as sock, alice:
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with client:
            client.bind((carol.inner4, 4000))
            client.sendto(b"forged", (bob.inner4, PORT))
            await eventually(lambda: pair.packets(bob) == 3)
            # With the SPD it does not, even in the kernel.
            with pytest.raises(BlockingIOError):
                sock.recv(10)


@pytest.mark.parametrize(
    ("stamp", "guarded"),
    [
        *((stamp, False) for stamp in ("off", "absent", "lost")),
        *((stamp, True) for stamp in ("off", "absent", "lost")),
    ],
)
@pytest.mark.parametrize("family", [4, 6])
async def test_a_tunnel_does_not_speak_for_fragments_in_clear(
    bob: Host,
    alice: Host,
    mallory: Host,
    monkeypatch: pytest.MonkeyPatch,
    family: int,
    stamp: str,
    guarded: bool,
) -> None:
    """The policy sees the first half's SA. Where the stamp does not drop such halves, the socket
    tells what was put together.
    """
    pair = protect(alice, bob, mode="tunnel", family=family)
    source, to = pair.address(alice), (pair.address(bob), PORT)
    (first, second), data = half_forged(source, to[0], (4000, PORT))
    if not guarded:
        read = witness.parse
        monkeypatch.setattr(witness, "parse", lambda told: replace(read(told), reassembled=False))
    stamps = lasting_stamp() if stamp == "lost" else contextlib.nullcontext()
    mode = "off" if stamp == "off" else "use"
    with stamps as netlink:
        async with receiving(to, mode, enforce="kernel") as (transport, sink):
            with alice.udp(family=family, inner=True) as client:
                if netlink is not None:
                    client.sendto(b"stamped", to)
                    assert (await sink.next(b"stamped", source)).assurance is Assurance.EXACT
                    stamp_table.remove(netlink)
                client.sendto(b"whole", to)
                whole = await sink.next(b"whole", source)
                assert whole.assurance is Assurance.ENFORCED
            count, received = pair.packets(bob), transport.ipsec_stats.received
            alice.send_packet(first, to[0])
            await eventually(lambda: pair.packets(bob) > count)
            mallory.inject(second, bob)
            await eventually(lambda: transport.ipsec_stats.received > received)
            if guarded:
                assert transport.ipsec_stats.refused == 1
                assert sink.queue.empty()
            else:
                assert await sink.next(data, source) is whole


async def test_peers_that_come_later_are_let_in(bob: Host, alice: Host, carol: Host) -> None:
    protect(alice, bob, reqid=1)
    async with receiving((bob.v4, PORT), "install") as (transport, sink):
        with alice.udp() as one, carol.udp() as two:
            one.sendto(b"one", (bob.v4, PORT))
            await sink.next(b"one", alice.v4)
            protect(carol, bob, reqid=2)
            await asyncio.sleep(2 * enforce.REFRESH)
            two.sendto(b"two", (bob.v4, PORT))
            assert (await sink.next(b"two", carol.v4)).assurance is Assurance.EXACT
            one.sendto(b"one", (bob.v4, PORT))
            await sink.next(b"one", alice.v4)
            assert transport.get_extra_info("ipsec_enforced") == "kernel"


# What leaves


@pytest.mark.parametrize("choice", ["auto", "user"])
async def test_without_a_policy_nothing_is_sent(bob: Host, alice: Host, choice: str) -> None:
    with sniffing(alice, PORT) as seen, alice.listener(PORT):
        async with opened() as backend:
            begun = time.monotonic()
            with pytest.raises(ProtectionError, match="no policy protects"):
                await ipsec_aio.open_connection(
                    alice.v4, PORT, backend=backend, require=ENCRYPTED, enforce=choice
                )
            assert time.monotonic() - begun < SILENCE
            await asyncio.sleep(0.2)
    assert seen == []


@contextmanager
def key_manager(host: Host) -> Iterator[socket.socket]:
    """Somebody who hears what the kernel wants to have negotiated, and does nothing."""
    with host:
        listening = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 6)
    with listening:
        listening.bind((0, 1 << (_XFRMNLGRP_ACQUIRE - 1)))
        listening.setblocking(False)
        yield listening


@pytest.mark.parametrize("managed", [False, True], ids=["nobody", "a deaf daemon"])
async def test_without_an_sa_nothing_is_sent(
    bob: Host, alice: Host, monkeypatch: pytest.MonkeyPatch, managed: bool
) -> None:
    protect(alice, bob)
    bob.flush_sas()
    monkeypatch.setattr(connect, "NEGOTIATION", 2.0)
    manager = key_manager(bob) if managed else contextlib.nullcontext()
    with sniffing(alice, PORT) as seen, alice.listener(PORT), manager as heard:
        async with opened() as backend:
            begun = time.monotonic()
            with pytest.raises(ProtectionError, match="negotiat") as caught:
                await ipsec_aio.open_connection(
                    alice.v4, PORT, backend=backend, require=ENCRYPTED, enforce="kernel"
                )
            took = time.monotonic() - begun
            if managed:
                assert heard.recv(4096)
                assert took >= 2.0
            else:
                assert "nobody" in str(caught.value)
                assert took < SILENCE
            await asyncio.sleep(0.2)
    assert seen == []


async def test_an_sa_that_is_negotiated_meanwhile(bob: Host, alice: Host) -> None:
    loop = asyncio.get_running_loop()
    pair = protect(alice, bob)
    bob.flush_sas()
    with sniffing(alice, PORT) as seen, alice.listener(PORT) as listener, key_manager(bob) as heard:
        async with opened() as backend:
            connecting = loop.create_task(
                ipsec_aio.create_connection(
                    Peer, alice.v4, PORT, backend=backend, require=ENCRYPTED, enforce="kernel"
                )
            )
            async with asyncio.timeout(PATIENCE):
                await loop.sock_recv(heard, 4096)
                await asyncio.sleep(0.5)
                assert not connecting.done()
                bob.ip(*pair.states("add"))
                far, _ = await loop.sock_accept(listener)
                transport, peer = await connecting
            with far:
                assert (await peer.made).assurance is Assurance.ENFORCED
            transport.abort()
    assert seen == []


async def test_datagrams_are_lost_while_nobody_has_an_sa(bob: Host, alice: Host) -> None:
    """Nothing spins, nothing leaves in the clear, and it goes on when there is one."""
    loop = asyncio.get_running_loop()
    pair = protect(alice, bob)
    bob.flush_sas()
    with alice.udp(PORT) as far:
        async with opened() as backend:
            transport, _ = await ipsec_aio.create_datagram_endpoint(
                Sink,
                local_addr=(bob.v4, PORT),
                remote_addr=(alice.v4, PORT),
                backend=backend,
                require=ENCRYPTED,
                enforce="kernel",
            )
            with closing(transport):
                assert transport.get_extra_info("peername") == (alice.v4, PORT)
                for _ in range(3):
                    transport.sendto(b"lost")
                await eventually(lambda: transport.get_write_buffer_size() == 0)
                bob.ip(*pair.states("add"))
                transport.sendto(b"found")
                async with asyncio.timeout(PATIENCE):
                    assert await loop.sock_recv(far, 10) == b"found"
                alice.flush_policies()
                with pytest.raises(BlockingIOError):
                    far.recv(10)


@pytest.mark.parametrize("choice", ["kernel", "user"])
async def test_when_all_policies_go_the_connection_does_not_go_on_in_clear(
    bob: Host, alice: Host, choice: str
) -> None:
    """As when somebody flushes them. Without a policy of its own it would, this test shows."""
    loop = asyncio.get_running_loop()
    protect(alice, bob)
    with sniffing(alice, PORT) as seen, alice.listener(PORT) as listener:
        async with opened(trust_policy=True) as backend:
            connecting = loop.create_task(
                ipsec_aio.create_connection(
                    Peer, alice.v4, PORT, backend=backend, require=ENCRYPTED, enforce=choice
                )
            )
            async with asyncio.timeout(PATIENCE):
                far, _ = await loop.sock_accept(listener)
                transport, peer = await connecting
            with far:
                ptoken = await peer.made
                assert ptoken.assurance is (
                    Assurance.ENFORCED if choice == "kernel" else Assurance.POLICY
                )
                transport.write(b"protected")
                async with asyncio.timeout(PATIENCE):
                    assert await loop.sock_recv(far, 100) == b"protected"
                for host in (alice, bob):
                    host.flush_policies()
                transport.write(b"secret")
                if choice == "kernel":
                    await asyncio.sleep(SILENCE)
                    # It goes on by the SA, under the socket's own policy.
                    assert await loop.sock_recv(far, 100) == b"secret"
                    bob.flush_sas()
                    transport.write(b"secret")
                    await asyncio.sleep(SILENCE)
                else:
                    async with asyncio.timeout(PATIENCE):
                        assert await loop.sock_recv(far, 100) == b"secret"
            transport.abort()
    clear = [packet for packet in seen if b"secret" in packet]
    assert bool(clear) is (choice == "user")


@pytest.mark.parametrize("choice", ["kernel", "user"])
async def test_when_the_stamp_goes_nothing_clear_is_delivered(
    bob: Host, alice: Host, choice: str
) -> None:
    """The kernel drops it by the socket's policy; without one the connection is reset."""
    loop = asyncio.get_running_loop()
    pair = lenient(alice, bob)
    command = [sys.executable, "-m", "ipsec_aio", "stamp"]
    bob.show(*command, "install", "--port", f"tcp/{PORT}")
    whole = Require(encrypted=True, mode="transport")
    async with serving((bob.v4, PORT), "require", whole, enforce=choice) as (server, peers):
        with alice.tcp() as client:
            async with asyncio.timeout(PATIENCE):
                await loop.sock_connect(client, (bob.v4, PORT))
                await eventually(lambda: len(peers) == 1)
                assert (await peers[0].made).assurance is Assurance.EXACT
                await loop.sock_sendall(client, b"sealed ")
                await eventually(lambda: peers[0].received == b"sealed ")
            bob.show("nft", "delete", "table", "inet", "ipsec_aio")
            if choice == "user":
                async with asyncio.timeout(PATIENCE):
                    error = await peers[0].lost
                assert isinstance(error, ProtectionError)
                assert server.ipsec_stats.refused_by == {"encrypted": 1}
            pair.release(alice)
            before = bob.statistics().get("XfrmInTmplMismatch", 0)
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                client.send(b"in clear")
            if choice == "user":
                await asyncio.sleep(SILENCE)
                assert peers[0].received == b"sealed "
                return
            await eventually(lambda: bob.statistics().get("XfrmInTmplMismatch", 0) > before)
            assert peers[0].received == b"sealed "
            assert not peers[0].lost.done()
            pair.demand(alice)
            await eventually(lambda: peers[0].received == b"sealed in clear")


async def test_a_connection_s_own_policies(bob: Host, alice: Host, mallory: Host) -> None:
    """What a server accepted is answered under its own policy, whatever becomes of the SPD."""
    loop = asyncio.get_running_loop()
    pair = protect(alice, bob)
    with sniffing(alice, PORT) as seen:
        async with serving((bob.v4, PORT)) as (server, peers):
            with alice.tcp() as client:
                async with asyncio.timeout(PATIENCE):
                    await loop.sock_connect(client, (bob.v4, PORT))
                    await eventually(lambda: len(peers) == 1)
                    await peers[0].made
                assert peers[0].transport.get_extra_info("ipsec_enforced") == "kernel"
                pair.release(bob)
                peers[0].transport.write(b"answer")
                async with asyncio.timeout(PATIENCE):
                    assert await loop.sock_recv(client, 100) == b"answer"
            assert server.enforcement == "kernel"
    assert seen == []
