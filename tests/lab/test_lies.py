"""How evidence lies, played by adversaries who win only where the guard is taken out.

Each test runs twice: ``guarded`` False takes out the one guard that it is about, and shows that
the lie is believed then; True shows that it is not. What is clear comes from alice's own address,
or has it forged, so that nothing but the guard stands between the lie and an SA of hers.
"""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest
from hosts import (
    AH,
    BARE,
    COMP,
    FAMILIES,
    GCM,
    PATIENCE,
    Host,
    eventually,
    lenient,
    mark_of,
    protect,
    refused,
)
from lies import GUARDED, PORT, believed, forge, lasting_stamp, serving, without
from packets import compressed, half_forged, udp

import ipsec_aio
from ipsec_aio import Assurance, BackendError, Require, truth
from ipsec_aio.backends.tables import TableBackend
from ipsec_aio.backends.xfrm import XfrmBackend
from ipsec_aio.kernel import stamp_table
from ipsec_aio.kernel.stamp import KernelStamp
from ipsec_aio.kernel.stamp_marks import MarkUsers
from ipsec_aio.mirror import Mirror
from ipsec_aio.net import witness
from ipsec_aio.protection import CLEAR
from ipsec_aio.sa import IPPROTO_ESP
from ipsec_aio.spd import SPD
from ipsec_aio.truth import MISSING, Finding, TruthTable

OTHER_PORT = 6000


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
async def test_a_stamp_that_is_lost(bob: Host, alice: Host, monkeypatch, guarded):
    """Who does not watch it goes on to believe marks that nobody clears any more."""
    pair = protect(alice, bob, policies=False)
    mark = mark_of(pair.spi(bob))
    with lasting_stamp() as netlink:
        async with serving((bob.v4, PORT), stamp="use") as sink:
            forge(bob, alice.v4, bob.v4, mark, b"before")
            assert (await sink.next(b"before", alice.v4)).assurance is Assurance.NONE
            if not guarded:
                monkeypatch.setattr(KernelStamp, "_news", lambda stamp: 0)
            stamp_table.remove(netlink)
            forge(bob, alice.v4, bob.v4, mark, b"after")
            ptoken = await sink.next(b"after", alice.v4)
            assert believed(ptoken) is not guarded
            if guarded:
                assert ptoken.assurance is Assurance.UNKNOWN
    assert pair.packets(bob) == 0


@GUARDED
async def test_a_stamp_whose_loss_nobody_has_told_yet(bob: Host, alice: Host, monkeypatch, guarded):
    """What comes under an SA is not marked any more, and would pass for clear."""
    pair = protect(alice, bob, policies=False)
    pair.demand(alice)
    with lasting_stamp() as netlink:
        async with serving((bob.v4, PORT), stamp="use") as sink:
            with alice.udp() as sock:
                sock.sendto(b"before", (bob.v4, PORT))
                assert believed(await sink.next(b"before", alice.v4))
                monkeypatch.setattr(KernelStamp, "_news", lambda stamp: 0)
                if not guarded:
                    monkeypatch.setattr(KernelStamp, "stands", lambda stamp: True)
                stamp_table.remove(netlink)
                sock.sendto(b"after", (bob.v4, PORT))
                ptoken = await sink.next(b"after", alice.v4)
            assert ptoken.assurance is (Assurance.UNKNOWN if guarded else Assurance.NONE)
            assert "just have been lost" in ptoken.information_string or not guarded
    assert pair.packets(bob) == 2


@GUARDED
async def test_what_was_queued_before_the_stamp(bob: Host, alice: Host, monkeypatch, guarded):
    """Nobody cleared its mark."""
    pair = protect(alice, bob, policies=False)
    mark = mark_of(pair.spi(bob))
    if not guarded:  # as if there were nothing in the queue
        monkeypatch.setattr(witness, "is_readable", lambda sock: False)
    with bob.udp(PORT) as sock:
        forge(bob, alice.v4, bob.v4, mark, b"early")
        async with serving(sock) as sink:
            ptoken = await sink.next(b"early", alice.v4)
            assert believed(ptoken) is not guarded
            if guarded:
                assert ptoken.assurance is Assurance.UNKNOWN
                assert "before the stamp" in ptoken.information_string
            forge(bob, alice.v4, bob.v4, mark, b"late")
            assert (await sink.next(b"late", alice.v4)).assurance is Assurance.NONE
    assert pair.packets(bob) == 0


@pytest.mark.parametrize("guards", [0, 1, 2])
async def test_an_sa_that_the_mirror_has_not_seen_yet(
    bob: Host, alice: Host, mallory: Host, monkeypatch, guards
):
    """Its event is late. Two guards: it is asked for, and a miss is no absence."""
    deaf = False
    drain, ask, by_spi = XfrmBackend.drain, XfrmBackend.lookup_missing, TruthTable._by_spi
    monkeypatch.setattr(
        XfrmBackend, "drain", lambda backend: (TableBackend.drain if deaf else drain)(backend)
    )
    monkeypatch.setattr("ipsec_aio.tokens.PENDING_SECONDS", PATIENCE)
    if guards < 2:
        monkeypatch.setattr(
            XfrmBackend, "lookup_missing", lambda backend, key: not deaf and ask(backend, key)
        )
    if guards < 1:

        def absent(table, evidence):
            finding = by_spi(table, evidence)
            return Finding(CLEAR) if finding is MISSING else finding

        monkeypatch.setattr(TruthTable, "_by_spi", absent)
    async with serving((bob.v4, PORT)) as sink:
        deaf = True
        pair = protect(alice, bob)
        with alice.udp() as client, mallory.udp() as clear:
            client.sendto(b"sealed", (bob.v4, PORT))
            assert pair.packets(bob) == 1
            ptoken = await sink.next(b"sealed", alice.v4)
            clear.sendto(b"clear", (bob.v4, PORT))
            assert (await sink.next(b"clear", mallory.v4)).assurance is Assurance.NONE
            assert believed(ptoken) is (guards == 2)
            if guards == 0:
                assert ptoken.assurance is Assurance.NONE
                assert ptoken.privacy_protected is False
            elif guards == 1:
                assert ptoken.assurance is Assurance.UNKNOWN
                assert ptoken.privacy_protected is None
            deaf = False
            if guards:
                settled = await ptoken.resolved(timeout=PATIENCE)
                assert believed(settled)
                assert settled.privacy_protected is True
                client.sendto(b"again", (bob.v4, PORT))
                assert await sink.next(b"again", alice.v4) is settled


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


def only(proto, monkeypatch):
    """Have a number stand for the SAs of one protocol."""
    possible = TruthTable._possible
    monkeypatch.setattr(
        TruthTable, "_possible", lambda *words: [r for r in possible(*words) if r.sa.proto == proto]
    )


@GUARDED
async def test_ipcomp_under_a_colliding_number(
    bob: Host, alice: Host, mallory: Host, monkeypatch, guarded
):
    spis = (0x1F01, 0x1F02)
    protect(alice, bob, GCM, spis=spis, policies=False)
    protect(alice, bob, COMP, spis=spis, policies=False)
    if not guarded:
        only(IPPROTO_ESP, monkeypatch)
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


async def test_ah_around_esp(bob: Host, alice: Host):
    """The stamp names the outermost SA. What is inside is not claimed: it need not be there."""
    inside = protect(alice, bob, GCM, policies=False)
    outside = protect(alice, bob, AH, reqid=2, policies=False)
    out = f"src {alice.v4} dst {bob.v4} dir out"
    esp, ah = "tmpl proto esp reqid 1 mode transport", "tmpl proto ah reqid 2 mode transport"
    alice.ip(f"xfrm policy add {out} {esp} {ah}")
    async with serving((bob.v4, PORT)) as sink:
        with alice.udp() as client:
            client.sendto(b"sealed", (bob.v4, PORT))
            ptoken = await sink.next(b"sealed", alice.v4)
            assert (inside.packets(bob), outside.packets(bob)) == (1, 1)
            assert believed(ptoken)
            assert [sa.spi for sa in ptoken.sas] == [outside.spi(bob)]
            assert ptoken.privacy_protected is False
            assert ptoken.integrity_protected is True
            assert Require(encrypted=True).check(ptoken) is not None
            assert Require(integrity=True).check(ptoken) is None
            alice.ip(f"xfrm policy update {out} {ah}")
            client.sendto(b"readable", (bob.v4, PORT))
            assert await sink.next(b"readable", alice.v4) is ptoken
            assert (inside.packets(bob), outside.packets(bob)) == (1, 2)


@GUARDED
async def test_ah_under_the_number_of_an_esp_sa(bob: Host, alice: Host, monkeypatch, guarded):
    spis = (0x1F05, 0x1F06)
    sealing = protect(alice, bob, GCM, spis=spis, policies=False)
    signing = protect(alice, bob, AH, reqid=2, spis=spis, policies=False)
    signing.demand(alice)
    if not guarded:
        only(IPPROTO_ESP, monkeypatch)
    async with serving((bob.v4, PORT)) as sink:
        with alice.udp() as client:
            client.sendto(b"readable", (bob.v4, PORT))
            ptoken = await sink.next(b"readable", alice.v4)
    assert (sealing.packets(bob), signing.packets(bob)) == (0, 1)
    assert believed(ptoken)
    assert ptoken.integrity_protected is True
    assert ptoken.privacy_protected is not guarded
    assert (Require(encrypted=True).check(ptoken) is None) is not guarded


def forget(monkeypatch: pytest.MonkeyPatch, guards: str) -> None:
    """Take out what remembers SAs that went, and that their numbers did."""
    if "tombstone" not in guards:
        monkeypatch.setattr("ipsec_aio.mirror.TOMBSTONE_SECONDS", -1.0)
    if "number" not in guards:
        monkeypatch.setattr("ipsec_aio.mirror.Mirror.forgotten", lambda mirror, spi: 0)


@pytest.mark.parametrize("guards", ["", "tombstone", "number"])
async def test_a_reused_spi(bob: Host, alice: Host, monkeypatch, guards):
    """What waits in the queue came by an SA without integrity; its number names a better one."""
    pair = protect(alice, bob, BARE, spis=(0x1E01, 0x1E02))
    forget(monkeypatch, guards)
    async with serving((bob.v4, PORT)) as sink:
        with alice.udp() as client:
            client.sendto(b"weak", (bob.v4, PORT))
            assert pair.packets(bob) == 1
        pair.retire()
        protect(alice, bob, GCM, spis=(0x1E01, 0x1E02), policies=False)
        ptoken = await sink.next(b"weak", alice.v4)
        assert believed(ptoken) is (not guards)
        assert not (guards and ptoken.integrity_protected)


@pytest.mark.parametrize("guards", ["", "tombstone", "number", "address", "tombstone address"])
async def test_a_reused_spi_that_moves_to_another_peer(
    bob: Host, alice: Host, carol: Host, monkeypatch, guards
):
    """Three guards: the SA that was is remembered, and then when its number went; and the one that
    is must be from this address.
    """
    pair = protect(alice, bob, BARE, spis=(0x1E03, 0x1E04))
    forget(monkeypatch, guards)
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
            assert believed(strong) is (guards in ("", "address"))


@GUARDED
@pytest.mark.parametrize("family", FAMILIES)
async def test_mixed_fragments(bob: Host, alice: Host, mallory: Host, monkeypatch, family, guarded):
    pair = lenient(alice, bob, GCM, "tunnel", family)
    to = bob.address(family, inner=True)
    (first, second), data = half_forged(pair.address(alice), to, (4000, PORT))
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
    to = bob.address(family, inner=True)
    (first, second), data = half_forged(pair.address(alice), to, (4000, PORT))
    if not guarded:
        read = witness.parse
        monkeypatch.setattr(witness, "parse", lambda told: replace(read(told), reassembled=False))
    with lasting_stamp(keep_fragments=True):
        async with serving((to, PORT), stamp="use") as sink:
            alice.send_packet(first, to)
            await eventually(lambda: pair.packets(bob) == 1)
            mallory.inject(second, bob)
            ptoken = await sink.next(data, pair.address(alice))
            assert believed(ptoken) is not guarded
            if guarded:
                assert ptoken.assurance is Assurance.UNKNOWN
                assert "reassembled" in ptoken.information_string


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
