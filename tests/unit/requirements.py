"""Requirements of every form, and tokens to ask them of, for the tests."""

from __future__ import annotations

from hypothesis import strategies as st
from sas import CBC, FAR, GATE, NULL, SHA, ah, esp, null, tunnel
from test_tokens import Bench, by_policy

from ipsec_aio.algorithms import AEADS, AUTHENTICATORS, CIPHERS
from ipsec_aio.enums import Assurance, Mode
from ipsec_aio.identity import AuthenticationMethod, IdentityKind, IToken
from ipsec_aio.require import Require
from ipsec_aio.sa import Algorithm

MOON = IToken(
    IdentityKind.FQDN, "moon.example.org", authentication_method=AuthenticationMethod.PRESHAREDKEY
)
SUN = IToken(IdentityKind.FQDN, "sun.example.org")
MEMBER = IToken(
    IdentityKind.FQDN, "moon.example.org", authentication_method=AuthenticationMethod.GROUPKEY
)
PRINTED = IToken(IdentityKind.DN, "C=CH, CN=moon", opaque=True)
NOBODY = IToken(IdentityKind.NULL, authentication_method=AuthenticationMethod.NONE)


class Known:
    """A token whose identities are said by the test; the rest is the token's own."""

    def __init__(self, token, peer=None, local=None) -> None:
        self._token = token
        self.peer = peer
        self.local = local

    def __getattr__(self, name):
        return getattr(self._token, name)


def token(*sas, spi=0x1001, **fields):
    return Bench(*sas).resolve(spi, **fields)


def by(peer=MOON, local=None, *sas):
    return Known(token(*(sas or (esp(),))), peer, local)


TOKENS = {
    "unknown": token(doubt="x"),
    "pending": token(),
    "clear": token(spi=0),
    "gcm": token(esp()),
    "null": token(null()),
    "ah": token(ah()),
    "unauthenticated": token(esp(encryption=CBC)),
    "3des": token(esp(encryption=Algorithm("cbc(des3_ede)", 192), authentication=SHA)),
    "gost": token(esp(encryption=Algorithm("cbc(gost)", 256), authentication=SHA)),
    "tunnel": token(tunnel()),
    "host tunnel": token(esp(mode=Mode.TUNNEL)),
    "two": token(esp(), ah()),
    "inferred": by_policy(False),
    "trusted": by_policy(True),
    "moon": by(MOON, SUN),
    "sun": by(SUN, MOON),
    "member": by(MEMBER),
    "printed": by(PRINTED),
    "nobody": by(NOBODY),
    "clear moon": Known(token(spi=0), MOON),
    "unknown moon": Known(token(doubt="x"), MOON, SUN),
}
UNTOLD = [TOKENS[name] for name in ("unknown", "pending", "unknown moon")]

_IDENTITIES = st.sampled_from(
    [
        "*.example.org",
        "moon.example.org",
        "alice@example.org",
        "C=CH, O=Acme\\, Inc., CN=*",
        "C=CH, CN=d'Artagnan",
        "192.0.2.0/24",
        "@#0fee",
        "%null",
        MOON,
        SUN,
        IToken(IdentityKind.KEY_ID, "0fee", pub_key_id=b"k" * 32, audit_string="a ' b"),
    ]
)


def _several(items):
    return st.one_of(items, st.lists(items, min_size=1, max_size=3))


_ALGORITHMS = st.sampled_from(sorted([*AEADS, *CIPHERS, *AUTHENTICATORS]))
_VALUES = {
    "encrypted": st.just(True),
    "integrity": st.just(True),
    "min_bits": st.integers(1, 1024),
    "protocol": st.sampled_from(["esp", "AH", 50]),
    "mode": st.sampled_from([Mode.TRANSPORT, "tunnel", "beet", "IPTFS"]),
    "algorithms": _several(_ALGORITHMS),
    "forbidden_algorithms": _several(_ALGORITHMS),
    "end_to_end": st.just(True),
    "assurance": st.sampled_from([a for a in Assurance if a]),
    "peer": _several(_IDENTITIES),
    "local": _several(_IDENTITIES),
    "authentication_method": _several(st.sampled_from(AuthenticationMethod)),
    "policy_name": st.text(min_size=1) | st.sampled_from(["and", "128", "it's", '"', "a b"]),
}

simple = (
    st.dictionaries(st.sampled_from(sorted(_VALUES)), st.none(), min_size=1, max_size=4)
    .flatmap(lambda chosen: st.fixed_dictionaries({name: _VALUES[name] for name in chosen}))
    .map(lambda clauses: Require(**clauses))
)
requirements = st.recursive(
    simple,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] & pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1]),
        inner.map(lambda one: ~one),
    ),
    max_leaves=8,
)

__all__ = [
    "FAR",
    "GATE",
    "NULL",
    "TOKENS",
    "UNTOLD",
    "Known",
    "by",
    "requirements",
    "simple",
    "token",
]
