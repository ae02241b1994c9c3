"""What adversaries in the lab can do: each of these reaches an unguarded program."""

from __future__ import annotations

import pytest
from hosts import COMP, FAMILIES, Host, eventually, protect, receive
from packets import compressed, fragments, udp

PORT = 5000


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_forged_source_in_clear(bob: Host, alice: Host, mallory: Host, family: int):
    forged = udp(alice.address(family), bob.address(family), (4000, PORT), b"forged")
    with bob.udp(PORT, family) as server:
        mallory.inject(forged, bob)
        assert (await receive(server))[:2] == (b"forged", alice.address(family))


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_datagram_half_in_a_tunnel_and_half_in_clear(
    bob: Host, alice: Host, mallory: Host, family: int
):
    pair = protect(alice, bob, mode="tunnel", family=family)
    to = bob.address(family, inner=True)
    whole = udp(alice.address(family, inner=True), to, (4000, PORT), b"good" * 10 + b"evil" * 10)
    first, second = fragments(whole, 48)
    with bob.udp(PORT, family, inner=True) as server:
        alice.send_packet(first, to)
        await eventually(lambda: pair.packets(bob) == 1)
        mallory.inject(second, bob)
        assert (await receive(server))[0] == b"good" * 10 + b"evil" * 10
    assert pair.packets(bob) == 1


async def test_clear_ipcomp_under_a_colliding_number(bob: Host, alice: Host, mallory: Host):
    protect(alice, bob, COMP, spis=(0x1001, 0x1002), policies=False)
    forged = compressed(udp(alice.v4, bob.v4, (4000, PORT), b"forged " * 20), 0x1001)
    with bob.udp(PORT) as server:
        mallory.inject(forged, bob)
        assert (await receive(server))[:2] == (b"forged " * 20, alice.v4)
