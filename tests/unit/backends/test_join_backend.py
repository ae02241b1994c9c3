"""The kernel's SAs joined with charon's word on them: both in memory."""

from __future__ import annotations

import asyncio
import errno
import sys

import pytest
import xfrm_messages as m
from fake_netlink import FakeKernel
from joined_bench import Charon, JoinedBench, joined, known, until
from xfrm_bench import synced

from ipsec_aio.backends import join as module
from ipsec_aio.backends import open_backend
from ipsec_aio.backends.join import XfrmViciBackend
from ipsec_aio.backends.static import StaticIdentities
from ipsec_aio.errors import BackendDenied, BackendUnavailable
from ipsec_aio.evidence import IPPROTO_TCP, IPPROTO_UDP, Evidence
from ipsec_aio.flow import Flow, pack_address
from ipsec_aio.identities import Identities
from ipsec_aio.identity import AuthenticationMethod
from ipsec_aio.testing import Arrivals, IdentityConformance

ALICE, BOB = "alice.example.org", "bob.example.org"


@pytest.fixture
async def charon(tmp_path):
    charon = Charon(tmp_path / "vici")
    await charon.start()
    yield charon
    await charon.stop()


@pytest.fixture
def kernel():
    kernel = FakeKernel()
    yield kernel
    assert all(s.closed for s in kernel.opened)


@pytest.fixture
async def bench(kernel, charon, netns):
    backend = await joined(kernel, charon, stamp="install")
    yield JoinedBench(backend, kernel, charon)
    await backend.aclose()


class TestConformance(IdentityConformance):
    """With the stamp of this machine's kernel, and all the rest in memory."""


class TestJoining(Arrivals):
    async def of(self, bench, peer, spi=0x1001):
        await self._sa(bench, spi)
        await bench.identify(src=bench.peer, dst=bench.local, spi=spi, peer=peer, local="me")

    async def test_charon_s_end_takes_nothing_back(self, bench, charon):
        backend = bench.backend
        await self.of(bench, ALICE)
        token = await self._arrive(bench, 0x1001)
        await charon.stop()
        await until(backend, lambda: not backend.watcher.table.synced)
        assert await self._arrive(bench, 0x1001) is token
        await self._sa(bench, 0x1002)
        late = await self._arrive(bench, 0x1002)
        assert late.pending
        await bench.pass_time(3)
        assert not late.pending
        assert late.peer is None
        charon.ikes.clear()
        charon.list_sas()
        await charon.start()
        await until(backend, lambda: backend.watcher.table.synced)
        assert await self._arrive(bench, 0x1001) is token

    async def test_after_a_loss_charon_is_asked_again(self, bench):
        await self.of(bench, ALICE)
        token = await self._arrive(bench, 0x1001)
        await bench.lose_events()
        await synced(bench.backend)
        await until(bench.backend, lambda: known(bench.backend, 0x1001))
        assert await self._arrive(bench, 0x1001) is token

    async def test_a_peer_that_moved_is_the_same_when_charon_says_so(self, bench, charon):
        await self.of(bench, ALICE)
        token = await self._arrive(bench, 0x1001)
        # charon takes the SA away and puts it back with other addresses.
        await bench.delete_sa(src=bench.peer, dst=bench.local, spi=0x1001)
        charon.ikes[1]["net"]["remote-host"] = bench.other.encode()
        charon.list_sas()
        await self._sa(bench, 0x1001, src=bench.other)
        moved = await self._arrive(bench, 0x1001, bench.other)
        assert moved.peer is None
        await until(bench.backend, lambda: known(bench.backend, 0x1001))
        settled = await moved.resolved(5)
        assert settled.peer == token.peer
        assert settled is not token

    async def test_a_number_that_is_used_again(self, bench, charon):
        await self.of(bench, ALICE)
        hers = await self._arrive(bench, 0x1001)
        charon.goes(charon.ike(ALICE))
        await bench.delete_sa(src=bench.peer, dst=bench.local, spi=0x1001)
        await self._sa(bench, 0x1001)
        charon.comes(charon.ike(BOB, number=2), charon.child(0x1001, number=77))
        await until(
            bench.backend,
            lambda: (
                {
                    str(answer.peer)
                    for record in bench.backend.mirror.sad.numbered(0x1001)
                    if isinstance(answer := bench.backend.identities_of(record, 0), Identities)
                }
                == {BOB}
            ),
        )
        assert (await self._arrive(bench, 0x1001)).peer is None, "hers may be queued"
        await bench.pass_time(11)
        his = await self._arrive(bench, 0x1001)
        assert (str(hers.peer), str(his.peer)) == (ALICE, BOB)

    async def nobody(self, bench, charon, spi=0x1001):
        """An SA of alice's, of whom nothing is told."""
        await self._sa(bench, spi)
        charon.comes(charon.ike(ALICE, number=spi), charon.child(spi))
        table = bench.backend.watcher.table
        await until(bench.backend, lambda: any(each.unique_id == spi for each in table.sas()))
        token = await self._arrive(bench, spi)
        assert token.pending
        return token

    async def pair(self, bench, spi=0x1001):
        """The SAs of one of charon's children."""
        await self._sa(bench, spi, reqid=1)
        await self._sa(bench, spi + 0x10000, src=bench.local, dst=bench.peer, reqid=1)

    def ask(self, bench, token):
        bench.backend.drain()
        local, peer = map(pack_address, (bench.local, bench.peer))
        return bench.backend.sends_like(token, Flow(local, peer, IPPROTO_UDP, 5000, 40000))

    async def test_a_reply_to_a_peer_who_is_known(self, bench, charon):
        await bench.add_policy(src=bench.local, dst=bench.peer, direction="out", reqid=1)
        await self.pair(bench)
        charon.comes(charon.ike(ALICE), charon.child(0x1001))
        await until(bench.backend, lambda: known(bench.backend, 0x1001))
        token = await self._arrive(bench, 0x1001)
        assert str(token.peer) == ALICE
        assert self.ask(bench, token) is None
        # Somebody else's, behind the same address.
        charon.comes(charon.ike(BOB, number=2), charon.child(0x3001, number=2))
        await self.pair(bench, 0x3001)
        assert "somebody unknown" in str(self.ask(bench, token))
        await until(bench.backend, lambda: known(bench.backend, 0x3001))
        assert BOB in str(self.ask(bench, token))
        assert BOB in str((await self._arrive(bench, 0x3001)).peer)

    async def test_what_charon_tells_of_by_itself_is_not_listed(self, bench, charon):
        """Neither for a latch, nor for a reply, nor for a packet that was faster than charon."""
        backend = bench.backend

        def listings():
            return sum(p.name == "list-sas" and not p.message for p in charon.asked)

        charon.comes(charon.ike(ALICE), charon.child(0x1001))
        await self.pair(bench)
        await until(backend, lambda: known(backend, 0x1001))
        token = await self._arrive(bench, 0x1001)
        local, peer = map(pack_address, (bench.local, bench.peer))
        connection = Evidence(IPPROTO_TCP, local, 5000, peer, 40000)
        # That everything is listed a while after it was opened is another matter.
        backend._listing.cancel()
        backend._listing = None

        charon.asked.clear()
        await self.pair(bench, 0x1002)
        backend.drain()
        backend.outlook(connection)
        self.ask(bench, token)
        late = await self._arrive(bench, 0x1002)
        charon.comes(charon.ike(ALICE), charon.child(0x1002))
        assert await late.resolved(5) is token
        outbound = backend.outlook(connection).outbound
        assert {str(each.peer) for each in outbound} == {ALICE}
        # Longer than it would take to be listed.
        await asyncio.sleep(1.2 * module.LISTED_SECONDS)
        assert backend._listing is None
        assert listings() == 0
        # What it does not tell of is asked for, by whatever asks.
        await self.pair(bench, 0x9001)
        backend.drain()
        backend.outlook(connection)
        async with asyncio.timeout(5):
            await charon.until(lambda: listings() == 1)

    async def test_how_it_was_proved(self, bench, charon):
        charon.list_conn({"id": ALICE.encode(), "class": b"pre-shared key"})
        await bench.backend._list_proofs()
        await self.of(bench, ALICE)
        peer = (await self._arrive(bench, 0x1001)).peer
        assert peer.authentication_method is AuthenticationMethod.PRESHAREDKEY

    async def test_configuration_is_known_beforehand(self, bench, charon, monkeypatch):
        bench.backend._unproved.set()
        monkeypatch.setattr(module, "_PROOF_INTERVAL", 0.001)
        charon.asked.clear()
        charon.list_conn({"class": b"public key"})
        async with asyncio.timeout(10):
            await charon.until(
                lambda: {"list-conns", "list-certs"} <= {p.name for p in charon.asked}
            )

    async def test_before_anything_is_proved(self, bench, charon):
        """charon lists who is still proving who he is, with the name that he chose."""
        charon.list_conn({"class": b"EAP", "eap_id": b"%any"})
        claim = charon.ike("admin.example.org", state="CONNECTING")
        charon.ikes[1] = claim
        charon.list_sas()
        backend, table = bench.backend, bench.backend.watcher.table
        backend.watcher.look_again()
        await until(backend, lambda: table.synced and table.sas())
        await backend._list_proofs()
        await self._sa(bench, 0x1001)
        # As if it was charon's already: no name is told before it is proved.
        claim["net"]["child-sas"] = {"net-1": charon.child(0x1001)}
        backend.watcher.look_again()
        await until(backend, lambda: table.synced and table.children(table.sas()[0]))
        await backend._list_proofs()
        token = await self._arrive(bench, 0x1001)
        assert token.pending
        del charon.ikes[1]
        proved = charon.ike("admin.example.org", remote_eap_id=ALICE)
        charon.comes(proved, charon.child(0x1001))
        assert str((await token.resolved(5)).peer) == ALICE
        assert token.peer.authentication_method is AuthenticationMethod.EAP

    async def test_a_configuration_that_cannot_be_read_yet(
        self, bench, charon, caplog, monkeypatch
    ):
        monkeypatch.setattr(module, "_PROOF_INTERVAL", 0.01)
        charon.list("conns", {"net": {}, "more": {}})
        charon.asked.clear()
        token = await self.nobody(bench, charon)
        async with asyncio.timeout(10):
            await charon.until(lambda: [p.name for p in charon.asked].count("list-conns") > 1)
        assert "configuration cannot be listed" in caplog.text
        assert bench.backend._proofs.wants
        charon.list_conn({"class": b"public key"})
        await until(bench.backend, lambda: known(bench.backend, 0x1001))
        assert str((await token.resolved(5)).peer) == ALICE, "it was asked again"
        assert token.peer.authentication_method is None

    async def test_a_charon_that_keeps_silent_of_it(self, bench, charon, monkeypatch):
        monkeypatch.setattr(module, "_PROOF_SECONDS", 0.01)
        charon.answers["list-conns"] = None
        token = await self.nobody(bench, charon)
        await bench.pass_time(3)
        assert not token.pending
        assert token.peer is None

    async def test_a_connection_that_charon_does_not_list(self, bench, charon):
        charon.list("conns")
        token = await self.nobody(bench, charon)
        await until(bench.backend, lambda: not token.pending)
        assert token.peer is None

    async def test_certificates_without_their_package(self, bench, charon, monkeypatch):
        monkeypatch.setitem(sys.modules, "cryptography", None)
        charon.list("certs", {"type": b"X509", "data": b"x"})
        await self.of(bench, ALICE)
        assert str((await self._arrive(bench, 0x1001)).peer) == ALICE

    async def test_end_of_a_peer(self, bench, charon):
        await self.of(bench, ALICE)
        token = await self._arrive(bench, 0x1001)
        charon.goes(charon.ike(ALICE))
        await until(bench.backend, lambda: not bench.backend.watcher.table.sas())
        assert await self._arrive(bench, 0x1001) is token, "as long as the kernel has its SA"
        await bench.delete_sa(src=bench.peer, dst=bench.local, spi=0x1001)
        bench.backend.drain()
        assert not token.alive


# Opening and closing


async def test_what_was_there_before(kernel, charon, netns):
    charon.comes(charon.ike(ALICE), charon.child(0x1001))
    kernel.sas.append(m.sa_info(pack_address("192.0.2.2"), pack_address("192.0.2.1")) + m.GCM)
    backend = await joined(kernel, charon, stamp="off")
    assert known(backend, 0x1001)
    await backend.aclose()
    await backend.aclose()
    assert backend.watcher.table.synced is False


async def test_opening_by_name(charon, netns):
    async with open_backend("xfrm+vici", vici=f"unix://{charon.path}", stamp="off") as backend:
        assert isinstance(backend, XfrmViciBackend)
        assert backend.name == "xfrm+vici"
        assert backend.watcher.table.synced
        with pytest.raises(BackendUnavailable, match="started once"):
            await backend.start()


async def test_without_charon(tmp_path, netns):
    with pytest.raises(BackendUnavailable, match="is charon running, with its vici plugin") as seen:
        async with open_backend("xfrm+vici", vici=str(tmp_path / "none")):
            pass
    assert seen.value.errno == errno.ENOENT


async def test_the_default_address_is_strongswan_s(kernel):
    backend = XfrmViciBackend(socket_factory=kernel.socket)
    assert backend.client.address == "unix:///var/run/charon.vici"
    await backend.aclose()


async def test_without_permission(kernel, charon, monkeypatch):
    def refused(*args, **more):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(asyncio, "open_unix_connection", refused)
    with pytest.raises(BackendDenied, match=r"charon\.group"):
        await joined(kernel, charon, stamp="off")


async def test_without_the_kernel(kernel, charon, netns):
    kernel.refuse[6] = PermissionError(errno.EPERM, "Operation not permitted")
    with pytest.raises(BackendDenied):
        await joined(kernel, charon, stamp="off")
    assert not charon.clients or await charon.until(lambda: not charon.clients) is None


async def test_a_charon_that_lists_nothing(kernel, charon, netns, monkeypatch):
    monkeypatch.setattr(module, "_START_SECONDS", 0.05)
    charon.answers["list-sas"] = None
    with pytest.raises(BackendUnavailable, match="did not list its SAs"):
        await joined(kernel, charon, stamp="off")


async def test_a_charon_that_knows_no_such_events(kernel, charon, netns):
    charon.known -= {"ike-rekey"}
    with pytest.raises(Exception, match="no such event"):
        await joined(kernel, charon, stamp="off")


async def test_identities_of_sas_that_were_keyed_by_hand(charon, netns, tmp_path):
    path = tmp_path / "who.toml"
    path.write_text(f"[[identity]]\nsrc = '192.0.2.2'\npeer = '{BOB}'")
    kernel = FakeKernel()
    backend = await joined(kernel, charon, stamp="install")
    backend.use_identities(StaticIdentities.from_toml(path))
    bench, arrivals = JoinedBench(backend, kernel, charon), Arrivals()
    await arrivals._sa(bench, 0x9001)
    await arrivals._sa(bench, 0x1001)
    await bench.identify(src=bench.peer, dst=bench.local, spi=0x1001, peer=ALICE, local="me")
    token = await arrivals._arrive(bench, 0x9001)
    assert token.pending, "charon might tell"
    assert str((await token.resolved(5)).peer) == BOB, "it was asked"
    assert str((await arrivals._arrive(bench, 0x1001)).peer) == ALICE
    await charon.stop()
    await until(backend, lambda: not backend.watcher.table.synced)
    assert (await arrivals._arrive(bench, 0x9001)).peer is None, "it may be charon's"
    await charon.start()
    await backend.aclose()
