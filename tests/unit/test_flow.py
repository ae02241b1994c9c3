"""Addresses are packed as ipaddress packs them, whatever is written."""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipsec_aio.flow import Mark, format_address, pack_address, unmap


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_addresses_are_packed_and_written(address: object) -> None:
    packed = pack_address(str(address))
    assert packed == unmap(ip_address(str(address)).packed)
    assert pack_address(format_address(packed)) == packed


@given(st.text(alphabet="0123456789.:af%e+- ١", max_size=18))
def test_what_ipaddress_refuses_is_refused(text: str) -> None:
    try:
        expected = unmap(ip_address(text.partition("%")[0]).packed)
    except ValueError:
        with pytest.raises(ValueError, match=r"."):
            pack_address(text)
    else:
        assert pack_address(text) == expected


@pytest.mark.parametrize(
    "text", ["01.2.3.4", "1.2.3", "1.2.3.4.5", "256.1.1.1", "1.2.3.+4", "1. 2.3.4", "١.2.3.4", ""]
)
def test_what_only_looks_like_an_address(text: str) -> None:
    with pytest.raises(ValueError, match="IPv4 or IPv6"):
        pack_address(text)


def test_scopes_and_mapped_addresses() -> None:
    assert pack_address("fe80::1%eth0") == IPv6Address("fe80::1").packed
    assert pack_address("::ffff:192.0.2.1") == bytes([192, 0, 2, 1])


def test_a_mark_fits_as_the_kernel_compares_it() -> None:
    """``(mark & m) == v``, in xfrm_policy_match() and in each look-up of a state."""
    assert Mark().matches(7)
    assert Mark(5, 0xFF).matches(0x105)
    assert not Mark(5, 0xFF).matches(6)
    assert not Mark(0x105, 0xFF).matches(5)
    assert not Mark(0x105, 0xFF).matches(0x105)
    assert not Mark(5, 0).matches(5)
