"""Who is at the other end, as real strongSwan daemons proved it.

Every datagram says who really sends it. A token that names anyone else fails the test, whether it
was asked as the datagram came or at the end; no name is no lie. A second server is for alice alone,
and in no scenario may it see a byte of anyone else. mallory sends to both in clear, and carol, who
has keys of her own, sends beside alice.

The daemons run through all the tests; what a test keyed is taken down after it.
"""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, closing, suppress
from pathlib import Path
from threading import Timer
from typing import NamedTuple

import pytest
from authority import Authority
from charon import Charon, Settings, conf
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hosts import PATIENCE, Host, Network, eventually, protect

import ipsec_aio
from ipsec_aio import Assurance, AuthenticationMethod, IdentityKind, PToken, Require
from ipsec_aio.backends.join import XfrmViciBackend
from ipsec_aio.identity import channel_binding

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PORT, GUARDED = 5000, 5001
PACE = 0.05
NOBODY = "nobody"
ALICE, CAROL, DORA = "alice.example", "carol.example", "dora.example"
LEASED = "10.7.0.1"


# -- the daemons ---------------------------------------------------------------------------


class Lab(NamedTuple):
    bob: Charon
    alice: Charon
    carol: Charon
    keys: dict[str, bytes]
    """The public keys of bob's and alice's certificates, as DER."""


def plain(name: str) -> str:
    """Names of sections have no dots."""
    return name.partition(".")[0]


def secret(value: str, *owners: str) -> Settings:
    return {**{f"id-{n}": owner for n, owner in enumerate(owners)}, "secret": value}


def connection(local: Settings, remote: Settings, to: str = "%any", **more: object) -> Settings:
    """A connection with one child, ``net``, in transport mode unless told otherwise."""
    child: Settings = {"mode": "transport", "esp_proposals": "aes128gcm16"}
    return {
        "version": "2",
        "remote_addrs": to,
        "proposals": "aes128gcm16-prfsha256-x25519",
        "local": local,
        "remote": remote,
        "children": {"net": {**child, **more.pop("child", {})}},  # type: ignore[dict-item]
        **more,
    }


def psk(name: str) -> Settings:
    return {"auth": "psk", "id": name}


def certified(name: str) -> Settings:
    return {"auth": "pubkey", "certs": f"{name}.pem"}


def public_key(pem: bytes) -> bytes:
    key = x509.load_pem_x509_certificate(pem).public_key()
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


BOB, GATE, ROAD = "bob.example", "gate.example", "road.example"


def configure(lab: Lab) -> None:
    authority, stranger = Authority("Lab CA"), Authority("Lab CA")
    alice, revoked = (authority.issue(name) for name in (ALICE, "revoked"))
    authority.revoke(revoked[0])
    issued = {
        lab.bob: {"bob": authority.issue(BOB, GATE, ROAD)},
        lab.alice: {"alice": alice, "revoked": revoked, "foreign": stranger.issue(ALICE)},
    }
    for charon, each in issued.items():
        charon.put("x509ca", "ca.pem", authority.certificate)
        charon.put("x509crl", "ca.pem", authority.revocations())
        for name, (certificate, key) in each.items():
            charon.put("x509", f"{name}.pem", certificate)
            charon.put("private", f"{name}.pem", key)
            lab.keys.setdefault(name, public_key(certificate))

    inner = {"mode": "tunnel", "local_ts": lab.bob.host.inner4}
    server = {
        **{plain(name): connection(psk(BOB), psk(name)) for name in (ALICE, CAROL, DORA)},
        "certified": connection(
            {**certified("bob"), "id": GATE},
            {"auth": "pubkey", "cacerts": "ca.pem", "revocation": "strict"},
        ),
        "eap": connection(
            {**certified("bob"), "id": ROAD},
            {"auth": "eap-md5", "eap_id": "%any"},
            child=inner,
            pools="road",
        ),
        "interface": connection(
            psk("interface.example"),
            psk(ALICE),
            child={**inner, "if_id_in": "7", "if_id_out": "7", "remote_ts": "10.8.0.0/16"},
        ),
    }
    shared = {
        f"ike-{plain(name)}": secret(f"of {name}", name, BOB, "interface.example")
        for name in (ALICE, CAROL, DORA)
    }
    road = {"eap-alice": secret("of the road", "alice@example")}
    eve = {"eap-eve": secret("of eve", "eve@example")}
    lab.bob.load(
        conf(
            {
                "connections": server,
                "pools": {"road": {"addrs": "10.7.0.0/28"}},
                "secrets": {**shared, **road, **eve},
            }
        )
    )

    v4, v6 = lab.bob.host.v4, lab.bob.host.v6
    inner = {"mode": "tunnel", "remote_ts": lab.bob.host.inner4}
    gate = {"auth": "pubkey", "id": GATE}

    def roaming(claim: str, name: str) -> Settings:
        local = {"auth": "eap-md5", "id": claim, "eap_id": name}
        remote = {"auth": "pubkey", "id": ROAD}
        return connection(local, remote, v4, child=inner, vips="0.0.0.0")

    client = {
        "psk": connection(psk(ALICE), psk(BOB), v4),
        "psk6": connection(psk(ALICE), psk(BOB), v6),
        "dora": connection(psk(DORA), psk(BOB), v4),
        "liar": connection(psk(CAROL), psk(BOB), v4),
        **{name: connection(certified(name), gate, v4) for name in ("alice", "revoked", "foreign")},
        "eap": roaming("admin.example", "alice@example"),
        "eap-eve": roaming("admin.example", "eve@example"),
        "eap-other": roaming("eve@example", "alice@example"),
        "interface": connection(
            psk(ALICE),
            psk("interface.example"),
            v4,
            child={**inner, "local_ts": lab.alice.host.inner4},
        ),
    }
    guess = secret("a guess", CAROL)
    mine = {name: value for name, value in shared.items() if plain(CAROL) not in name}
    wrong = {"ike-liar": guess, "eap-eve": secret("another guess", "eve@example")}
    lab.alice.load(conf({"connections": client, "secrets": {**mine, **road, **wrong}}))
    lab.carol.load(
        conf({"connections": {"psk": connection(psk(CAROL), psk(BOB), v4)}, "secrets": shared})
    )


@pytest.fixture(scope="module")
def daemons(network: Network) -> Iterator[Lab]:
    with ExitStack() as stack:
        bob, alice, carol = (Charon(network.hosts[name]) for name in ("bob", "alice", "carol"))
        lab = Lab(bob, alice, carol, {})
        for charon in lab[:3]:
            charon.start()
        for charon in lab[:3]:
            stack.enter_context(charon)
        configure(lab)
        yield lab


@pytest.fixture
def lab(bob: Host, daemons: Lab) -> Iterator[Lab]:
    yield daemons
    with ThreadPoolExecutor() as pool:  # programs start slowly here
        for peer in [pool.submit(charon.forget) for charon in (daemons.alice, daemons.carol)]:
            peer.result()
    daemons.bob.forget()


# -- traffic -------------------------------------------------------------------------------


class Inbox(ipsec_aio.DatagramProtocol):
    """All that came, with its token, and what was said wrongly of it."""

    def __init__(self) -> None:
        self.tokens: set[tuple[str, PToken]] = set()
        self.wrong: list[str] = []
        self.address = ""
        self.backend: XfrmViciBackend
        self.served: set[str] = set()
        self._coming: asyncio.Queue[tuple[str, PToken]] = asyncio.Queue()

    def datagram_received(self, data, addr, ptoken):
        who = data.decode()
        self.judge(who, ptoken)
        self.tokens.add((who, ptoken))
        self._coming.put_nowait((who, ptoken))

    def judge(self, who: str, token: PToken) -> None:
        peer = token.peer
        if (peer is not None and str(peer) != who) or (who == NOBODY and token.protected):
            self.wrong.append(f"{who} is {token!r}, {peer!r}")

    async def next(self, who: str) -> PToken:
        """The token, as good as it gets, of a datagram that comes from now on."""
        self._coming = asyncio.Queue()
        while (came := await self._coming.get())[0] != who:
            pass
        with suppress(TimeoutError):
            return await came[1].resolved(2)
        return came[1]

    async def named(self, who: str) -> PToken:
        """Wait until one is named, and return its token."""
        async with asyncio.timeout(PATIENCE):
            while (token := await self.next(who)).peer is None:
                pass
        assert str(token.peer) == who
        assert token.protected
        assert token.assurance is Assurance.EXACT
        return token

    async def unprotected(self, who: str) -> PToken:
        """Wait until one comes in clear, and return its token."""
        async with asyncio.timeout(PATIENCE):
            while (token := await self.next(who)).protected:
                pass
        assert token.peer is None
        return token


class Strict(ipsec_aio.DatagramProtocol):
    """A server that alice alone may reach."""

    def __init__(self) -> None:
        self.served: set[str] = set()

    def datagram_received(self, data, addr, ptoken):
        self.served.add(data.decode())


@asynccontextmanager
async def stream(host: Host, who: str, to: str, source: str = "") -> AsyncIterator[None]:
    """Datagrams from a host, all the time."""
    with host:
        sock = socket.socket(socket.AF_INET6 if ":" in to else socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    if source:
        sock.bind((source, 0))

    async def send() -> None:
        while True:
            with suppress(OSError):  # no address, no SA: for the moment
                sock.sendto(who.encode(), (to, PORT))
                sock.sendto(who.encode(), (to, GUARDED))
            await asyncio.sleep(PACE)

    with closing(sock):
        task = asyncio.create_task(send())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def listening(lab: Lab, mallory: Host) -> AsyncIterator[Inbox]:
    """bob's two servers, and mallory, who sends to both in clear."""
    async with (
        asyncio.timeout(3 * PATIENCE),
        ipsec_aio.open_backend("xfrm+vici", vici=lab.bob.uri, stamp="install") as backend,
    ):
        transport, inbox = await ipsec_aio.create_datagram_endpoint(
            Inbox, local_addr=("::", PORT), backend=backend
        )
        inbox.address = lab.bob.host.v4
        guarded, strict = await ipsec_aio.create_datagram_endpoint(
            Strict,
            local_addr=("::", GUARDED),
            backend=backend,
            require=Require(encrypted=True, peer=ALICE),
        )
        with closing(transport), closing(guarded):
            assert isinstance(backend, XfrmViciBackend)
            inbox.backend = backend
            inbox.served = strict.served
            async with stream(mallory, NOBODY, lab.bob.host.v4):
                await inbox.unprotected(NOBODY)
                yield inbox
                await inbox.unprotected(NOBODY)
            for who, token in inbox.tokens:
                inbox.judge(who, token)
            assert inbox.wrong == []
            assert strict.served <= {ALICE}


async def key(charon: Charon, connection: str = "psk") -> None:
    await asyncio.to_thread(charon.initiate, connection)


async def end(charon: Charon, connection: str = "psk") -> None:
    await asyncio.to_thread(charon.terminate, connection)


@asynccontextmanager
async def keyed(inbox: Inbox, charon: Charon, who: str) -> AsyncIterator[None]:
    """A peer with a shared secret, who is named, and sends on."""
    async with stream(charon.host, who, inbox.address):
        await key(charon)
        await inbox.named(who)
        yield


async def ike_spis(charon: Charon, who: str) -> set[str]:
    """The SPIs of all IKE SAs with a peer."""
    lines = (await asyncio.to_thread(charon.swanctl, "--list-sas")).splitlines()
    return {*re.findall("([0-9a-f]{16})_[ir]", "".join(each for each in lines if who in each))}


def detour(host: Host, to: Host, via: Host) -> None:
    """Have a host reach another by a third, from its inner address."""
    route = f"{to.v4}/32 via {via.v4} src {host.inner4}"
    host.ip(f"route add {route}")
    host.after(lambda: host.ip(f"route del {route}"))


class Accepted(ipsec_aio.Protocol):
    def __init__(self, made: asyncio.Queue[PToken]) -> None:
        self._made = made

    def connection_made(self, transport, ptoken):
        self._made.put_nowait(ptoken)


# -- how they prove who they are -----------------------------------------------------------


async def test_shared_secrets(lab: Lab, mallory: Host):
    to = lab.bob.host.v4
    async with listening(lab, mallory) as inbox:
        with pytest.raises(RuntimeError):
            await key(lab.alice, "liar")
        async with stream(lab.alice.host, ALICE, to), stream(lab.carol.host, CAROL, to):
            await inbox.unprotected(ALICE)
            await key(lab.alice)
            await key(lab.carol)
            alice, carol = await inbox.named(ALICE), await inbox.named(CAROL)
            for token in (alice, carol):
                assert token.peer.kind is IdentityKind.FQDN
                assert token.peer.authentication_method is AuthenticationMethod.PRESHAREDKEY
                assert str(token.local) == BOB
            assert not alice.equivalent(carol)
            assert await inbox.named(ALICE) is alice
            assert await inbox.named(CAROL) is carol
            assert inbox.served == {ALICE}


async def test_certificates(lab: Lab, mallory: Host):
    to, name = lab.bob.host.v4, f"C=CH, O=Lab, CN={ALICE}"
    async with (
        listening(lab, mallory) as inbox,
        keyed(inbox, lab.carol, CAROL),
        stream(lab.alice.host, name, to),
    ):
        for refused in ("revoked", "foreign"):
            with pytest.raises(RuntimeError):
                await key(lab.alice, refused)
            await inbox.unprotected(name)
        await key(lab.alice, "alice")
        token = await inbox.named(name)
        assert token.peer.kind is IdentityKind.DN
        assert token.peer.authentication_method is AuthenticationMethod.PKIX_INLINE
        assert token.peer.matches("C=CH, O=Lab, CN=*")
        assert not token.peer.matches(ALICE)
        assert str(token.local) == GATE
        binding = channel_binding(lab.keys["bob"], lab.keys["alice"])
        assert token.peer.channel_binding == binding


async def test_eap_and_a_virtual_address(lab: Lab, mallory: Host):
    """Who he called himself in IKE was never proved: only EAP's identity counts."""
    async with listening(lab, mallory) as inbox, keyed(inbox, lab.carol, CAROL):
        await key(lab.alice, "eap")
        async with stream(lab.alice.host, "alice@example", lab.bob.host.inner4, LEASED):
            token = await inbox.named("alice@example")
        assert token.tunnel_mode
        assert token.peer.kind is IdentityKind.RFC822
        assert token.peer.authentication_method is AuthenticationMethod.EAP
        assert LEASED in token.audit_string
        assert inbox.served == set()


def stall(host: Host) -> None:
    """Have a host send nothing of IKE_AUTH but its first message, in which it says who it is."""
    ike_auth = "@th,64,32 0 @th,240,8 35 @th,256,32 > 1"  # marked as none of ESP's, on port 4500
    host.nft(
        "table inet stall { chain out { type filter hook output priority 0;"
        f" udp dport 4500 {ike_auth} drop; }}; }}"
    )


async def test_a_name_that_is_only_claimed(lab: Lab, mallory: Host):
    """Everything is listed while he has said that he is admin, and has not proved anything."""
    host = lab.alice.host
    async with listening(lab, mallory) as inbox, keyed(inbox, lab.carol, CAROL):
        watcher = inbox.backend.watcher

        def stands() -> set[tuple[str, bool]]:
            return {(each.remote_id, each.established) for each in watcher.table.sas()}

        stall(host)
        keying = asyncio.create_task(key(lab.alice, "eap"))
        async with asyncio.timeout(PATIENCE):
            while ("admin.example", False) not in stands():
                watcher.look_again()
                await inbox.next(CAROL)
            # Another one comes, for whom everybody is judged.
            await end(lab.carol)
            await key(lab.carol)
            await inbox.named(CAROL)
        assert ("admin.example", False) in stands()
        host.show("nft", "flush", "ruleset")
        await keying
        async with stream(host, "alice@example", lab.bob.host.inner4, LEASED):
            token = await inbox.named("alice@example")
        assert token.peer.authentication_method is AuthenticationMethod.EAP
        assert inbox.served == set()


async def test_eap_that_fails_and_another_s(lab: Lab, mallory: Host):
    async with listening(lab, mallory) as inbox, keyed(inbox, lab.carol, CAROL):
        with pytest.raises(RuntimeError):
            await key(lab.alice, "eap-eve")
        peers = {each.peer_id for each in inbox.backend.watcher.table.sas() if each.established}
        assert peers == {CAROL}
        await key(lab.alice, "eap-other")
        async with stream(lab.alice.host, "alice@example", lab.bob.host.inner4, LEASED):
            await inbox.named("alice@example")


async def test_a_connection_over_ipv6(lab: Lab, mallory: Host):
    to = (lab.bob.host.v6, PORT)
    loop = asyncio.get_running_loop()
    made: asyncio.Queue[PToken] = asyncio.Queue()

    async def connected(host: Host) -> PToken:
        with host.tcp(0, 6) as client:
            await loop.sock_connect(client, to)
            token = await made.get()
            with suppress(TimeoutError):
                return await token.resolved(2)
            return token

    async with (
        asyncio.timeout(PATIENCE),
        ipsec_aio.open_backend("xfrm+vici", vici=lab.bob.uri, stamp="install") as backend,
        await ipsec_aio.create_server(lambda: Accepted(made), "::", PORT, backend=backend),
    ):
        assert (await connected(lab.alice.host)).peer is None
        await key(lab.alice, "psk6")
        token = await connected(lab.alice.host)
        assert token.protected
        assert str(token.peer) == ALICE
        clear = await connected(mallory)
        assert not clear.protected
        assert clear.peer is None
        await asyncio.to_thread(lab.alice.rekey)
        assert await connected(lab.alice.host) is token


# -- what changes meanwhile ----------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [("--child", "net"), ("--ike", "psk"), ("--ike", "psk", "--reauth")],
    ids=["child", "ike", "reauthentication"],
)
async def test_rekeyed(lab: Lab, mallory: Host, words: tuple[str, ...]):
    async with (
        listening(lab, mallory) as inbox,
        keyed(inbox, lab.carol, CAROL),
        keyed(inbox, lab.alice, ALICE),
    ):
        alice, carol = await inbox.named(ALICE), await inbox.named(CAROL)
        spi, spis = alice.sa.spi, await ike_spis(lab.bob, plain(ALICE))
        await asyncio.to_thread(lab.alice.swanctl, "--rekey", *words)
        if "--child" not in words:
            while not await ike_spis(lab.bob, plain(ALICE)) - spis:
                await inbox.next(CAROL)
        if words != ("--ike", "psk"):
            await eventually(lambda: {each.spi for each in alice.sas} - {spi} != set())
            await eventually(lambda: spi not in {each.spi for each in alice.sas})
        assert await inbox.named(ALICE) is alice
        assert await inbox.named(CAROL) is carol
        if words == ("--ike", "psk"):
            await asyncio.to_thread(lab.alice.rekey)
            await eventually(lambda: spi not in {each.spi for each in alice.sas})
            assert await inbox.named(ALICE) is alice


async def test_another_peer_beside_one_at_its_address(lab: Lab, mallory: Host):
    """The first one's SAs still stand: what comes under the other's is the other's."""
    host, to = lab.alice.host, lab.bob.host.v4
    async with listening(lab, mallory) as inbox, keyed(inbox, lab.carol, CAROL):
        async with keyed(inbox, lab.alice, ALICE):
            alice = await inbox.named(ALICE)
        await key(lab.alice, "dora")
        # Else it is up to the kernel under whose SA it sends.
        host.ip(f"xfrm state delete src {host.v4} dst {to} proto esp spi {alice.sa.spi:#x}")
        async with stream(host, DORA, to):
            dora = await inbox.named(DORA)
            assert alice.alive
            assert str(alice.peer) == ALICE
        assert dora is not alice
        assert not dora.equivalent(alice)
        assert inbox.served == {ALICE}


async def test_another_peer_behind_one_address(lab: Lab, mallory: Host):
    to = lab.bob.host.v4
    async with listening(lab, mallory) as inbox, keyed(inbox, lab.carol, CAROL):
        async with keyed(inbox, lab.alice, ALICE):
            alice = await inbox.named(ALICE)
        await end(lab.alice)
        async with stream(lab.alice.host, DORA, to):
            await key(lab.alice, "dora")
            dora = await inbox.named(DORA)
        assert dora is not alice
        assert inbox.served == {ALICE}
        assert not dora.equivalent(alice)
        assert str(alice.peer) == ALICE
        await end(lab.alice, "dora")
        async with keyed(inbox, lab.alice, ALICE):
            assert not (await inbox.named(ALICE)).equivalent(dora)


async def test_moved(lab: Lab, mallory: Host):
    """MOBIKE: the peer's address changes, who it is does not."""
    host, moved = lab.alice.host, "10.9.0.102"
    async with (
        listening(lab, mallory) as inbox,
        keyed(inbox, lab.carol, CAROL),
        keyed(inbox, lab.alice, ALICE),
    ):
        before = await inbox.named(ALICE)
        # Else charon may try IPv6, which SAs in transport mode cannot follow.
        host.ip(f"route add unreachable {lab.bob.host.v6}/128")
        host.after(lambda: host.ip(f"route del unreachable {lab.bob.host.v6}/128"))
        # Else the first address takes the second one of its subnet away with it.
        host.sysctl("net/ipv4/conf/all/promote_secondaries", 1)
        host.ip(f"addr add {moved}/24 dev eth0", f"addr del {host.v4}/24 dev eth0")
        host.after(
            lambda: host.ip(f"addr add {host.v4}/24 dev eth0", f"addr del {moved}/24 dev eth0")
        )
        async with asyncio.timeout(PATIENCE):
            while moved not in (await inbox.named(ALICE)).audit_string:
                pass
        after = await inbox.named(ALICE)
        assert after is not before
        assert after.peer == before.peer


async def test_deleted(lab: Lab, mallory: Host):
    async with (
        listening(lab, mallory) as inbox,
        keyed(inbox, lab.carol, CAROL),
        keyed(inbox, lab.alice, ALICE),
    ):
        token = await inbox.named(ALICE)
        await end(lab.bob, plain(ALICE))
        await inbox.unprotected(ALICE)
        assert not token.alive
        assert str(token.peer) == ALICE
        assert (await inbox.named(CAROL)).alive


async def test_charon_killed_and_restarted(lab: Lab, mallory: Host):
    async with (
        listening(lab, mallory) as inbox,
        keyed(inbox, lab.alice, ALICE),
        keyed(inbox, lab.carol, CAROL),
    ):
        token = await inbox.named(ALICE)
        lab.bob.kill()
        assert await inbox.named(ALICE) is token
        lab.bob.start()
        await asyncio.to_thread(lab.bob.__enter__)
        await asyncio.to_thread(lab.bob.reload)
        # charon counts from 1 again: now carol has alice's numbers.
        for charon, who in ((lab.carol, CAROL), (lab.alice, ALICE)):
            await asyncio.to_thread(charon.forget)
            await key(charon)
            await inbox.named(who)


# -- where addresses and selectors do not tell peers apart ---------------------------------


async def test_two_peers_behind_one_address(lab: Lab, mallory: Host):
    """Both are behind mallory's NAT: their SAs have the same addresses, selectors and reqid."""
    bob = lab.bob.host
    for each in ("all", "eth0"):
        mallory.sysctl(f"net/ipv4/conf/{each}/send_redirects", 0)
    mallory.sysctl("net/ipv4/ip_forward", 1)
    mallory.nft(
        "table ip nat { chain out { type nat hook postrouting priority 100;"
        f" ip daddr {bob.v4} masquerade; }}; }}"
    )
    for charon in (lab.alice, lab.carol):
        detour(charon.host, bob, mallory)
    async with (
        listening(lab, mallory) as inbox,
        keyed(inbox, lab.alice, ALICE),
        keyed(inbox, lab.carol, CAROL),
    ):
        alice, carol = await inbox.named(ALICE), await inbox.named(CAROL)
        assert alice is not carol
        assert not alice.equivalent(carol)
        for token in (alice, carol):
            assert mallory.v4 in token.audit_string
            assert token.sa.encapsulation is not None
        assert alice.sa.reqid == carol.sa.reqid
        await asyncio.to_thread(lab.alice.rekey)
        assert await inbox.named(ALICE) is alice
        assert await inbox.named(CAROL) is carol
        assert inbox.served == {ALICE}
        # While they are keyed, bob takes nothing in clear from that address.
        await end(lab.alice)
        await end(lab.carol)


async def test_a_number_used_again_by_hand(lab: Lab, mallory: Host):
    """charon does not see its SA go, and keeps saying that the number is alice's."""
    bob, carol = lab.bob.host, lab.carol.host
    async with listening(lab, mallory) as inbox, keyed(inbox, lab.alice, ALICE):
        sa = (await inbox.named(ALICE)).sa
        bob.ip(f"xfrm state delete src {lab.alice.host.v4} dst {bob.v4} proto esp spi {sa.spi:#x}")
        pair = protect(carol, bob, reqid=sa.reqid, spis=(sa.spi, 0x1000), policies=False)
        pair.demand(carol)
        async with asyncio.timeout(PATIENCE), stream(carol, CAROL, bob.v4):
            while not (await inbox.next(CAROL)).protected:
                pass
            await asyncio.to_thread(lab.bob.reload)
            for _ in range(20):
                assert (await inbox.next(CAROL)).peer is None


async def test_an_interface_of_their_own(lab: Lab, mallory: Host):
    """A route-based tunnel, whose SAs have an interface id."""
    lab.bob.host.interface("ipsec7", 7)
    alice = lab.alice.host
    async with listening(lab, mallory) as inbox, keyed(inbox, lab.carol, CAROL):
        await key(lab.alice, "interface")
        async with stream(alice, ALICE, lab.bob.host.inner4, alice.inner4):
            token = await inbox.named(ALICE)
        assert token.sa.if_id == 7
        assert token.tunnel_mode
        assert str(token.local) == "interface.example"


# -- an allow-list -------------------------------------------------------------------------


def test_the_allow_list_of_the_examples(lab: Lab, mallory: Host):
    words = ["--port", str(PORT), "--vici", lab.bob.uri, ALICE, "*.example.org"]
    example = [sys.executable, str(EXAMPLES / "04_allow_list.py"), *words]
    with subprocess.Popen(example, stdout=subprocess.PIPE, text=True) as server:
        watchdog = Timer(2 * PATIENCE, server.kill)
        watchdog.start()

        def line() -> str:
            assert server.stdout is not None
            return server.stdout.readline()

        try:
            assert "serving at" in line()
            for charon in (lab.alice, lab.carol):
                charon.initiate("psk")
            to = (lab.bob.host.v4, PORT)
            with lab.alice.host.udp() as client:
                client.settimeout(PATIENCE)
                client.sendto(b"hello", to)
                assert f"udp from {lab.alice.host.v4}: served, {ALICE}" in line()
                assert client.recv(100) == f"welcome, {ALICE}\n".encode()
            for host, why in ((lab.carol.host, "peer"), (mallory, "encrypted")):
                with host.udp() as client:
                    client.sendto(b"hello", to)
                    assert f"udp from {host.v4}: refused, {why}" in line()
            server.send_signal(signal.SIGINT)  # to be killed leaves the sysctl as it is
            server.wait(PATIENCE)
        finally:
            watchdog.cancel()
            server.kill()
