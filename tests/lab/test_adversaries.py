"""What adversaries in the lab can do: each of these reaches an unguarded program."""

from __future__ import annotations

import pytest
from hosts import COMP, FAMILIES, Host, eventually, protect, receive
from packets import compressed, half_forged, udp

from ipsec_aio.enums import Mode
from ipsec_aio.flow import Selector
from ipsec_aio.kernel.sockopts import set_policy
from ipsec_aio.policy import Policy, Template
from ipsec_aio.wire.sockpolicy import encode

PORT = 5000


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_forged_source_in_clear(bob: Host, alice: Host, mallory: Host, family: int):
    forged = udp(alice.address(family), bob.address(family), (4000, PORT), b"forged")
    with bob.udp(PORT, family) as server:
        mallory.inject(forged, bob)
        assert (await receive(server))[:2] == (b"forged", alice.address(family))


@pytest.mark.parametrize("policy", [False, True], ids=["SPD", "socket policy"])
@pytest.mark.parametrize("family", FAMILIES)
async def test_a_datagram_half_in_a_tunnel_and_half_in_clear(
    bob: Host, alice: Host, mallory: Host, family: int, policy: bool
):
    """Policies look at what was put together, and see the security path of one half."""
    pair = protect(alice, bob, mode="tunnel", family=family)
    to = bob.address(family, inner=True)
    (first, second), data = half_forged(pair.address(alice), to, (4000, PORT))
    with bob.udp(PORT, family, inner=True) as server:
        if policy:
            demand = Template(mode=Mode.TUNNEL, reqid=pair.reqid)
            selector = Selector(family=server.family)
            set_policy(server, encode(Policy(selector=selector, templates=(demand,))))
        alice.send_packet(first, to)
        await eventually(lambda: pair.packets(bob) == 1)
        mallory.inject(second, bob)
        assert (await receive(server))[0] == data
    assert pair.packets(bob) == 1


async def test_clear_ipcomp_under_a_colliding_number(bob: Host, alice: Host, mallory: Host):
    protect(alice, bob, COMP, spis=(0x1001, 0x1002), policies=False)
    forged = compressed(udp(alice.v4, bob.v4, (4000, PORT), b"forged " * 20), 0x1001)
    with bob.udp(PORT) as server:
        mallory.inject(forged, bob)
        assert (await receive(server))[:2] == (b"forged " * 20, alice.v4)
