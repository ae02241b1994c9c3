"""What a program sees through the public surface, on real IPsec: each protected peer beside one
in clear.
"""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import pytest
from hosts import (
    AH,
    CBC,
    GCM,
    NULL,
    PATIENCE,
    TUNNELS,
    Host,
    Pair,
    Suite,
    eventually,
    lenient,
    protect,
    receive,
    refused,
)
from packets import udp

import ipsec_aio
from ipsec_aio import Assurance, PToken, Require

PORT = 5000

SCENARIOS = [
    ("transport", 4, "0.0.0.0", GCM),
    ("tunnel", 6, "::", GCM),
    ("transport", 6, "::", CBC),
    ("tunnel", 4, "::", CBC),
    ("transport", 4, "::", NULL),
    ("tunnel", 4, "0.0.0.0", NULL),
    ("transport", 6, "::", AH),
    ("tunnel", 4, "0.0.0.0", AH),
    ("beet", 4, "0.0.0.0", GCM),
    ("beet", 6, "::", CBC),
]
"""Mode, family on the wire, what the server binds (IPv4 at "::" is v4-mapped), suite."""

scenarios = pytest.mark.parametrize(
    ("mode", "family", "bound", "suite"),
    SCENARIOS,
    ids=[f"{m}-{'mapped' if (f, b) == (4, '::') else f'v{f}'}-{s}" for m, f, b, s in SCENARIOS],
)

Arrival = tuple[bytes, str, PToken]


class Datagrams(ipsec_aio.DatagramProtocol):
    def __init__(self) -> None:
        self.arrivals: asyncio.Queue[Arrival] = asyncio.Queue()
        self.refused: list[tuple[str, ipsec_aio.ProtectionError]] = []

    def datagram_received(self, data, addr, ptoken):
        self.arrivals.put_nowait((data, addr[0].removeprefix("::ffff:"), ptoken))

    def datagram_refused(self, addr, error):
        self.refused.append((addr[0], error))

    async def next(self) -> Arrival:
        async with asyncio.timeout(PATIENCE):
            return await self.arrivals.get()


class Accepted(ipsec_aio.Protocol):
    def __init__(self, made: asyncio.Queue[tuple[str, PToken]]) -> None:
        self.made = made

    def connection_made(self, transport, ptoken):
        self.transport = transport
        peer = transport.get_extra_info("peername")[0].removeprefix("::ffff:")
        self.made.put_nowait((peer, ptoken))

    def data_received(self, data):
        self.transport.write(data)


@asynccontextmanager
async def receiving(
    bound: str = "0.0.0.0", *, stamp: str = "install", trust: bool = False, **options
) -> AsyncIterator[tuple[asyncio.DatagramTransport, Datagrams]]:
    async with ipsec_aio.open_backend("xfrm", stamp=stamp, trust_policy=trust) as backend:
        transport, protocol = await ipsec_aio.create_datagram_endpoint(
            Datagrams, local_addr=(bound, PORT), backend=backend, **options
        )
        with closing(transport):
            yield transport, protocol


def dual() -> socket.socket:
    """A TCP socket for both families; asyncio makes none."""
    sock = socket.socket(socket.AF_INET6)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", PORT))
    return sock


def assert_exact(token: PToken, pair: Pair, bob: Host) -> None:
    """Compare a token with what ``ip xfrm state`` says of the SA that came in."""
    text = bob.sa(
        pair.one.address(pair.family), bob.address(pair.family), pair.suite.proto, pair.spi(bob)
    )
    head = re.search(r"proto (\w+) spi (0x\w+)\S* reqid (\d+)\S* mode (\w+)", text)
    assert head, text
    found = re.findall(
        r"^\s+(aead|auth-trunc|enc) (\S+)(?: 0x\w+ \((\d+) bits\) ?(\d*))?", text, re.MULTILINE
    )
    told = {kind: (name, int(bits or 0), int(icv or 0)) for kind, name, bits, icv in found}
    sa = token.sa
    assert sa is not None
    assert (sa.spi, sa.reqid) == (int(head[2], 16), int(head[3]))
    assert {50: "esp", 51: "ah"}[sa.proto] == head[1]
    assert sa.mode.name.lower() == head[4] == pair.mode
    ours = {"aead": sa.aead, "auth-trunc": sa.authentication, "enc": sa.encryption}
    assert {k: (a.name, a.key_bits, a.icv_bits) for k, a in ours.items() if a} == told
    assert told
    null = "cipher_null" in told.get("enc", ("cipher_null",))[0]
    assert token.assurance is Assurance.EXACT
    assert token.protected
    assert token.privacy_protected is ("aead" in told or not null) is pair.suite.private
    assert token.integrity_protected is ("aead" in told or "auth-trunc" in told) is True
    assert token.tunnel_mode is (head[4] in TUNNELS)
    assert token.ipoptions_protected is (head[1] == "ah" or head[4] == "tunnel")
    assert token.compression_available is False
    assert token.policy_name is None
    assert token.alive
    private = bool(token.privacy_protected)
    assert ("encrypted and" in token.information_string) is private
    assert "authenticated by " in token.information_string
    for text in (token.information_string, token.audit_string):
        assert f"{head[1]}/{head[4]}(" in text
        assert text.find(f" reqid {int(head[3])}") > 0
        assert all(name in text for name, _, _ in told.values())
    assert f" spi={head[2]}" in token.audit_string
    local, peer = pair.address(bob), pair.address(pair.one)
    assert token.audit_string.startswith(f"local={local} peer={peer} assurance=EXACT privacy=")


def assert_clear(token: PToken) -> None:
    assert token.assurance is Assurance.NONE
    assert not token.protected
    assert token.privacy_protected is token.integrity_protected is token.tunnel_mode is False
    assert token.sa is None


@scenarios
async def test_datagrams(
    bob: Host, alice: Host, mallory: Host, mode: str, family: int, bound: str, suite: Suite
):
    pair = lenient(alice, bob, suite, mode, family)
    inner = pair.inner
    to = pair.address(bob)
    forged = udp(pair.address(alice), to, (4000, PORT), b"forged")
    async with receiving(bound) as (_, server):
        with (
            alice.udp(4000, family, inner=inner) as client,
            mallory.udp(0, family, inner=inner) as clear,
        ):
            client.sendto(b"sealed", (to, PORT))
            data, source, token = await server.next()
            assert (data, source) == (b"sealed", pair.address(alice))
            assert_exact(token, pair, bob)
            mallory.inject(forged, bob)
            data, source, other = await server.next()
            assert (data, source) == (b"forged", pair.address(alice))
            assert_clear(other)
            clear.sendto(b"clear", (to, PORT))
            data, source, other = await server.next()
            assert (data, source) == (b"clear", mallory.address(family, inner=inner))
            assert_clear(other)
            client.sendto(b"again", (to, PORT))
            assert (await server.next())[2] is token
    assert pair.packets(bob) == 2


@asynccontextmanager
async def accepting(
    bob: Host, **options
) -> AsyncIterator[tuple[asyncio.Server, asyncio.Queue[Accepted]]]:
    accepted: asyncio.Queue[Accepted] = asyncio.Queue()

    class Told(Accepted):
        def connection_made(self, transport, ptoken):
            super().connection_made(transport, ptoken)
            self.first = ptoken
            accepted.put_nowait(self)

    async with asyncio.timeout(PATIENCE), ipsec_aio.open_backend("xfrm", stamp="install") as b:
        server = await ipsec_aio.create_server(
            lambda: Told(asyncio.Queue()), bob.v4, PORT, backend=b, **options
        )
        yield server, accepted
        server.close()
        await server.wait_closed()


async def echo(client: socket.socket, data: bytes) -> None:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(client, data)
    assert await loop.sock_recv(client, 100) == data


@scenarios
async def test_accepted_connections(
    bob: Host, alice: Host, mallory: Host, mode: str, family: int, bound: str, suite: Suite
):
    pair = lenient(alice, bob, suite, mode, family)
    inner = pair.inner
    to = (pair.address(bob), PORT)
    made: asyncio.Queue[tuple[str, PToken]] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(PATIENCE), ipsec_aio.open_backend("xfrm", stamp="install") as b:
        bind = {"host": bound, "port": PORT} if (family, bound) != (4, "::") else {"sock": dual()}
        server = await ipsec_aio.create_server(lambda: Accepted(made), backend=b, **bind)
        with (
            alice.tcp(0, family, inner=inner) as client,
            mallory.tcp(0, family, inner=inner) as clear,
        ):
            await loop.sock_connect(client, to)
            peer, token = await made.get()
            assert peer == pair.address(alice)
            assert_exact(token, pair, bob)
            await loop.sock_connect(clear, to)
            peer, other = await made.get()
            assert peer == mallory.address(family, inner=inner)
            assert_clear(other)
            for each in (client, clear):
                await loop.sock_sendall(each, b"hello")
                assert await loop.sock_recv(each, 100) == b"hello"
            assert (server.ipsec_stats.received, server.ipsec_stats.protected) == (2, 1)
        server.close()
        await server.wait_closed()
    assert pair.packets(bob) >= 3


async def test_connected_datagrams(bob: Host, alice: Host, mallory: Host):
    pair = lenient(alice, bob)
    forged = udp(alice.v4, bob.v4, (4000, PORT), b"forged")
    with alice.udp(4000) as client:
        async with receiving(bob.v4, remote_addr=(alice.v4, 4000)) as (_, server):
            client.sendto(b"sealed", (bob.v4, PORT))
            data, _, token = await server.next()
            assert data == b"sealed"
            assert_exact(token, pair, bob)
            mallory.inject(forged, bob)
            data, _, other = await server.next()
            assert data == b"forged"
            assert_clear(other)


async def test_a_token_outlives_an_equivalent_rekey(bob: Host, alice: Host, mallory: Host):
    pair = lenient(alice, bob)
    async with receiving() as (_, server):
        with alice.udp() as client, mallory.udp() as clear:

            async def arrive() -> PToken:
                clear.sendto(b"clear", (bob.v4, PORT))
                assert_clear((await server.next())[2])
                client.sendto(b"sealed", (bob.v4, PORT))
                return (await server.next())[2]

            token = await arrive()
            pair.rekey()
            assert await arrive() is token
            assert pair.packets(bob) == 1
            assert [sa.spi for sa in token.sas] == [spi for spi, _ in pair.spis]
            assert_exact(token, pair, bob)
            pair.retire()
            assert await arrive() is token
            assert len(token.sas) == 1
            pair.rekey(suite=NULL)
            weaker = await arrive()
            assert weaker is not token
            assert_exact(weaker, pair, bob)
            assert token.privacy_protected is True


LIMITS = {"used up": "limit packet-hard 2", "too old": "limit time-use-hard 2"}


@pytest.mark.parametrize("end", ["deleted", "flushed", *LIMITS])
async def test_the_end_of_an_sa(bob: Host, alice: Host, mallory: Host, end: str):
    pair = lenient(alice, bob, extra=LIMITS.get(end, ""))
    forged = udp(alice.v4, bob.v4, (4000, PORT), b"forged")
    async with receiving() as (_, server):
        with alice.udp(4000) as client:
            client.sendto(b"one", (bob.v4, PORT))
            token = (await server.next())[2]
            assert_exact(token, pair, bob)
            client.sendto(b"two", (bob.v4, PORT))
            # Not awaited: the loop must not read it yet.
            patience = time.monotonic() + PATIENCE
            while pair.packets(bob) < 2:
                assert time.monotonic() < patience, "the second datagram never came"
            # The second waits in the socket while its SA goes.
            if end == "deleted":
                bob.ip(*pair.states("delete"))
            elif end == "flushed":
                bob.flush_sas()
            elif end == "too old":
                while f"{pair.spi(bob):#010x}" in bob.show("ip", "xfrm", "state"):
                    assert time.monotonic() < patience, "it never expired"
            else:
                alice.ip(*pair.states("delete"))
                pair.extra = ""
                alice.ip(*pair.states("add"))
                client.sendto(b"three", (bob.v4, PORT))
            data, _, queued = await server.next()
            assert data == b"two"
            assert queued.assurance is Assurance.EXACT
            assert queued.protected
            await eventually(lambda: not token.alive)
            for _ in range(3):
                mallory.inject(forged, bob)
                data, _, other = await server.next()
                assert data == b"forged"
                assert_clear(other)
            assert token.assurance is Assurance.EXACT
            assert token.protected
            assert token.sa is None


async def test_policies_come_and_go_beside_the_stamp(bob: Host, alice: Host, mallory: Host):
    """They are nothing to what the stamp proves."""
    pair = protect(alice, bob)
    forged = udp(alice.v4, bob.v4, (4000, PORT), b"forged")
    async with receiving() as (_, server):
        with alice.udp(4000) as client, mallory.udp() as clear:

            async def arrive() -> PToken:
                client.sendto(b"hello", (bob.v4, PORT))
                return (await server.next())[2]

            token = await arrive()
            assert_exact(token, pair, bob)
            await refused(bob, lambda: mallory.inject(forged, bob))
            pair.release(bob)
            assert await arrive() is token
            mallory.inject(forged, bob)
            data, _, other = await server.next()
            assert data == b"forged"
            assert_clear(other)
            pair.release(alice)
            assert_clear(await arrive())
            pair.demand()
            assert await arrive() is token
            await refused(bob, lambda: mallory.inject(forged, bob))
            clear.sendto(b"clear", (bob.v4, PORT))
            assert_clear((await server.next())[2])
            assert server.arrivals.empty()


@pytest.mark.parametrize("trust", [False, True])
async def test_policies_without_a_stamp(bob: Host, alice: Host, mallory: Host, trust: bool):
    pair = protect(alice, bob)
    async with receiving(stamp="off", trust=trust) as (_, server):
        with alice.udp() as client, mallory.udp() as clear:

            async def arrive(sender: socket.socket) -> PToken:
                sender.sendto(b"hello", (bob.v4, PORT))
                return (await server.next())[2]

            def assert_policy(token: PToken) -> None:
                assert token.assurance is Assurance.POLICY
                assert token.protected is trust
                assert token.privacy_protected is True
                assert token.policy_name

            async def come_back() -> PToken:
                while (token := await arrive(client)).assurance is Assurance.UNKNOWN:
                    assert not token.protected
                    await asyncio.sleep(0.1)
                return token

            assert_policy(await come_back())
            assert_clear(await arrive(clear))
            pair.release()
            other = await arrive(client)
            assert other.assurance is Assurance.UNKNOWN
            assert not other.protected
            pair.demand()
            assert_policy(await come_back())
            assert_clear(await arrive(clear))


async def test_streams_while_their_sas_are_rekeyed_and_end(bob: Host, alice: Host, mallory: Host):
    """Nothing of it tells of the handshake; the stamp keeps out what would be in clear."""
    pair = lenient(alice, bob)
    loop = asyncio.get_running_loop()
    async with accepting(bob) as (_, accepted):
        with alice.tcp() as client, alice.tcp() as second, alice.tcp() as third:
            await loop.sock_connect(client, (bob.v4, PORT))
            stream = await accepted.get()
            token = stream.first
            assert_exact(token, pair, bob)

            async def stands() -> None:
                await echo(client, b"on and on")
                assert stream.transport.get_extra_info("ptoken") is token
                assert token.assurance is Assurance.EXACT
                assert token.protected

            pair.rekey()
            await stands()
            pair.retire()
            await stands()
            assert_exact(token, pair, bob)
            await loop.sock_connect(second, (bob.v4, PORT))
            assert (await accepted.get()).first is token
            bob.flush_sas()
            await eventually(lambda: not token.alive)
            with mallory.tcp() as clear:
                await loop.sock_connect(clear, (bob.v4, PORT))
                assert_clear((await accepted.get()).first)
                await echo(clear, b"hello")
            bob.ip(*pair.states("add"))
            await stands()
            pair.rekey(suite=NULL)
            pair.retire()
            await loop.sock_connect(third, (bob.v4, PORT))
            weaker = (await accepted.get()).first
            assert weaker is not token
            assert_exact(weaker, pair, bob)


@pytest.mark.parametrize("suite", [NULL, AH], ids=str)
async def test_streams_that_are_not_private(bob: Host, alice: Host, mallory: Host, suite: Suite):
    """Integrity is enough for those who ask for integrity, and for nobody else."""
    pair = lenient(alice, bob, suite)
    loop = asyncio.get_running_loop()
    for require, welcome in ((Require(encrypted=True), False), (Require(integrity=True), True)):
        async with accepting(bob, require=require, enforce="user") as (server, accepted):
            with alice.tcp() as client, mallory.tcp() as clear:
                for each in (client, clear):
                    await loop.sock_connect(each, (bob.v4, PORT))
                with pytest.raises(ConnectionResetError):
                    await loop.sock_recv(clear, 100)
                if welcome:
                    token = (await accepted.get()).first
                    assert_exact(token, pair, bob)
                    assert token.privacy_protected is False
                    await echo(client, b"hello")
                else:
                    with pytest.raises(ConnectionResetError):
                        await loop.sock_recv(client, 100)
                assert accepted.empty()
                stats = server.ipsec_stats
                assert (stats.received, stats.refused) == (2, 1 if welcome else 2)


async def test_clear_datagrams_are_refused(bob: Host, alice: Host, mallory: Host):
    pair = lenient(alice, bob)
    require = Require(encrypted=True)
    async with receiving(require=require, enforce="user") as (transport, server):
        with alice.udp() as client, mallory.udp() as clear:
            clear.sendto(b"clear", (bob.v4, PORT))
            await eventually(lambda: bool(server.refused))
            client.sendto(b"sealed", (bob.v4, PORT))
            data, _, token = await server.next()
            assert data == b"sealed"
            assert_exact(token, pair, bob)
        ((source, error),) = server.refused
        assert (source, error.clause) == (mallory.v4, "encrypted")
        stats = transport.ipsec_stats
        assert (stats.received, stats.refused, dict(stats.refused_by)) == (2, 1, {"encrypted": 1})
        assert server.arrivals.empty()


async def test_compression_may_have_been_where_ip_has_it(bob: Host, alice: Host, mallory: Host):
    """The stamp names the ESP SA alone, whatever was inside."""
    pair = lenient(alice, bob)
    reqid = f"reqid {pair.reqid} mode transport"
    ends = f"src {alice.v4} dst {bob.v4}"
    compressing = f"xfrm state add {ends} proto comp spi 0x1f0a {reqid} comp deflate"
    both = f"tmpl {ends} proto comp {reqid} level use tmpl {ends} proto esp {reqid}"
    data = b"much alike " * 80
    async with receiving() as (_, server):
        with alice.udp() as client, mallory.udp() as clear:
            client.sendto(data, (bob.v4, PORT))
            assert_exact((await server.next())[2], pair, bob)
            assert "proto comp" not in bob.show("ip", "xfrm", "state")
            for host in (bob, alice):
                host.ip(compressing)
            bob.ip(f"xfrm policy update {ends} dir in {both} level use")
            alice.ip(f"xfrm policy update {ends} dir out {both}")
            client.sendto(data, (bob.v4, PORT))
            received, _, token = await server.next()
            assert received == data
            assert "1(packets)" in bob.sa(alice.v4, bob.v4, "comp", 0x1F0A).replace(" ", "")
            assert "proto comp" in bob.show("ip", "xfrm", "state")
            assert token.compression_available is None
            assert token.assurance is Assurance.EXACT
            assert token.protected
            assert token.sa is not None
            assert token.sa.spi == pair.spi(bob)
            clear.sendto(b"clear", (bob.v4, PORT))
            _, _, other = await server.next()
            assert_clear(other)
            assert other.compression_available is False


async def test_the_policy_is_named_as_ip_shows_it(bob: Host, alice: Host, mallory: Host):
    pair = protect(alice, bob, policies=False)
    pair.demand(alice)
    pair.demand(bob, selector=f"proto udp dport {PORT}", more="priority 7")
    bob.ip(
        f"xfrm policy add src {alice.v4}/32 dst {bob.v4}/32 dir in priority 9"
        f" tmpl proto esp mode transport"
    )
    shown = bob.show("ip", "xfrm", "policy", "list", "dir", "in")
    found = re.search(r"src (\S+) dst (\S+) proto (\w+) dport (\d+)\s+dir in priority (\d+)", shown)
    assert found, shown
    source, destination, proto, port, priority = found.groups()
    number = socket.getprotobyname(proto)
    async with receiving(stamp="off", trust=True) as (_, server):
        with alice.udp() as client, mallory.udp() as clear:

            async def arrive(sender: socket.socket) -> PToken:
                sender.sendto(b"hello", (bob.v4, PORT))
                return (await server.next())[2]

            while (token := await arrive(client)).assurance is Assurance.UNKNOWN:
                assert not token.protected
                await asyncio.sleep(0.1)
            name = f"{source} → {destination}:{port} proto {number} priority {priority}"
            assert token.policy_name == name
            assert token.assurance is Assurance.POLICY
            assert name in token.audit_string
            assert token.compression_available is None
            assert_clear(await arrive(clear))


@pytest.mark.parametrize("trust", [False, True])
async def test_outgoing_connections(bob: Host, alice: Host, mallory: Host, trust: bool):
    protect(alice, bob)
    made: asyncio.Queue[tuple[str, PToken]] = asyncio.Queue()
    opened = ipsec_aio.open_backend("xfrm", stamp="install", trust_policy=trust)
    with alice.listener(PORT), mallory.listener(PORT):
        async with asyncio.timeout(PATIENCE), opened as backend:

            async def connect(host: Host) -> PToken:
                transport, _ = await ipsec_aio.create_connection(
                    lambda: Accepted(made), host.v4, PORT, backend=backend
                )
                transport.abort()
                return made.get_nowait()[1]

            token = await connect(alice)
            assert token.assurance is Assurance.POLICY
            assert token.protected is trust
            assert token.privacy_protected is True
            assert_clear(await connect(mallory))


async def test_many_at_once_are_each_protected(bob: Host, alice: Host):
    """The kernel cuts no runs from one buffer where IPsec takes over: each goes by itself."""
    pair = protect(alice, bob)
    datagrams = [b"%3d" % number * 100 for number in range(100)]
    async with receiving(require=Require(encrypted=True)) as (transport, protocol):
        with alice.udp() as client:
            client.sendto(b"more", (bob.v4, PORT))
            await protocol.next()
            transport.sendto_many(datagrams, client.getsockname())
            assert [(await receive(client))[0] for _ in datagrams] == datagrams
    assert pair.packets(alice) == len(datagrams)
