"""The lab's own ground: IPsec works here in every form that the scenarios use."""

from __future__ import annotations

import asyncio
import socket

import pytest
from hosts import CBC, COMP, FAMILIES, GCM, MODES, SUITES, Host, Suite, eventually, protect, receive

PORT = 5000


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("suite", SUITES, ids=str)
async def test_protected_datagrams_pass_and_are_counted(
    bob: Host, alice: Host, suite: Suite, mode: str, family: int
):
    pair = protect(alice, bob, suite, mode=mode, family=family)
    inner = mode == "tunnel"
    with bob.udp(PORT, family, inner=inner) as server, alice.udp(0, family, inner=inner) as client:
        client.sendto(b"hello", (pair.address(bob), PORT))
        assert (await receive(server))[:2] == (b"hello", pair.address(alice))
        server.sendto(b"and back", client.getsockname())
        assert (await receive(client))[0] == b"and back"
    assert (pair.packets(bob), pair.packets(alice)) == (1, 1)


@pytest.mark.parametrize("family", FAMILIES)
async def test_the_policy_drops_what_is_clear(bob: Host, alice: Host, family: int):
    pair = protect(alice, bob, family=family)
    pair.release(alice)
    with bob.udp(PORT, family) as server, alice.udp(0, family) as client:
        client.sendto(b"clear", (bob.address(family), PORT))
        await eventually(lambda: "XfrmInTmplMismatch" in bob.statistics())
        with pytest.raises(BlockingIOError):
            server.recv(100)


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_clear_neighbour_is_heard(bob: Host, mallory: Host, family: int):
    with bob.udp(PORT, family) as server, mallory.udp(0, family) as client:
        client.sendto(b"hello", (bob.address(family), PORT))
        assert (await receive(server))[:2] == (b"hello", mallory.address(family))


async def test_a_rekey_moves_the_traffic(bob: Host, alice: Host):
    pair = protect(alice, bob)
    with bob.udp(PORT) as server, alice.udp() as client:
        for _ in range(2):
            client.sendto(b"before", (bob.v4, PORT))
            await receive(server)
        old = pair.spi(bob)
        pair.rekey(suite=CBC)
        client.sendto(b"after", (bob.v4, PORT))
        await receive(server)
        assert (pair.packets(bob, old), pair.packets(bob)) == (2, 1)
        pair.retire()
        client.sendto(b"after", (bob.v4, PORT))
        await receive(server)
        assert pair.packets(bob) == 2


@pytest.mark.parametrize("mode", MODES)
async def test_streams(bob: Host, alice: Host, mode: str):
    pair = protect(alice, bob, mode=mode)
    loop = asyncio.get_running_loop()
    inner = mode == "tunnel"
    with bob.listener(PORT, inner=inner) as listener, alice.tcp(inner=inner) as client:
        await loop.sock_connect(client, (pair.address(bob), PORT))
        server, address = await loop.sock_accept(listener)
        with server:
            assert address[0] == pair.address(alice)
            await loop.sock_sendall(client, b"hello")
            assert await loop.sock_recv(server, 100) == b"hello"
    assert pair.packets(bob) >= 3


async def test_compression(bob: Host, alice: Host):
    pair = protect(alice, bob, COMP, spis=(0x1001, 0x1002))
    with bob.udp(PORT) as server, alice.udp() as client:
        client.sendto(b"again " * 100, (bob.v4, PORT))
        assert (await receive(server))[0] == b"again " * 100
    assert pair.packets(bob) == 1


def test_a_test_leaves_nothing_behind(bob: Host, alice: Host):
    protect(alice, bob, GCM)
    bob.sysctl("net/ipv4/tcp_fwmark_accept", 1)
    bob.nft("table inet t { chain c { type filter hook input priority 0; }; }\n")
    bob.interface("ipsec0", 7)
    bob.reset()
    assert bob.show("ip", "xfrm", "state") == bob.show("ip", "xfrm", "policy") == ""
    assert bob.show("nft", "list", "ruleset") == ""
    assert bob.show("cat", "/proc/sys/net/ipv4/tcp_fwmark_accept") == "0\n"
    assert "ipsec0" not in bob.show("ip", "link")


def test_every_host_is_its_own(bob: Host, alice: Host):
    def cookie() -> bytes:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
            return made.getsockopt(socket.SOL_SOCKET, 71, 8)

    ours = cookie()
    with alice:
        assert cookie() != ours
    assert cookie() == ours
