"""Identities of several SAs, agreed upon."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipsec_aio.identities import UNIDENTIFIED, Awaited, Identities, agreed
from ipsec_aio.identity import IdentityKind, IToken

ME, ALICE, MALLORY = (IToken.named(f"{name}.example.org") for name in ("me", "alice", "mallory"))
HERS, FOREIGN = Identities(ME, ALICE), Identities(ME, MALLORY)


@pytest.mark.parametrize(
    ("answers", "result"),
    [
        ([], UNIDENTIFIED),
        ([HERS], HERS),
        ([HERS, HERS], HERS),
        ([HERS, FOREIGN], Identities(ME, None)),
        ([HERS, FOREIGN, HERS], Identities(ME, None)),
        ([HERS, UNIDENTIFIED], UNIDENTIFIED),
        ([HERS, Awaited(2), Awaited(1)], Awaited(1)),
        ([UNIDENTIFIED, Awaited(1)], UNIDENTIFIED),
        ([Identities(None, ALICE), Awaited(1), Identities(None, MALLORY)], UNIDENTIFIED),
    ],
)
def test_an_end_is_known_if_all_agree(answers, result):
    assert agreed(answers) == result
    assert agreed(reversed(answers)) == result


ANSWERS = st.sampled_from([HERS, FOREIGN, UNIDENTIFIED, Identities(None, ALICE), Awaited(1)])


@given(st.lists(ANSWERS, min_size=1))
def test_nobody_is_named_whom_one_does_not_name(answers):
    result = agreed(answers)
    if isinstance(result, Identities):
        for end in (0, 1):
            assert result[end] is None or all(answer[end] == result[end] for answer in answers)
    else:
        assert result in answers


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("moon.example.org", IdentityKind.FQDN, "moon.example.org"),
        ("fqdn:moon.example.org", IdentityKind.FQDN, "moon.example.org"),
        ("@moon.example.org", IdentityKind.FQDN, "moon.example.org"),
        ("alice@example.org", IdentityKind.RFC822, "alice@example.org"),
        ("192.0.2.1", IdentityKind.IPV4, "192.0.2.1"),
        ("2001:db8::1", IdentityKind.IPV6, "2001:db8::1"),
        (r"C=CH, O=Acme\, Inc., CN=moon", IdentityKind.DN, r"C=CH, O=Acme\, Inc., CN=moon"),
        ("keyid:#0fee", IdentityKind.KEY_ID, "0fee"),
        ("keyid:text", IdentityKind.KEY_ID, b"text".hex()),
        ("%null", IdentityKind.NULL, ""),
    ],
)
def test_people_write_names(text, kind, value):
    token = IToken.named(text)
    assert (token.kind, token.value, token.opaque) == (kind, value, False)
    assert IToken.named(token.export()) == token


@pytest.mark.parametrize(
    "text", ["*.example.org", "*@example.org", "192.0.2.0/24", "C=CH, CN=*", "", "itoken1:kind=X"]
)
def test_what_names_nobody_is_no_name(text):
    with pytest.raises(ValueError, match=r"\S"):
        IToken.named(text)
