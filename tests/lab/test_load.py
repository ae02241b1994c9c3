"""Every answer is right under load, where each payload names its sender.

One process is every host at once, so the senders wait for the receiver: what is sent is bounded by
what its buffer holds, and a wrong answer can't hide among lost datagrams.
"""

from __future__ import annotations

import asyncio
import re
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from itertools import pairwise

import pytest
from hosts import (
    GCM,
    NULL,
    PATIENCE,
    Host,
    Pair,
    eventually,
    forger,
    lenient,
    mark_of,
    protect,
    rekey,
)
from lies import lasting_stamp
from packets import udp

import ipsec_aio
from ipsec_aio import Assurance, PToken
from ipsec_aio.kernel import stamp_table
from ipsec_aio.kernel.nfnetlink import NftSocket
from ipsec_aio.kernel.stamp_rules import INPUT

PORT = 5000
BURST = 64
BURSTS, CONNECTIONS = 261, 1_002
"""For each of the two event loops: each burst is of three senders."""

ALL_DATAGRAMS, ALL_CONNECTIONS = 100_000, 2_000
"""What both must come to."""

FORGED = 8
"""Clear datagrams in each burst under the address of each protected sender."""

REKEYING = 0.2
"""Seconds from rekey to rekey."""

_SO_RCVBUFFORCE = 33

Answer = tuple[Assurance, bool, bool | None, bool | None]
"""(assurance, protected, privacy_protected, integrity_protected)"""

PRIVATE: Answer = (Assurance.EXACT, True, True, True)
INTACT: Answer = (Assurance.EXACT, True, False, True)
CLEAR: Answer = (Assurance.NONE, False, False, False)
IN_DOUBT: Answer = (Assurance.UNKNOWN, False, None, None)


def answer(ptoken: PToken) -> Answer:
    return (
        ptoken.assurance,
        ptoken.protected,
        ptoken.privacy_protected,
        ptoken.integrity_protected,
    )


class Datagrams(ipsec_aio.DatagramProtocol):
    """Counts what was said about each sender's datagrams."""

    def __init__(self) -> None:
        self.received = self.awaited = 0
        self.complete = asyncio.Event()
        self.said: Counter[tuple[bytes, Answer]] = Counter()

    def datagram_received(self, data: bytes, addr: tuple[str, int], ptoken: PToken) -> None:
        self.received += 1
        self.said[data, answer(ptoken)] += 1
        if self.received >= self.awaited:
            self.complete.set()

    async def until(self, total: int) -> None:
        """Wait until so many were received; raises TimeoutError."""
        self.awaited = total
        if self.received < total:
            self.complete.clear()
            await asyncio.wait_for(self.complete.wait(), PATIENCE)


class Connection(ipsec_aio.Protocol):
    """Counts what was said about a connection when it came and when its sender was known."""

    def __init__(self, said: Counter[tuple[bytes, Answer]]) -> None:
        self.said = said

    def connection_made(self, transport: asyncio.Transport, ptoken: PToken) -> None:
        self.transport = transport
        self.first = answer(ptoken)

    def data_received(self, data: bytes) -> None:
        self.said[data, self.first] += 1
        self.said[data, answer(self.transport.get_extra_info("ptoken"))] += 1
        self.transport.close()


@asynccontextmanager
async def datagrams(
    bob: Host, backend: object, factory: Callable[[], Datagrams] = Datagrams
) -> AsyncIterator[Datagrams]:
    transport, protocol = await ipsec_aio.create_datagram_endpoint(
        factory, local_addr=(bob.v4, PORT), backend=backend
    )
    sock = transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 22)
    with closing(transport):
        yield protocol


def sender(host: Host, bob: Host) -> socket.socket:
    client = host.udp()
    client.connect((bob.v4, PORT))
    return client


@contextmanager
def rekeyed(*pairs: Pair) -> Iterator[list[float]]:
    """Rekey all of them again and again, whatever the event loop does; gives when each began.

    SAs stay for as long as a packet may need them.
    """
    began: list[float] = []
    enough = threading.Event()

    def work() -> None:
        due = time.monotonic()
        while not enough.wait(max(0.0, due - time.monotonic())):
            began.append(time.monotonic())
            rekey(*pairs, keep=4)
            due += REKEYING

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        try:
            yield began
        finally:
            enough.set()
            working.result()


async def connect(host: Host, bob: Host, tag: bytes, times: int) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(times):
        with host.tcp() as client:
            async with asyncio.timeout(PATIENCE):
                await loop.sock_connect(client, (bob.v4, PORT))
                await loop.sock_sendall(client, tag)
                assert await loop.sock_recv(client, 1) == b""


def totals(said: Counter[tuple[bytes, Answer]]) -> dict[str, int]:
    by_assurance: Counter[str] = Counter()
    for (_, (assurance, *_)), number in said.items():
        by_assurance[assurance.name] += number
    return dict(by_assurance)


@pytest.fixture(scope="module")
def whole() -> Iterator[Counter[str]]:
    """The load of all event loops."""
    whole: Counter[str] = Counter()
    yield whole
    if whole["loops"] == 2:  # else they were not all selected
        assert whole["datagrams"] >= ALL_DATAGRAMS
        assert whole["connections"] >= ALL_CONNECTIONS


async def test_many_from_protected_and_clear_peers_while_rekeying(
    bob: Host,
    alice: Host,
    carol: Host,
    mallory: Host,
    whole: Counter[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = {b"alice": PRIVATE, b"carol": INTACT, b"mallory": CLEAR}
    # Bob's policies demand nothing: what is clear and has a protected sender's address comes in.
    pairs = lenient(alice, bob, GCM), lenient(carol, bob, NULL, reqid=2)
    connections: Counter[tuple[bytes, Answer]] = Counter()
    hosts = {b"alice": alice, b"carol": carol, b"mallory": mallory}
    clients = {tag: sender(host, bob) for tag, host in hosts.items()}

    as_others = {b"as " + tag: hosts[tag].v4 for tag in (b"alice", b"carol")}
    forgeries = [udp(v4, bob.v4, (4000, PORT), tag) for tag, v4 in as_others.items()]

    def burst() -> None:
        for tag, client in clients.items():
            for _ in range(BURST):
                client.send(tag)

    began = time.monotonic()
    async with ipsec_aio.open_backend("xfrm", stamp="install") as backend:
        server = await ipsec_aio.create_server(
            lambda: Connection(connections), bob.v4, PORT, backend=backend
        )
        async with server, datagrams(bob, backend) as protocol:
            with rekeyed(*pairs) as rekeys:
                connecting = [
                    asyncio.create_task(connect(host, bob, tag, CONNECTIONS // 3))
                    for tag, host in hosts.items()
                ]
                whole_burst = 3 * BURST + len(forgeries) * FORGED
                for number in range(BURSTS):
                    for forgery in forgeries * FORGED:
                        mallory.inject(forgery, bob)
                    await asyncio.to_thread(burst)
                    await protocol.until(number * whole_burst)  # one is on its way meanwhile
                await protocol.until(BURSTS * whole_burst)
                await asyncio.gather(*connecting)
    for client in clients.values():
        client.close()
    seconds = time.monotonic() - began
    intervals = [later - earlier for earlier, later in pairwise(rekeys)]
    figures = (
        f"\nload: {protocol.received} datagrams {totals(protocol.said)}, "
        f"{connections.total() // 2} connections {totals(connections)} (twice each), "
        f"{seconds:.1f} s; {len(rekeys)} rekeys of {len(pairs)} pairs, every "
        f"{statistics.mean(intervals):.3f} s, at most {max(intervals):.3f} s"
    )
    with capsys.disabled():
        print(figures)
    assert protocol.said == {
        **{(tag, right[tag]): BURSTS * BURST for tag in hosts},
        **{(tag, CLEAR): BURSTS * FORGED for tag in as_others},
    }
    assert connections == {(tag, right[tag]): CONNECTIONS // 3 * 2 for tag in hosts}
    assert statistics.mean(intervals) < REKEYING * 1.25
    whole.update(loops=1, datagrams=BURSTS * BURST * 3, connections=connections.total() // 2)


async def test_a_thousand_peers_of_each_kind(bob: Host, alice: Host, mallory: Host) -> None:
    safe = [f"10.10.{n >> 8}.{n & 255}" for n in range(1000)]
    clear = [f"10.11.{n >> 8}.{n & 255}" for n in range(1000)]
    sas = [
        f"xfrm state add src {peer} dst {bob.v4} proto esp spi {0x20000 + n:#x} mode transport "
        f"reqid 9 {GCM.words}"
        for n, peer in enumerate(safe)
    ]
    for host, peers in ((alice, safe), (mallory, clear)):
        host.ip(*(f"addr add {peer}/32 dev lo" for peer in peers))
        host.after(lambda h=host, p=peers: h.ip(*(f"addr del {a}/32 dev lo" for a in p)))
    routes = f"10.10.0.0/16 via {alice.v4}", f"10.11.0.0/16 via {mallory.v4}"
    bob.ip(*(f"route add {route}" for route in routes))
    bob.after(lambda: bob.ip(*(f"route del {route}" for route in routes)))
    alice.ip(
        *sas,
        f"xfrm policy add src 10.10.0.0/16 dst {bob.v4} dir out "
        "tmpl proto esp reqid 9 mode transport",
    )
    bob.ip(*sas)
    tokens: dict[str, set[PToken]] = {}
    forged: list[PToken] = []

    class Peers(Datagrams):
        def datagram_received(self, data: bytes, addr: tuple[str, int], ptoken: PToken) -> None:
            super().datagram_received(data, addr, ptoken)
            if data == b"forged":
                forged.append(ptoken)
            else:
                tokens.setdefault(addr[0], set()).add(ptoken)

    async with (
        ipsec_aio.open_backend("xfrm", stamp="install") as backend,
        datagrams(bob, backend, Peers) as protocol,
    ):
        sent = 0
        for _ in range(2):
            for start in range(0, 1000, 50):
                for host, tag, peers in ((alice, b"safe", safe), (mallory, b"clear", clear)):
                    with host:
                        for peer in peers[start : start + 50]:
                            send_from(peer, tag, bob)
                mallory.inject(udp(safe[start], bob.v4, (4000, PORT), b"forged"), bob)
                sent += 101
                await protocol.until(sent)
    assert protocol.said == {
        (b"safe", PRIVATE): 2000,
        (b"clear", CLEAR): 2000,
        (b"forged", CLEAR): 40,
    }
    assert tokens.keys() == {*safe, *clear}
    assert all(len(several) == 1 for several in tokens.values())
    assert len({id(token) for several in tokens.values() for token in several}) == 2000
    assert not {*forged} & {token for peer in safe for token in tokens[peer]}


def send_from(source: str, data: bytes, to: Host) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.bind((source, 0))
        client.sendto(data, (to.v4, PORT))


@pytest.fixture
def stamp_socket(bob: Host) -> Iterator[NftSocket]:
    """There is a stamp as an operator installs it; the socket is his."""
    with lasting_stamp() as netlink:
        yield netlink


TABLE, RULESET = "delete table inet ipsec_aio", "flush ruleset"
RULES = [rule.purpose for rule in INPUT.rules[2:]]
"""Those that clear marks, stamp, and keep clear segments off."""


def take_away(bob: Host, lost: str) -> None:
    """Delete the stamp's table, every table, or one rule of it, as an operator can."""
    words = lost if lost not in RULES else f"delete rule inet ipsec_aio input {handle(bob, lost)}"
    bob.show("nft", *words.split())


def handle(bob: Host, purpose: str) -> str:
    listed = bob.show("nft", "--handle", "list", "chain", "inet", "ipsec_aio", "input")
    handles = re.findall(r"^\t\t.* # (handle \d+)$", listed, re.MULTILINE)
    (found,) = (h for h, r in zip(handles, INPUT.rules, strict=True) if r.purpose == purpose)
    return str(found)


@pytest.mark.parametrize(
    ("mode", "lost"),
    [
        *(("use", lost) for lost in (TABLE, RULESET, *RULES)),
        *(("install", lost) for lost in (TABLE, RULESET, "clear the mark")),
    ],
)
async def test_the_stamp_is_lost_under_load(
    stamp_socket: NftSocket, bob: Host, alice: Host, mallory: Host, mode: str, lost: str
) -> None:
    pair = protect(alice, bob, policies=False)
    pair.demand(alice)
    # A table that is there but not right is not ours to repair.
    restored = mode == "install" and lost not in RULES
    kinds = b"safe", b"clear", b"forged", b"marked"
    async with (
        ipsec_aio.open_backend("xfrm", stamp=mode) as backend,
        datagrams(bob, backend) as protocol,
    ):
        with (
            sender(alice, bob) as safe,
            sender(mallory, bob) as clear,
            forger(bob, alice.v4, mark_of(pair.spi(bob))) as marked,
        ):
            sent = 0

            def send(phase: bytes) -> None:
                nonlocal sent
                for _ in range(BURST):
                    safe.send(phase + b" safe")
                    clear.send(phase + b" clear")
                    mallory.inject(udp(alice.v4, bob.v4, (4000, PORT), phase + b" forged"), bob)
                    marked.sendto(phase + b" marked", (bob.v4, PORT))
                sent += len(kinds) * BURST

            async def see_the_queue_empty() -> None:
                nonlocal sent
                clear.send(b"probe")
                sent += 1
                await protocol.until(sent)

            send(b"stamped")
            await protocol.until(sent)
            send(b"queued")
            take_away(bob, lost)
            send(b"late")
            await protocol.until(sent)
            await see_the_queue_empty()
            send(b"after")
            await protocol.until(sent)
            if not restored:
                port = stamp_table.Port(socket.IPPROTO_UDP, PORT)
                there = stamp_table.read(stamp_socket).installed
                stamp_table.install(stamp_socket, [port], owned=False, replace=there)
            await see_the_queue_empty()
            send(b"again")
            await protocol.until(sent)
    said = protocol.said
    stamped = {b"safe": PRIVATE, b"clear": CLEAR, b"forged": CLEAR, b"marked": CLEAR}
    # In doubt is what has the address of an SA's peer: it may have come under that.
    unstamped = dict.fromkeys(kinds, IN_DOUBT) | {b"clear": CLEAR}

    def expect(phase: bytes, right: dict[bytes, Answer]) -> None:
        found = {key: number for key, number in said.items() if key[0].startswith(phase)}
        assert found == {(phase + b" " + kind, right[kind]): BURST for kind in kinds}

    expect(b"stamped", stamped)
    for phase in (b"queued", b"late"):
        for kind in (b" safe", b" forged", b" marked"):
            assert said[phase + kind, IN_DOUBT] == BURST
        assert sum(said[phase + b" clear", each] for each in (IN_DOUBT, CLEAR)) == BURST
    expect(b"after", stamped if restored else unstamped)
    expect(b"again", stamped)


class Lasting(Connection):
    """Stays where it is told to, and answers."""

    def data_received(self, data: bytes) -> None:
        if not data.startswith(b"stay"):
            super().data_received(data)
            return
        self.said[data, answer(self.transport.get_extra_info("ptoken"))] += 1
        self.transport.write(data)


async def talk(client: socket.socket, data: bytes, enough: Callable[[], bool]) -> None:
    loop = asyncio.get_running_loop()
    while not enough():
        async with asyncio.timeout(PATIENCE):
            await loop.sock_sendall(client, data)
            assert await loop.sock_recv(client, 100) == data


@pytest.mark.parametrize(
    ("mode", "lost"),
    [
        ("use", TABLE),
        ("install", TABLE),
        # Where clear segments are no longer passed, the next rule drops all their data.
        *(("use", rule) for rule in RULES if not rule.startswith("pass ")),
    ],
)
async def test_the_stamp_is_lost_under_connections(
    stamp_socket: NftSocket, bob: Host, alice: Host, mallory: Host, mode: str, lost: str
) -> None:
    lenient(alice, bob)
    bob.sysctl("net/ipv4/tcp_fwmark_accept", 1)
    said: Counter[tuple[bytes, Answer]] = Counter()
    made: list[Lasting] = []
    loop = asyncio.get_running_loop()
    hosts = {b"safe": alice, b"clear": mallory}
    enough = asyncio.Event()

    def accept() -> Lasting:
        made.append(Lasting(said))
        return made[-1]

    async with ipsec_aio.open_backend("xfrm", stamp=mode) as backend, asyncio.TaskGroup() as tasks:
        server = await ipsec_aio.create_server(accept, bob.v4, PORT, backend=backend)
        clients = [(tag, host.tcp()) for tag, host in hosts.items() for _ in range(4)]
        for _, client in clients:
            await loop.sock_connect(client, (bob.v4, PORT))
        talking = [
            tasks.create_task(talk(client, b"stay, " + tag, enough.is_set))
            for tag, client in clients
        ]
        connecting = [tasks.create_task(connect(host, bob, tag, 60)) for tag, host in hosts.items()]
        await eventually(lambda: all(said[tag, PRIVATE] > 10 for tag in (b"safe", b"stay, safe")))
        lasting = made[: len(clients)]
        await asyncio.to_thread(take_away, bob, lost)
        await eventually(
            lambda: {answer(c.transport.get_extra_info("ptoken")) for c in lasting} == {IN_DOUBT}
        )
        enough.set()
        await asyncio.wait([*talking, *connecting])
        before = said.copy()
        for tag, client in clients:
            await talk(client, b"stay after, " + tag, iter((False, True)).__next__)
            client.close()
        for tag, host in hosts.items():
            await connect(host, bob, b"after, " + tag, 20)
        server.close()
        await server.wait_closed()
    for (data, told), number in before.items():
        right = PRIVATE if data.endswith(b"safe") else CLEAR
        assert told in (right, IN_DOUBT), (data, told, number)
    assert said - before == {
        (b"stay after, safe", IN_DOUBT): 4,
        (b"stay after, clear", IN_DOUBT): 4,
        (b"after, safe", IN_DOUBT): 40,
        # Without a stamp the tables are asked, and no SA may have carried it.
        (b"after, clear", IN_DOUBT if (mode, lost) == ("install", TABLE) else CLEAR): 40,
    }


@pytest.mark.parametrize("lost", [TABLE, RULESET, *RULES])
async def test_nobody_takes_away_a_stamp_that_we_own(
    bob: Host, alice: Host, mallory: Host, lost: str
) -> None:
    protect(alice, bob)
    async with (
        ipsec_aio.open_backend("xfrm", stamp="install") as backend,
        datagrams(bob, backend) as protocol,
    ):
        with suppress(RuntimeError):  # EPERM; a flush leaves out what is owned
            take_away(bob, lost)
        with sender(alice, bob) as safe, sender(mallory, bob) as clear:
            for _ in range(BURST):
                safe.send(b"safe")
                clear.send(b"clear")
            await protocol.until(2 * BURST)
    assert protocol.said == {(b"safe", PRIVATE): BURST, (b"clear", CLEAR): BURST}


async def test_packets_that_come_while_their_sa_is_added(
    bob: Host, alice: Host, mallory: Host
) -> None:
    rounds = 60
    pair = protect(alice, bob, policies=False)
    pair.demand(alice)
    tokens: list[tuple[bytes, Assurance, PToken]] = []
    last = asyncio.Event()

    class Racing(Datagrams):
        def datagram_received(self, data: bytes, addr: tuple[str, int], ptoken: PToken) -> None:
            super().datagram_received(data, addr, ptoken)
            tokens.append((data, ptoken.assurance, ptoken))
            if data == b"safe, last":
                last.set()

    async with (
        ipsec_aio.open_backend("xfrm", stamp="install") as backend,
        datagrams(bob, backend, Racing) as protocol,
    ):
        with sender(alice, bob) as safe, sender(mallory, bob) as clear:
            for number in range(rounds):
                last.clear()
                pair.spis.append((0x40000 + number, 0x50000 + number))
                into_bob = pair.states("add")[0]
                alice.ip(into_bob)
                adding = asyncio.create_task(asyncio.to_thread(bob.ip, into_bob))
                while not adding.done():
                    safe.send(b"safe")  # dropped until bob has the SA
                    clear.send(b"clear")
                    await asyncio.sleep(0)
                await adding
                safe.send(b"safe, last")
                await asyncio.wait_for(last.wait(), PATIENCE)
            for data, _, token in tokens:
                if data != b"clear":
                    assert answer(await token.resolved(timeout=PATIENCE)) == PRIVATE
    said = Counter((data, assurance) for data, assurance, _ in tokens)
    print(f"\nrace: {rounds} SAs, {dict(said)}")
    assert said[b"safe, last", Assurance.EXACT] + said[b"safe, last", Assurance.UNKNOWN] == rounds
    assert said.keys() <= {
        (b"safe", Assurance.EXACT),
        (b"safe", Assurance.UNKNOWN),
        (b"safe, last", Assurance.EXACT),
        (b"safe, last", Assurance.UNKNOWN),
        (b"clear", Assurance.NONE),
    }
    assert said[b"clear", Assurance.NONE] == protocol.said[b"clear", CLEAR] > 0
