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

import pytest
from hosts import BARE, COMP, GCM, PATIENCE, Host, protect
from packets import compressed, udp

import ipsec_aio
from ipsec_aio import Assurance, BackendError
from ipsec_aio.backends.xfrm import XfrmBackend
from ipsec_aio.kernel import stamp_table
from ipsec_aio.kernel.stamp_marks import MarkUsers
from ipsec_aio.net import listening, witness
from ipsec_aio.sa import IPPROTO_ESP
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
            BackendError, match="a later rule could write the mark: table inet late"
        ):
            async with ipsec_aio.open_backend("xfrm", stamp="install"):
                pass


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
        assert ptoken.protected is not guarded
        if guarded:
            assert ptoken.integrity_protected is not True
            assert ptoken.privacy_protected is not True


@GUARDED
async def test_a_reused_spi(bob: Host, alice: Host, carol: Host, monkeypatch, guarded):
    """What waits in the queue came by an SA without integrity; its number names a better one."""
    pair = protect(alice, bob, BARE, spis=(0x1E01, 0x1E02))
    if not guarded:
        bury = "ipsec_aio.mirror.TOMBSTONE_SECONDS"
        monkeypatch.setattr(bury, -1.0)
    async with serving((bob.v4, PORT)) as sink:
        with alice.udp() as client:
            client.sendto(b"weak", (bob.v4, PORT))
            assert pair.packets(bob) == 1
        pair.retire()
        protect(alice, bob, GCM, spis=(0x1E01, 0x1E02), policies=False)
        ptoken = await sink.next(b"weak", alice.v4)
        assert believed(ptoken) is not guarded
        assert not (guarded and ptoken.integrity_protected)


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
            client.sendto(b"clear", (bob.v4, PORT))
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
    monkeypatch.setattr("ipsec_aio.mirror.POLICY_AGE", 0.0)
    with bob.udp(PORT) as server, alice.udp() as client:
        client.sendto(b"clear", (bob.v4, PORT))
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
