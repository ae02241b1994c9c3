"""How evidence lies, played by adversaries who win only where the guard is taken out.

Each test runs twice: ``guarded`` False takes out the one guard that it is about, and shows that
the lie is believed then; True shows that it is not. What is clear comes from alice's own address,
or has it forged, so that nothing but the guard stands between the lie and an SA of hers.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from contextlib import asynccontextmanager, closing
from dataclasses import replace

import pytest
from hosts import BARE, COMP, FAMILIES, GCM, PATIENCE, Host, eventually, lenient, protect, refused
from packets import compressed, fragments, udp

import ipsec_aio
from ipsec_aio import Assurance, BackendError, Require, truth
from ipsec_aio.backends.xfrm import XfrmBackend
from ipsec_aio.kernel import stamp_table
from ipsec_aio.kernel.nfnetlink import NftSocket
from ipsec_aio.kernel.stamp_marks import MarkUsers
from ipsec_aio.mirror import Mirror
from ipsec_aio.net import listening, witness
from ipsec_aio.sa import IPPROTO_ESP
from ipsec_aio.spd import SPD
from ipsec_aio.truth import TruthTable

PORT, OTHER_PORT = 5000, 6000
SO_MARK, IP_TRANSPARENT = 36, 19
GUARDED = pytest.mark.parametrize("guarded", [False, True], ids=["unguarded", "guarded"])


def mark_of(spi):
    """The mark that stands for an SPI."""
    return int.from_bytes(spi.to_bytes(4, "big"), sys.byteorder)


class Sink(ipsec_aio.DatagramProtocol):
    def __init__(self):
        self.queue = asyncio.Queue()

    def datagram_received(self, data, addr, ptoken):
        self.queue.put_nowait((data, addr[0], ptoken))

    async def next(self, data, peer):
        """Return the token of the next datagram, which must be this one."""
        async with asyncio.timeout(PATIENCE):
            found = await self.queue.get()
        assert found[:2] == (data, peer)
        return found[2]


@asynccontextmanager
async def serving(sock, **options):
    """A datagram endpoint on the xfrm backend; ``sock`` is a socket or an address."""
    where = {"local_addr": sock} if isinstance(sock, tuple) else {"sock": sock}
    options = {"stamp": "install", **options}
    async with ipsec_aio.open_backend("xfrm", **options) as backend:
        transport, sink = await ipsec_aio.create_datagram_endpoint(Sink, backend=backend, **where)
        with closing(transport):
            yield sink


def without(monkeypatch, chain, *purposes):
    """Take rules out of the stamp, as it is installed and as it is verified."""
    whole = getattr(stamp_table, chain)
    left = tuple(rule for rule in whole.rules if rule.purpose not in purposes)
    assert len(left) == len(whole.rules) - len(purposes)
    cut = whole._replace(rules=left)
    monkeypatch.setattr(stamp_table, chain, cut)
    monkeypatch.setitem(stamp_table.CHAINS, whole.name, cut)


def believed(ptoken):
    return ptoken.assurance is Assurance.EXACT and ptoken.protected


def forge(host, source, target, mark, data):
    """Send over loopback, as a local process with privilege can: any source, any mark."""
    with host, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as local:
        local.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
        local.setsockopt(socket.SOL_SOCKET, SO_MARK, mark.to_bytes(4, sys.byteorder))
        local.bind((source, 4000))
        local.sendto(data, (target, PORT))


@GUARDED
async def test_a_mark_forged_over_loopback(bob: Host, alice: Host, monkeypatch, guarded):
    pair = protect(alice, bob)
    if not guarded:
        without(monkeypatch, "INPUT", "clear the mark")
    async with serving((bob.v4, PORT)) as sink:
        forge(bob, alice.v4, bob.v4, mark_of(pair.spi(bob)), b"forged")
        ptoken = await sink.next(b"forged", alice.v4)
        assert believed(ptoken) is not guarded
        if guarded:
            assert ptoken.assurance is Assurance.NONE
    assert pair.packets(bob) == 0


@GUARDED
async def test_a_socket_of_another_namespace(
    bob: Host, alice: Host, mallory: Host, monkeypatch, guarded
):
    """Where addresses overlap, as those of containers do, and nobody stamps the other side."""
    pair = protect(alice, bob)
    mallory.ip(f"addr add {bob.v4}/32 dev lo")
    mallory.after(lambda: mallory.ip(f"addr del {bob.v4}/32 dev lo"))
    with mallory:
        foreign = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with foreign:
        foreign.bind((bob.v4, PORT))
        if not guarded:
            with bob.udp() as own:
                ours = witness.netns_cookie(own)
            monkeypatch.setattr(witness, "netns_cookie", lambda sock: ours)
        async with serving(foreign) as sink:
            forge(mallory, alice.v4, bob.v4, mark_of(pair.spi(bob)), b"forged")
            ptoken = await sink.next(b"forged", alice.v4)
            assert believed(ptoken) is not guarded
            if guarded:
                assert ptoken.assurance is Assurance.UNKNOWN
                assert "another network namespace" in ptoken.information_string


@GUARDED
async def test_a_later_rule_that_rewrites_marks(bob: Host, alice: Host, monkeypatch, guarded):
    pair = protect(alice, bob, policies=False)
    late = f"meta mark set {mark_of(pair.spi(bob)):#x}"
    if not guarded:
        monkeypatch.setattr(stamp_table, "writers", lambda *_: ())
    async with serving((bob.v4, PORT)) as sink:
        with alice.udp() as client:
            client.sendto(b"before", (bob.v4, PORT))
            assert (await sink.next(b"before", alice.v4)).assurance is Assurance.NONE
            bob.nft(
                "table inet late { chain late { type filter hook input priority 2000000000;"
                f" udp dport {PORT} {late}\n}}\n}}\n"
            )
            client.sendto(b"clear", (bob.v4, PORT))
            ptoken = await sink.next(b"clear", alice.v4)
            if guarded:
                assert ptoken.assurance is Assurance.UNKNOWN
                assert not ptoken.protected
            else:
                client.sendto(b"later", (bob.v4, PORT))
                assert believed(await sink.next(b"later", alice.v4))
    if guarded:
        with pytest.raises(
            BackendError, match="a later rule could write the mark or the packet: table inet late"
        ):
            async with ipsec_aio.open_backend("xfrm", stamp="install"):
                pass


def assert_worthless(ptoken):
    """The number that the kernel stamped is known exactly, and proves nothing."""
    assert ptoken.assurance is Assurance.EXACT
    assert not ptoken.protected
    assert ptoken.privacy_protected is ptoken.integrity_protected is False
    for clauses in ({"encrypted": True}, {"integrity": True}):
        assert Require(assurance=Assurance.EXACT, **clauses).check(ptoken) is not None


@GUARDED
async def test_ipcomp_under_a_colliding_number(
    bob: Host, alice: Host, mallory: Host, monkeypatch, guarded
):
    spis = (0x1F01, 0x1F02)
    protect(alice, bob, GCM, spis=spis, policies=False)
    protect(alice, bob, COMP, spis=spis, policies=False)
    if not guarded:
        possible = TruthTable._possible
        monkeypatch.setattr(
            TruthTable,
            "_possible",
            lambda *words: [r for r in possible(*words) if r.sa.proto == IPPROTO_ESP],
        )
    data = b"forged " * 20
    async with serving((bob.v4, PORT)) as sink:
        mallory.inject(compressed(udp(alice.v4, bob.v4, (4000, PORT), data), spis[0]), bob)
        ptoken = await sink.next(data, alice.v4)
        assert believed(ptoken) is not guarded
        if guarded:
            assert_worthless(ptoken)


async def test_ipcomp_alone(bob: Host, alice: Host, mallory: Host):
    protect(alice, bob, COMP, spis=(0x1F03, 0x1F04), policies=False)
    data = b"forged " * 20
    async with serving((bob.v4, PORT)) as sink:
        mallory.inject(compressed(udp(alice.v4, bob.v4, (4000, PORT), data), 0x1F03), bob)
        assert_worthless(await sink.next(data, alice.v4))


@GUARDED
async def test_a_reused_spi(bob: Host, alice: Host, monkeypatch, guarded):
    """What waits in the queue came by an SA without integrity; its number names a better one."""
    pair = protect(alice, bob, BARE, spis=(0x1E01, 0x1E02))
    if not guarded:
        monkeypatch.setattr("ipsec_aio.mirror.TOMBSTONE_SECONDS", -1.0)
    async with serving((bob.v4, PORT)) as sink:
        with alice.udp() as client:
            client.sendto(b"weak", (bob.v4, PORT))
            assert pair.packets(bob) == 1
        pair.retire()
        protect(alice, bob, GCM, spis=(0x1E01, 0x1E02), policies=False)
        ptoken = await sink.next(b"weak", alice.v4)
        assert believed(ptoken) is not guarded
        assert not (guarded and ptoken.integrity_protected)


@pytest.mark.parametrize("guards", ["", "tombstone", "address", "tombstone address"])
async def test_a_reused_spi_that_moves_to_another_peer(
    bob: Host, alice: Host, carol: Host, monkeypatch, guards
):
    """Two guards: the SA that was is remembered, and the one that is must be from this address."""
    pair = protect(alice, bob, BARE, spis=(0x1E03, 0x1E04))
    if "tombstone" not in guards:
        monkeypatch.setattr("ipsec_aio.mirror.TOMBSTONE_SECONDS", -1.0)
    if "address" not in guards:
        monkeypatch.setattr(truth, "fits", lambda sa, evidence: sa.destination == evidence.local)
    async with serving((bob.v4, PORT)) as sink:
        with alice.udp() as client, carol.udp() as successor:
            client.sendto(b"weak", (bob.v4, PORT))
            assert pair.packets(bob) == 1
            pair.retire()
            other = protect(carol, bob, GCM, spis=(0x1E03, 0x1E04))
            successor.sendto(b"strong", (bob.v4, PORT))
            assert other.packets(bob) == 1
            weak = await sink.next(b"weak", alice.v4)
            assert believed(weak) is (not guards)
            assert not (guards and weak.integrity_protected)
            strong = await sink.next(b"strong", carol.v4)
            assert strong is not weak
            # Alice's SA may have carried it, for all that its number says.
            assert believed(strong) is ("tombstone" not in guards)


def half_forged(alice, bob, family):
    """A datagram in two fragments, and what it says."""
    data = b"good" * 10 + b"evil" * 10
    ends = alice.address(family, inner=True), bob.address(family, inner=True)
    return fragments(udp(*ends, (4000, PORT), data), 48), data


@GUARDED
@pytest.mark.parametrize("family", FAMILIES)
async def test_mixed_fragments(bob: Host, alice: Host, mallory: Host, monkeypatch, family, guarded):
    pair = lenient(alice, bob, GCM, "tunnel", family)
    (first, second), data = half_forged(alice, bob, family)
    to = bob.address(family, inner=True)
    if not guarded:
        without(monkeypatch, "FRAGMENTS", f"drop decrypted IPv{family} fragments")
    async with serving((to, PORT)) as sink:
        alice.send_packet(first, to)
        await eventually(lambda: pair.packets(bob) == 1)
        mallory.inject(second, bob)
        if guarded:
            with alice.udp(0, family, inner=True) as client:
                client.sendto(b"whole", (to, PORT))
                assert believed(await sink.next(b"whole", pair.address(alice)))
        else:
            assert believed(await sink.next(data, pair.address(alice)))


@GUARDED
@pytest.mark.parametrize("family", FAMILIES)
async def test_mixed_fragments_where_they_are_kept(
    bob: Host, alice: Host, mallory: Host, monkeypatch, family, guarded
):
    """An operator needs them: then what was put together from any is not known."""
    pair = lenient(alice, bob, GCM, "tunnel", family)
    (first, second), data = half_forged(alice, bob, family)
    to = bob.address(family, inner=True)
    if not guarded:
        read = witness.parse
        monkeypatch.setattr(witness, "parse", lambda told: replace(read(told), reassembled=False))
    with closing(NftSocket()) as netlink:
        stamp_table.install(netlink, owned=False, keep_fragments=True)
        async with serving((to, PORT), stamp="use") as sink:
            alice.send_packet(first, to)
            await eventually(lambda: pair.packets(bob) == 1)
            mallory.inject(second, bob)
            ptoken = await sink.next(data, pair.address(alice))
            assert believed(ptoken) is not guarded
            if guarded:
                assert ptoken.assurance is Assurance.UNKNOWN
                assert "reassembled" in ptoken.information_string
        stamp_table.remove(netlink)


@GUARDED
async def test_marked_policies_and_the_stamp(bob: Host, alice: Host, monkeypatch, guarded):
    """The stamp would undo them: so it is not installed beside them."""
    pair = protect(alice, bob, policies=False)
    pair.demand(bob, more="mark 5")
    bob.nft(
        "table inet marks { chain marks { type filter hook prerouting priority mangle;"
        " ip protocol udp meta mark set 5\n}\n}\n"
    )
    if guarded:
        with pytest.raises(BackendError, match=r"marks belong to someone else here.*policies"):
            async with serving((bob.v4, PORT)):
                pass
        with bob.udp(PORT) as server, alice.udp() as client:
            await refused(bob, lambda: client.sendto(b"clear", (bob.v4, PORT)))
            with pytest.raises(BlockingIOError):
                server.recv(100)
    else:
        monkeypatch.setattr(XfrmBackend, "_mark_users", lambda backend: MarkUsers())
        async with serving((bob.v4, PORT)) as sink:
            with alice.udp() as client:
                client.sendto(b"clear", (bob.v4, PORT))
                assert not (await sink.next(b"clear", alice.v4)).protected


@pytest.mark.parametrize("words", ["mark 5", "output-mark 0x1001"])
async def test_marked_sas_keep_the_stamp_away(bob: Host, alice: Host, words):
    protect(alice, bob, extra=words, policies=False)
    with pytest.raises(BackendError, match=r"marks belong to someone else here.*SAs"):
        async with ipsec_aio.open_backend("xfrm", stamp="install"):
            pass
    assert "ipsec_aio" not in bob.show("nft", "list", "tables")


async def inferred(bob, alice, to, guarded):
    """Send in clear what a policy seems to forbid; return its token."""
    async with serving((bob.v4, PORT), stamp="off", trust_policy=not guarded) as sink:
        with alice.udp() as client:
            client.sendto(b"clear", (bob.v4, to))
            return await sink.next(b"clear", alice.v4)


@GUARDED
@pytest.mark.parametrize("lie", ["disable_policy", "redirect"])
async def test_policies_are_inference(bob: Host, alice: Host, monkeypatch, guarded, lie):
    """The guard: what is known by policy alone is not protected, unless trust_policy says so."""
    pair = protect(alice, bob, policies=False)
    pair.demand(bob, selector=f"proto udp dport {PORT}")
    with bob.udp(PORT) as server, alice.udp() as client:
        await refused(bob, lambda: client.sendto(b"clear", (bob.v4, PORT)))
        with pytest.raises(BlockingIOError):
            server.recv(100)
    if lie == "disable_policy":
        bob.sysctl("net/ipv4/conf/eth0/disable_policy", 1)
        ptoken = await inferred(bob, alice, PORT, guarded)
    else:
        bob.nft(
            "table ip lie { chain lie { type nat hook prerouting priority dstnat;"
            f" udp dport {OTHER_PORT} redirect to :{PORT}\n}}\n}}\n"
        )
        ptoken = await inferred(bob, alice, OTHER_PORT, guarded)
    assert ptoken.assurance is Assurance.POLICY
    assert ptoken.protected is not guarded
    assert pair.packets(bob) == 0
    async with serving((bob.v4, PORT)) as sink:
        with alice.udp() as client:
            client.sendto(b"again", (bob.v4, PORT if lie == "disable_policy" else OTHER_PORT))
            assert (await sink.next(b"again", alice.v4)).assurance is Assurance.NONE


class Peer(ipsec_aio.Protocol):
    def __init__(self):
        self.made = asyncio.get_running_loop().create_future()
        self.data = asyncio.Queue()

    def connection_made(self, transport, ptoken):
        self.transport = transport
        self.made.set_result(ptoken)

    def data_received(self, data):
        self.data.put_nowait((data, ipsec_aio.current_ptoken()))

    def eof_received(self):
        self.data.put_nowait((b"", ipsec_aio.current_ptoken()))

    async def next(self):
        """Return what comes next (nothing: the end) and its token."""
        async with asyncio.timeout(PATIENCE):
            return await self.data.get()


@pytest.mark.parametrize("guards", [0, 1, 2])
async def test_a_marked_listener(bob: Host, alice: Host, monkeypatch, guards):
    """Two guards: the stamp drops clear segments to it, and its connections do not count."""
    pair = protect(alice, bob, policies=False)
    if guards < 2:
        without(monkeypatch, "INPUT", "drop clear segments on stamped connections")
    if guards < 1:
        monkeypatch.setattr(listening.Listener, "_is_marked", lambda listener: False)
    loop = asyncio.get_running_loop()
    listener = bob.tcp(PORT)
    listener.setsockopt(
        socket.SOL_SOCKET, SO_MARK, mark_of(pair.spi(bob)).to_bytes(4, sys.byteorder)
    )
    peer = Peer()
    async with ipsec_aio.open_backend("xfrm", stamp="install") as backend:
        server = await ipsec_aio.create_server(lambda: peer, sock=listener, backend=backend)
        with alice.tcp() as client:
            connected = loop.create_task(loop.sock_connect(client, (bob.v4, PORT)))
            done, _ = await asyncio.wait([connected], timeout=0.5 if guards == 2 else PATIENCE)
            assert bool(done) is (guards < 2)
            if done:
                ptoken = await asyncio.wait_for(peer.made, PATIENCE)
                assert believed(ptoken) is (guards == 0)
                if guards:
                    assert ptoken.assurance is Assurance.UNKNOWN
                    assert "a mark of its own" in ptoken.information_string
                peer.transport.abort()
            else:
                connected.cancel()
                await asyncio.wait([connected])
                assert not peer.made.done()
        server.close()
        await server.wait_closed()


@asynccontextmanager
async def accepting(bob, peer):
    """A server that hands its connection to a Peer."""
    async with ipsec_aio.open_backend("xfrm", stamp="install") as backend:
        server = await ipsec_aio.create_server(lambda: peer, bob.v4, PORT, backend=backend)
        try:
            yield
        finally:
            if peer.made.done():
                peer.transport.abort()
            server.close()
            await server.wait_closed()


def repeats(client):
    """How often TCP has sent again what it last sent (linux/tcp.h, tcpi_retransmits)."""
    return client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[2]


@GUARDED
async def test_clear_segments_after_a_flush(bob: Host, alice: Host, monkeypatch, guarded):
    pair = protect(alice, bob)
    if not guarded:  # the second drops all data that is clear, where the first is passed
        without(
            monkeypatch,
            "INPUT",
            "drop clear segments on stamped connections",
            "drop clear data that would complete a handshake",
        )
    peer = Peer()
    async with accepting(bob, peer):
        with alice.tcp() as client:
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, (bob.v4, PORT))
            await loop.sock_sendall(client, b"sealed")
            assert believed(await asyncio.wait_for(peer.made, PATIENCE))
            assert (await peer.next())[0] == b"sealed"
            count = pair.packets(bob)
            alice.flush_policies()
            bob.flush_policies()
            client.send(b"clear")
            if guarded:
                await eventually(lambda: repeats(client) > 1)
                assert peer.data.empty()
                assert pair.packets(bob) == count
                pair.demand()  # from here on TCP sends it again under ESP
            data, ptoken = await peer.next()
            assert data == b"clear"
            assert believed(ptoken)
            assert (pair.packets(bob) > count) is guarded


@GUARDED
async def test_a_clear_end_after_a_flush(bob: Host, alice: Host, monkeypatch, guarded):
    """A stream that is cut short is a lie, too."""
    pair = protect(alice, bob)
    if not guarded:
        without(monkeypatch, "INPUT", "drop clear segments on stamped connections")
    peer = Peer()
    async with accepting(bob, peer):
        with alice.tcp() as client:
            await asyncio.get_running_loop().sock_connect(client, (bob.v4, PORT))
            assert believed(await asyncio.wait_for(peer.made, PATIENCE))
            count = pair.packets(bob)
            alice.flush_policies()
            bob.flush_policies()
            client.shutdown(socket.SHUT_WR)
            if guarded:
                await eventually(lambda: repeats(client) > 1)
                assert peer.data.empty()
                pair.demand()
            assert (await peer.next())[0] == b""
            assert (pair.packets(bob) > count) is guarded


@GUARDED
async def test_clear_data_that_completes_a_handshake(bob: Host, alice: Host, monkeypatch, guarded):
    pair = lenient(alice, bob)
    if not guarded:
        without(monkeypatch, "INPUT", "drop clear data that would complete a handshake")
    alice.nft(
        "table inet hush { chain hush { type filter hook output priority 0;"
        f" tcp dport {PORT} tcp flags & (syn | ack | psh) == ack drop\n}}\n}}\n"
    )
    peer = Peer()
    async with accepting(bob, peer):
        with alice.tcp() as client:
            await asyncio.get_running_loop().sock_connect(client, (bob.v4, PORT))
            count = pair.packets(bob)
            alice.flush_policies()
            client.send(b"clear")
            if guarded:
                await eventually(lambda: repeats(client) > 1)
                assert not peer.made.done()
                alice.show("nft", "flush", "ruleset")
                # Bob asks again, and is answered without data.
                assert believed(await asyncio.wait_for(peer.made, PATIENCE))
                assert peer.data.empty()
                pair.demand(alice)
            data, ptoken = await peer.next()
            assert data == b"clear"
            assert believed(ptoken)
            assert (pair.packets(bob) > count) is guarded


@GUARDED
async def test_a_listener_of_another_namespace(
    bob: Host, alice: Host, mallory: Host, monkeypatch, guarded
):
    pair = protect(alice, bob)
    addresses = [f"addr {{}} {address}/32 dev lo" for address in (bob.v4, alice.v4)]
    mallory.ip(*(line.format("add") for line in addresses))
    mallory.after(lambda: mallory.ip(*(line.format("del") for line in addresses)))
    mallory.sysctl("net/ipv4/tcp_fwmark_accept", 1)
    with mallory:
        foreign, client = socket.socket(), socket.socket()
    foreign.bind((bob.v4, PORT))
    if not guarded:
        with bob.udp() as own:
            ours = witness.netns_cookie(own)
        monkeypatch.setattr(listening, "netns_cookie", lambda sock: ours)
    peer = Peer()
    async with ipsec_aio.open_backend("xfrm", stamp="install") as backend:
        server = await ipsec_aio.create_server(lambda: peer, sock=foreign, backend=backend)
        with client:
            client.setblocking(False)
            mark = mark_of(pair.spi(bob))
            client.setsockopt(socket.SOL_SOCKET, SO_MARK, mark.to_bytes(4, sys.byteorder))
            client.bind((alice.v4, 0))
            await asyncio.get_running_loop().sock_connect(client, (bob.v4, PORT))
            ptoken = await asyncio.wait_for(peer.made, PATIENCE)
            assert believed(ptoken) is not guarded
            if guarded:
                assert ptoken.assurance is Assurance.UNKNOWN
                assert "another network namespace" in ptoken.information_string
            peer.transport.abort()
        server.close()
        await server.wait_closed()


XFRM_ADDRESS = "10.7.0.1"


@pytest.mark.parametrize("guards", [0, 1, 2])
async def test_a_send_to_the_own_address_of_an_xfrm_interface(
    bob: Host, alice: Host, monkeypatch, guards
):
    """It reports that interface, past the policies. Two guards: interfaces, and own addresses."""
    pair = protect(alice, bob, mode="tunnel", policies=False)
    bob.interface("ipsec0", 7)
    bob.ip(f"addr add {XFRM_ADDRESS}/32 dev ipsec0")
    bob.ip("xfrm policy add dir in tmpl proto esp reqid 1 mode tunnel")
    if guards < 2:
        opaque = property(lambda table: False, lambda table, value: None)
        monkeypatch.setattr(TruthTable, "opaque_interfaces", opaque, raising=False)
    if guards < 1:
        monkeypatch.setattr(XfrmBackend, "_is_own", lambda backend, address: False)
    async with serving(("0.0.0.0", PORT), stamp="off", trust_policy=True) as sink:
        with bob, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as local:
            local.bind((bob.v4, 0))
            local.sendto(b"clear", (XFRM_ADDRESS, PORT))
        ptoken = await sink.next(b"clear", bob.v4)
        assert ptoken.protected is (guards == 0)
        assert ptoken.assurance is (Assurance.UNKNOWN if guards else Assurance.POLICY)
        reasons = ("", "what this host sends to itself", "through an xfrm interface")
        assert reasons[guards] in ptoken.information_string
    assert pair.packets(bob) == 0


@GUARDED
@pytest.mark.parametrize("change", ["added", "bypass removed"])
async def test_what_was_queued_when_a_policy_came_into_force(
    bob: Host, alice: Host, monkeypatch, guarded, change
):
    """Clear datagrams wait, and the policy that is asked about them was not the first then."""
    pair = protect(alice, bob, policies=False)
    bypass = f"src {alice.v4} dst {bob.v4} proto udp dir in"
    if change == "bypass removed":
        pair.demand(bob, more="priority 20")
        bob.ip(f"xfrm policy add {bypass} priority 10")
    if not guarded:
        monkeypatch.setattr(SPD, "stood", lambda *_: True)
    async with serving((bob.v4, PORT), stamp="off", trust_policy=True) as sink:
        with alice.udp() as client:
            for _ in range(100):
                client.sendto(b"clear", (bob.v4, PORT))
            if change == "added":
                pair.demand(bob)
            else:
                bob.ip(f"xfrm policy delete {bypass}")
            await refused(bob, lambda: client.sendto(b"clear", (bob.v4, PORT)))
            for _ in range(100):
                ptoken = await sink.next(b"clear", alice.v4)
                assert ptoken.protected is not guarded
        alice.ip(pair.policies("add", alice)[1])
        with alice.udp() as client:
            client.sendto(b"sealed", (bob.v4, PORT))
            assert (await sink.next(b"sealed", alice.v4)).protected
    assert pair.packets(bob) == 1


@GUARDED
async def test_a_policy_for_the_interface_that_it_came_in_by(
    bob: Host, alice: Host, monkeypatch, guarded
):
    """The kernel compares the route's device, lo, and lets it in."""
    pair = protect(alice, bob, policies=False)
    pair.demand(bob, selector="dev eth0")
    if not guarded:
        monkeypatch.setattr(Mirror, "names_interface_inbound", lambda _: False)
    async with serving(("0.0.0.0", PORT), stamp="off", trust_policy=True) as sink:
        with alice.udp() as client:
            client.sendto(b"clear", (bob.v4, PORT))
            ptoken = await sink.next(b"clear", alice.v4)
    assert ptoken.assurance is (Assurance.UNKNOWN if guarded else Assurance.POLICY)
    assert ptoken.protected is not guarded
    assert pair.packets(bob) == 0


@GUARDED
async def test_an_xfrm_interface_of_another_namespace(
    bob: Host, alice: Host, carol: Host, monkeypatch, guarded
):
    """What carol decrypts for bob reaches him without its security path, as if in clear."""
    pair = protect(alice, carol, mode="tunnel", policies=False)
    carol.ip(*pair.states("delete"))
    pair.extra = "if_id 7"
    carol.ip(*pair.states("add"))
    demanded = f"tmpl src {alice.v4} dst {carol.v4} proto esp reqid 1 mode tunnel"
    alice.ip(f"xfrm policy add dir out src {alice.inner4} dst {bob.inner4} {demanded}")
    carol.ip("link add ipsec0 type xfrm dev eth0 if_id 7", "link set ipsec0 netns bob")
    bob.after(lambda: bob.ip("link del ipsec0"))
    bob.ip("link set ipsec0 up")
    carol.ip(f"xfrm policy add dir in src {alice.inner4} dst {bob.inner4} if_id 7 {demanded}")
    if not guarded:
        opaque = property(lambda table: False, lambda table, value: None)
        monkeypatch.setattr(TruthTable, "opaque_interfaces", opaque, raising=False)
    async with serving((bob.inner4, PORT)) as sink:
        with alice.udp(0, inner=True) as client:
            client.sendto(b"sealed", (bob.inner4, PORT))
            ptoken = await sink.next(b"sealed", alice.inner4)
    assert pair.packets(carol) == 1
    assert ptoken.assurance is (Assurance.UNKNOWN if guarded else Assurance.NONE)
