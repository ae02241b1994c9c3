"""What SAs do for packets."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sas import CBC, GMAC, NULL, SHA, ah, comp, esp, null, tunnel

from ipsec_aio.algorithms import AEADS, AUTHENTICATORS, CIPHERS
from ipsec_aio.enums import Mode
from ipsec_aio.protection import UNKNOWN, both, group_of, protection_of, weakest
from ipsec_aio.sa import Algorithm

ODD = Algorithm("rot13", 128, 64)


@pytest.mark.parametrize(
    ("sa", "privacy", "integrity", "ipoptions"),
    [
        (esp(), True, True, False),
        (tunnel(), True, True, True),
        (esp(mode=Mode.IPTFS), True, True, True),
        (esp(mode=Mode.BEET), True, True, False),
        (esp(encryption=CBC, authentication=SHA), True, True, False),
        (esp(encryption=CBC), True, False, False),
        (esp(encryption=CBC, mode=Mode.TUNNEL), True, False, False),
        (esp(encryption=CBC, authentication=Algorithm("digest_null")), True, False, False),
        (null(), False, True, False),
        (esp(encryption=NULL), False, False, False),
        (esp(aead=GMAC), False, True, False),
        (ah(), False, True, True),
        (ah(mode=Mode.TUNNEL), False, True, True),
        (comp(), False, False, False),
        (replace(comp(), proto=4), False, False, False),
        (esp(aead=ODD), None, None, False),
        (esp(encryption=ODD, authentication=SHA), None, True, False),
        (esp(encryption=CBC, authentication=ODD), True, None, False),
        (replace(ah(), authentication=ODD), False, None, None),
    ],
)
def test_properties(sa, privacy, integrity, ipoptions):
    p = protection_of(sa)
    assert (p.privacy, p.integrity, p.ipoptions) == (privacy, integrity, ipoptions)
    assert p.tunnel == (sa.mode in (Mode.TUNNEL, Mode.BEET, Mode.IPTFS))
    assert p.compression == (sa.proto == 108)
    assert p.groups == (group_of(sa),)


def test_known_names_are_the_kernels():
    assert not AEADS.keys() & CIPHERS.keys()
    assert not AUTHENTICATORS.keys() & CIPHERS.keys()


def test_a_group_is_what_may_replace_an_sa():
    assert group_of(esp(1)) == group_of(esp(2))
    assert group_of(esp(1)) != group_of(esp(1, reqid=1))
    assert group_of(esp(1)) != group_of(null(1))
    assert group_of(esp(1)).strength == group_of(esp(1, reqid=1)).strength
    assert str(group_of(tunnel(1, reqid=7))) == (
        "esp/tunnel(rfc4106(gcm(aes))-128/128)[198.51.100.2-198.51.100.1] reqid 7"
    )
    assert str(group_of(replace(comp(), proto=4))) == "proto-4/transport"


sas = st.sampled_from(
    [esp(), tunnel(), null(), ah(), comp(), esp(encryption=CBC), esp(aead=GMAC), esp(aead=ODD)]
)


@given(st.lists(sas, min_size=1, max_size=5))
def test_the_weakest_claims_nothing_that_one_of_them_does_not(several):
    result = weakest(protection_of(sa) for sa in several)
    each = [protection_of(sa) for sa in several]
    for name in ("privacy", "integrity", "compression", "tunnel", "ipoptions"):
        values = {getattr(p, name) for p in each}
        if getattr(result, name) is True:
            assert values == {True}
        if values == {True}:
            assert getattr(result, name) is True
    assert result == weakest(protection_of(sa) for sa in reversed(several))
    assert set(result.groups) == {group_of(sa) for sa in several}


def test_of_nothing_nothing_is_known():
    assert weakest([]) is UNKNOWN


def test_both_claim_what_either_does():
    values = (True, False, None)
    for one, other in product(values, values):
        result = both(UNKNOWN._replace(privacy=one), UNKNOWN._replace(privacy=other)).privacy
        assert result is (True if True in (one, other) else None if None in (one, other) else False)
    assert len(both(protection_of(esp()), protection_of(ah())).groups) == 2
