"""How the evidence of streams lies: see test_lies.py."""

from __future__ import annotations

import asyncio
import socket
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path

import pytest
from hosts import PATIENCE, Host, eventually, lenient, mark_of, protect, set_mark
from lies import GUARDED, PORT, Peer, accepting, believed, lasting_stamp, repeats, without

import ipsec_aio
from ipsec_aio import Assurance
from ipsec_aio.kernel import stamp_table
from ipsec_aio.kernel.stamp import KernelStamp
from ipsec_aio.net import listening, witness

MARKS = "clear the mark"
PASS = "pass clear segments on other connections"
CLEAR_SEGMENTS = "drop clear segments on stamped connections"
CLEAR_DATA = "drop clear data that would complete a handshake"
"""Rules of the stamp."""


@pytest.mark.parametrize("guards", [0, 1, 2])
async def test_a_marked_listener(bob: Host, alice: Host, monkeypatch, guards):
    """Two guards: the stamp drops clear segments to it, and its connections do not count."""
    pair = protect(alice, bob, policies=False)
    if guards < 2:
        without(monkeypatch, "INPUT", CLEAR_SEGMENTS)
    if guards < 1:
        monkeypatch.setattr(listening.Listener, "_is_marked", lambda listener: False)
    loop = asyncio.get_running_loop()
    listener = bob.tcp(PORT)
    set_mark(listener, mark_of(pair.spi(bob)))
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


@GUARDED
async def test_clear_segments_after_a_flush(bob: Host, alice: Host, monkeypatch, guarded):
    pair = protect(alice, bob)
    if not guarded:  # the second drops all data that is clear, where the first is passed
        without(monkeypatch, "INPUT", CLEAR_SEGMENTS, CLEAR_DATA)
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
        without(monkeypatch, "INPUT", CLEAR_SEGMENTS)
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


def hush(host):
    """Have a host's handshakes be completed by data alone, until its ruleset is flushed."""
    host.nft(
        "table inet hush { chain hush { type filter hook output priority 0;"
        f" tcp dport {PORT} tcp flags & (syn | ack | psh) == ack drop\n}}\n}}\n"
    )


@GUARDED
async def test_clear_data_that_completes_a_handshake(bob: Host, alice: Host, monkeypatch, guarded):
    pair = lenient(alice, bob)
    if not guarded:
        without(monkeypatch, "INPUT", CLEAR_DATA)
    hush(alice)
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
            set_mark(client, mark_of(pair.spi(bob)))
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


@pytest.mark.parametrize("guards", [(), (MARKS,), (PASS,), (MARKS, PASS)], ids=" and ".join)
async def test_a_mark_forged_over_loopback(bob: Host, alice: Host, monkeypatch, guards):
    """Each of two rules of the stamp clears it. A tunnel's SA is for any address."""
    pair = protect(alice, bob, mode="tunnel", policies=False)
    missing = {MARKS, PASS} - {*guards}
    if PASS in missing:  # the next drops all data that is clear, where the first is passed
        missing |= {CLEAR_DATA, CLEAR_SEGMENTS}
    without(monkeypatch, "INPUT", *missing)
    loop = asyncio.get_running_loop()
    peer = Peer()
    async with accepting(bob, peer):
        with bob.tcp() as client:
            set_mark(client, mark_of(pair.spi(bob)))
            async with asyncio.timeout(PATIENCE):
                await loop.sock_connect(client, (bob.v4, PORT))
                await loop.sock_sendall(client, b"forged")
            data, ptoken = await peer.next()
    assert data == b"forged"
    assert pair.packets(bob) == 0
    assert believed(ptoken) is not bool(guards)
    if guards:
        assert ptoken.assurance is Assurance.NONE


@GUARDED
async def test_a_connection_that_came_before_the_stamp(
    bob: Host, alice: Host, monkeypatch, guarded
):
    """It waits to be accepted with a mark that nobody cleared."""
    pair = protect(alice, bob, mode="tunnel", policies=False)
    bob.sysctl("net/ipv4/tcp_fwmark_accept", 1)
    if not guarded:
        monkeypatch.setattr(listening, "is_listening", lambda sock: False)
    listener = bob.listener(PORT)
    peer = Peer()
    with bob.tcp() as client:
        set_mark(client, mark_of(pair.spi(bob)))
        async with asyncio.timeout(PATIENCE):
            await asyncio.get_running_loop().sock_connect(client, (bob.v4, PORT))
        async with accepting(listener, peer):
            ptoken = await asyncio.wait_for(peer.made, PATIENCE)
            assert believed(ptoken) is not guarded
            if guarded:
                assert ptoken.assurance is Assurance.UNKNOWN
                assert "before the stamp" in ptoken.information_string
    assert pair.packets(bob) == 0


def arrived(peer):
    """How many bytes wait to be read."""
    sock = peer.transport.get_extra_info("socket")
    return int.from_bytes(ioctl(sock.fileno(), termios.FIONREAD, bytes(4)), sys.byteorder)


@pytest.mark.parametrize(("guarded", "told"), [(False, True), (True, True), (True, False)])
async def test_a_stamp_that_is_lost(bob: Host, alice: Host, monkeypatch, guarded, told):
    """Nobody keeps clear segments off any more; ``told``: the program knew before they came, else
    it hears of both in one turn of its loop, the news first.
    """
    pair = lenient(alice, bob)
    bob.sysctl("net/ipv4/tcp_fwmark_accept", 1)
    if not guarded:
        monkeypatch.setattr(KernelStamp, "_news", lambda stamp: 0)
    loop = asyncio.get_running_loop()
    peer = Peer()
    with lasting_stamp() as netlink:
        async with accepting(bob, peer, stamp="use"):
            with alice.tcp() as client:
                async with asyncio.timeout(PATIENCE):
                    await loop.sock_connect(client, (bob.v4, PORT))
                    await loop.sock_sendall(client, b"sealed")
                _, first = await peer.next()
                assert believed(first)
                count = pair.packets(bob)
                alice.flush_policies()
                for _ in range(3):  # else what the kernel lists first is the socket read last
                    await asyncio.sleep(0)
                stamp_table.remove(netlink)
                if guarded and told:
                    await eventually(lambda: peer.transport.get_extra_info("ptoken") is not first)
                client.send(b"clear")
                patience = time.monotonic() + PATIENCE
                while not arrived(peer):  # not awaited: the loop must not read it yet
                    assert time.monotonic() < patience, "it never came"
                data, ptoken = await peer.next()
                assert data == b"clear"
                assert pair.packets(bob) == count
                assert believed(ptoken) is not guarded
                assert ptoken.assurance is Assurance.UNKNOWN or not guarded
                assert "stamp was lost" in ptoken.information_string or not guarded


def cookies_received(host):
    """How many handshakes were completed by a SYN cookie (/proc/net/netstat, TcpExt)."""
    with host:
        names, values = Path("/proc/thread-self/net/netstat").read_text().splitlines()[:2]
    return int(dict(zip(names.split(), values.split(), strict=True))["SyncookiesRecv"])


@GUARDED
async def test_a_clear_syn_and_a_cookie_that_comes_back_protected(
    bob: Host, alice: Host, monkeypatch, guarded
):
    """The mark is that of the segment with the cookie; what is clear is dropped from there on."""
    pair = lenient(alice, bob)
    bob.sysctl("net/ipv4/tcp_syncookies", 2)
    if not guarded:
        without(monkeypatch, "INPUT", CLEAR_SEGMENTS, CLEAR_DATA)
    peer = Peer()
    async with accepting(bob, peer):
        with alice.tcp() as client:
            before = cookies_received(bob)
            alice.flush_policies()
            hush(alice)
            async with asyncio.timeout(PATIENCE):
                await asyncio.get_running_loop().sock_connect(client, (bob.v4, PORT))
            assert pair.packets(bob) == 0
            pair.demand(alice)
            client.send(b"sealed")
            data, ptoken = await peer.next()
            assert data == b"sealed"
            assert believed(ptoken)
            assert cookies_received(bob) == before + 1
            alice.show("nft", "flush", "ruleset")
            count = pair.packets(bob)
            alice.flush_policies()
            client.send(b"clear")
            if guarded:
                await eventually(lambda: repeats(client) > 1)
                assert peer.data.empty()
                pair.demand(alice)
            data, ptoken = await peer.next()
            assert data == b"clear"
            assert believed(ptoken)
            assert (pair.packets(bob) > count) is guarded


@pytest.mark.parametrize("cookies", [0, 2], ids=["no cookies", "cookies"])
async def test_a_protected_syn_and_clear_data_that_completes_the_handshake(
    bob: Host, alice: Host, cookies
):
    """With a cookie nothing remembers the SYN: the connection is as clear as what completed it."""
    pair = lenient(alice, bob)
    bob.sysctl("net/ipv4/tcp_syncookies", cookies)
    hush(alice)
    peer = Peer()
    async with accepting(bob, peer):
        with alice.tcp() as client:
            before = cookies_received(bob)
            async with asyncio.timeout(PATIENCE):
                await asyncio.get_running_loop().sock_connect(client, (bob.v4, PORT))
            assert pair.packets(bob) == 1
            alice.flush_policies()
            client.send(b"clear")
            if cookies:
                data, ptoken = await peer.next()
                assert data == b"clear"
                assert ptoken.assurance is Assurance.NONE
                assert ptoken is await peer.made
                assert cookies_received(bob) == before + 1
            else:
                await eventually(lambda: repeats(client) > 1)
                assert not peer.made.done()
    assert pair.packets(bob) == 1


IPPROTO_MPTCP = 262


@GUARDED
async def test_an_mptcp_listener(bob: Host, alice: Host, monkeypatch, guarded):
    """Its connections have subflows of their own, in clear if they like."""
    pair = lenient(alice, bob)
    if not guarded:
        monkeypatch.setattr(listening, "unfitness", lambda sock, backend: "")
    for host in (alice, bob):
        host.ip("mptcp limits set subflow 2 add_addr_accepted 2")
    alice.ip(f"mptcp endpoint add {alice.inner4} subflow")
    alice.after(lambda: alice.ip("mptcp endpoint flush"))
    with bob:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP)
    with alice:
        client = socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP)
    listener.bind((bob.v4, PORT))
    client.settimeout(PATIENCE)
    client.bind((alice.v4, 0))
    peer = Peer()
    async with accepting(listener, peer):
        with client:
            # asyncio would resolve the address, and knows no such protocol.
            await asyncio.to_thread(client.connect, (bob.v4, PORT))
            client.send(b"sealed")
            data, ptoken = await peer.next()
            assert data == b"sealed"
            await eventually(lambda: f"{alice.inner4}:" in bob.show("ss", "-Htn"))
            count = pair.packets(bob)
            assert count > 0
            alice.nft(
                "table inet cut { chain cut { type filter hook output priority 0;"
                " ip protocol esp drop\n}\n}\n"
            )
            client.send(b"clear")
            data, later = await peer.next()
            assert data == b"clear"
            assert later is ptoken
            assert pair.packets(bob) == count
    # Unguarded, its first subflow is called clear, which was not; and its mark is none of theirs.
    assert ptoken.assurance is (Assurance.UNKNOWN if guarded else Assurance.NONE)
    if guarded:
        assert "not a plain TCP socket" in ptoken.information_string
