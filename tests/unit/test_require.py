"""What is demanded of a channel, and how a refusal reads."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from requirements import MEMBER, MOON, NOBODY, PRINTED, SUN, TOKENS, UNTOLD, by, requirements, token
from sas import CBC, GMAC, OTHER, SHA, ah, esp, null, protect, tunnel
from test_tokens import Bench, by_policy

from ipsec_aio.enums import Assurance, Mode
from ipsec_aio.errors import ProtectionError
from ipsec_aio.events import PolicyAdded
from ipsec_aio.identity import AuthenticationMethod, IdentityKind, IdentityPattern, IToken
from ipsec_aio.policy import Template
from ipsec_aio.require import Demands, Require
from ipsec_aio.require_logic import MAX_DEPTH
from ipsec_aio.sa import IPPROTO_AH, IPPROTO_ESP, Algorithm

ENCRYPTED, INTEGRITY = Require(encrypted=True), Require(integrity=True)
EXACT = Require(assurance=Assurance.EXACT)
anything = st.sampled_from(list(TOKENS.values()))


@pytest.mark.parametrize(
    ("requirement", "ptoken", "clause"),
    [
        (ENCRYPTED, token(esp()), None),
        (INTEGRITY, token(esp()), None),
        (EXACT, token(esp()), None),
        (Require(encrypted=True, integrity=True, assurance=Assurance.POLICY), token(esp()), None),
        (ENCRYPTED, token(null()), "encrypted"),
        (INTEGRITY, token(null()), None),
        (INTEGRITY, token(ah()), None),
        (ENCRYPTED, token(esp(encryption=CBC)), "encrypted"),
        (INTEGRITY, token(esp(encryption=CBC)), "integrity"),
        (EXACT, token(esp(encryption=CBC)), None),
        (ENCRYPTED, token(spi=0), "encrypted"),
        (INTEGRITY, token(spi=0), "integrity"),
        (EXACT, token(spi=0), "assurance"),
        (Require(assurance=Assurance.NONE), token(spi=0), None),
        (Require(assurance=Assurance.NONE), token(), "assurance"),
        (ENCRYPTED, token(), "encrypted"),
        (INTEGRITY, token(doubt="x"), "integrity"),
        (ENCRYPTED, by_policy(False), "encrypted"),
        (ENCRYPTED, by_policy(True), None),
        (Require(assurance=Assurance.POLICY), by_policy(False), None),
        (EXACT, by_policy(True), "assurance"),
        (Require(encrypted=True, integrity=True), token(), "encrypted"),
    ],
)
def test_check(requirement, ptoken, clause):
    error = requirement.check(ptoken)
    assert (error.clause if error else None) == clause
    assert (requirement.decide(ptoken) is True) is (error is None)


DES3 = esp(encryption=Algorithm("cbc(des3_ede)", 192), authentication=SHA)
MD5 = esp(encryption=CBC, authentication=Algorithm("hmac(md5)", 512, 96))
SA_CLAUSES = [
    ({"min_bits": 128}, token(esp()), True),
    ({"min_bits": 129}, token(esp()), False),
    ({"min_bits": 128}, token(esp(aead=GMAC)), True),
    ({"min_bits": 112}, token(DES3), True),
    ({"min_bits": 113}, token(DES3), False),
    ({"min_bits": 129}, token(MD5), False),
    ({"min_bits": 128}, token(MD5), True),
    ({"min_bits": 256}, token(null()), True),
    ({"min_bits": 1}, token(esp(encryption=Algorithm("cbc(gost)", 256), authentication=SHA)), None),
    ({"min_bits": 1}, token(esp(encryption=Algorithm("cbc(aes)"), authentication=SHA)), None),
    ({"min_bits": 1}, token(esp(encryption=CBC)), False),
    ({"min_bits": 129}, token(esp(), ah()), None),
    ({"min_bits": 128}, token(esp(), ah()), True),
    ({"min_bits": 1}, by_policy(False), None),
    ({"min_bits": 128}, by_policy(True), True),
    ({"protocol": "esp"}, token(esp()), True),
    ({"protocol": "ah"}, token(esp()), False),
    ({"protocol": IPPROTO_AH}, token(ah()), True),
    ({"protocol": "esp"}, token(esp(), ah()), None),
    ({"mode": "transport"}, token(esp()), True),
    ({"mode": Mode.TUNNEL}, token(esp()), False),
    ({"mode": "tunnel"}, token(tunnel()), True),
    ({"mode": "transport"}, token(esp(), tunnel()), None),
    ({"algorithms": "rfc4106(gcm(aes))"}, token(esp()), True),
    ({"algorithms": ["cbc(aes)", "hmac(sha256)"]}, token(esp()), False),
    ({"algorithms": ["cbc(aes)"]}, token(esp(encryption=CBC, authentication=SHA)), False),
    ({"algorithms": ["hmac(sha256)"]}, token(null()), False),
    ({"algorithms": ["hmac(sha256)", "ecb(cipher_null)"]}, token(null()), True),
    ({"forbidden_algorithms": ["cbc(des3_ede)"]}, token(esp()), True),
    ({"forbidden_algorithms": ["cbc(des3_ede)"]}, token(DES3), False),
    ({"forbidden_algorithms": "cbc(des)"}, TOKENS["gost"], None),
    ({"forbidden_algorithms": "hmac(sha256)"}, TOKENS["gost"], False),
    ({"algorithms": "hmac(sha256)"}, TOKENS["gost"], None),
    ({"forbidden_algorithms": "cbc(des)"}, token(spi=0), False),
    ({"end_to_end": True}, token(esp()), True),
    ({"end_to_end": True}, token(tunnel()), None),
    ({"end_to_end": True}, token(esp(mode=Mode.TUNNEL)), True),
    ({"end_to_end": True}, token(esp(), tunnel()), None),
    ({"end_to_end": True}, token(spi=0), False),
    ({"assurance": "exact"}, token(esp()), True),
    ({"assurance": "EXACT"}, by_policy(True), False),
]


@pytest.mark.parametrize(("clauses", "ptoken", "answer"), SA_CLAUSES)
def test_what_is_said_of_sas(clauses, ptoken, answer):
    requirement = Require(**clauses)
    assert requirement.decide(ptoken) is answer
    assert (requirement.check(ptoken) is None) is (answer is True)
    assert ((~requirement).check(ptoken) is None) is (answer is False)


def test_a_tunnel_of_which_no_sa_is_known_is_no_end():
    """The policy demands AH in transport mode within a tunnel; only the first has an SA."""
    bench = Bench(ah(), trust_policy=True)
    templates = Template(proto=IPPROTO_AH), Template(proto=IPPROTO_ESP, mode=Mode.TUNNEL)
    bench.mirror.apply(PolicyAdded(protect(*templates)), 0)
    bench.now += 10
    ptoken = bench.resolve(generation=0, mark=None)
    assert ptoken.assurance is Assurance.POLICY
    assert ptoken.protected
    assert Require(end_to_end=True).decide(ptoken) is None


def test_under_a_socket_s_policy_all_count_that_may_have_come_by_it():
    """The socket's policy asks for ESP; a source address tells nothing of who used which SA."""
    strong, weak = esp(aead=Algorithm("rfc4106(gcm(aes))", 288, 128)), esp(0x1002, source=OTHER)
    fields = {"generation": 0, "mark": None, "enforced": Template()}
    assert Require(min_bits=256).decide(token(strong, **fields)) is True
    ptoken = token(strong, weak, **fields)
    assert ptoken.assurance is Assurance.ENFORCED
    assert Require(min_bits=256).decide(ptoken) is None
    assert Require(min_bits=128, protocol="esp", mode="transport").decide(ptoken) is True
    # Those of other gateways may have carried it, too.
    fields["enforced"] = Template(mode=Mode.TUNNEL)
    near, far = esp(mode=Mode.TUNNEL), tunnel(0x1002, authentication=SHA, encryption=CBC)
    assert Require(end_to_end=True).decide(token(near, **fields)) is True
    assert Require(end_to_end=True).decide(token(near, far, **fields)) is None


PROVED = AuthenticationMethod.PRESHAREDKEY
KEYED = IToken(IdentityKind.FQDN, "moon.example.org", pub_key_id=b"k" * 32)
CERTIFIED = IToken(IdentityKind.FQDN, "moon.example.org", certificate_authority_dn="C=CH, CN=Root")


@pytest.mark.parametrize(
    ("clauses", "ptoken", "answer"),
    [
        ({"peer": "moon.example.org"}, by(MOON), True),
        ({"peer": "*.example.org"}, by(MOON), True),
        ({"peer": "*.example.com"}, by(MOON), False),
        ({"peer": IdentityPattern.parse("MOON.example.org")}, by(MOON), True),
        ({"peer": ["alice@example.org", "*.example.org"]}, by(MOON), True),
        ({"peer": ["alice@example.org", "sun.example.org"]}, by(MOON), False),
        ({"peer": "moon.example.org"}, by(None), None),
        ({"peer": "moon.example.org"}, TOKENS["clear moon"], None),
        ({"peer": "moon.example.org"}, TOKENS["unknown moon"], None),
        ({"peer": "moon.example.org"}, by(MOON, None, esp(encryption=CBC)), None),
        ({"peer": "moon.example.org"}, by(SUN, MOON), False),
        ({"local": "moon.example.org"}, by(SUN, MOON), True),
        ({"local": "moon.example.org"}, by(MOON), None),
        # A name that nobody proved is nobody's.
        ({"peer": "moon.example.org"}, by(MEMBER), None),
        ({"peer": "sun.example.org"}, by(MEMBER), None),
        ({"peer": "alice@example.org"}, by(MEMBER), None),
        ({"authentication_method": "groupkey"}, by(MEMBER), True),
        ({"peer": "C=CH, CN=moon"}, by(PRINTED), None),
        ({"peer": "moon.example.org"}, by(PRINTED), False),
        ({"peer": "%null"}, by(NOBODY), True),
        ({"peer": "%null"}, by(MOON), False),
        ({"peer": "moon.example.org"}, by(NOBODY), None),
        # Tokens: the name, and as much of the proof as they tell.
        ({"peer": MOON}, by(MOON), True),
        ({"peer": MOON.export()}, by(MOON), True),
        ({"peer": MOON}, by(SUN), False),
        ({"peer": IToken(IdentityKind.FQDN, "MOON.example.org")}, by(MOON), True),
        ({"peer": MOON}, by(IToken(IdentityKind.FQDN, "moon.example.org")), None),
        ({"peer": KEYED}, by(KEYED), True),
        ({"peer": KEYED}, by(MOON), None),
        (
            {"peer": KEYED},
            by(IToken(IdentityKind.FQDN, "moon.example.org", pub_key_id=b"x" * 32)),
            False,
        ),
        ({"peer": CERTIFIED}, by(CERTIFIED), True),
        ({"peer": CERTIFIED}, by(MOON), None),
        (
            {"peer": CERTIFIED},
            by(
                IToken(
                    IdentityKind.FQDN, "moon.example.org", certificate_authority_dn="C=ch, CN=ROOT"
                )
            ),
            True,
        ),
        ({"authentication_method": PROVED}, by(MOON), True),
        ({"authentication_method": ["EAP", PROVED]}, by(MOON), True),
        ({"authentication_method": ["EAP", "XAUTH"]}, by(MOON), False),
        ({"authentication_method": PROVED}, by(SUN), None),
        ({"authentication_method": PROVED}, by(None), None),
        ({"authentication_method": PROVED}, TOKENS["clear moon"], None),
    ],
)
def test_what_is_said_of_identities(clauses, ptoken, answer):
    requirement = Require(**clauses)
    assert requirement.decide(ptoken) is answer
    assert ((~requirement).check(ptoken) is None) is (answer is False)


def test_the_policy_that_let_it_in():
    ptoken = by_policy(True)
    assert ptoken.policy_name
    assert Require(policy_name=ptoken.policy_name).decide(ptoken) is True
    assert Require(policy_name="another").decide(ptoken) is False
    assert Require(policy_name=ptoken.policy_name).decide(by_policy(False)) is None
    assert Require(policy_name="another").decide(token(esp())) is None
    assert Require(policy_name="another").decide(token(spi=0)) is None


def test_a_token_says_what_it_was_fixed_with_when_its_sas_are_gone():
    bench = Bench(esp())
    ptoken = bench.resolve(0x1001)
    bench.remove(esp())
    assert not ptoken.sas
    assert Require(min_bits=128, mode="transport", protocol="esp").check(ptoken) is None


# Refusals


def test_a_refusal_names_the_clause_and_what_was_found():
    error = ENCRYPTED.check(token(null()))
    assert isinstance(error, PermissionError)
    assert str(error) == (
        "encrypted: this is EXACT (authenticated by "
        "esp/transport(ecb(cipher_null)+hmac(sha256)-256/128))"
    )
    assert EXACT.check(token(spi=0)).reason == "EXACT is demanded, but this is NONE (clear)"
    assert isinstance(pickle.loads(pickle.dumps(error)), ProtectionError)


@pytest.mark.parametrize(
    ("requirement", "ptoken", "text"),
    [
        (
            ENCRYPTED & Require(peer=["*.example.com", "alice@example.org"]),
            by(SUN),
            "peer: *.example.com or alice@example.org is demanded, but the peer is "
            "<IToken FQDN 'sun.example.org'>",
        ),
        (
            Require(local="sun.example.org"),
            by(MOON),
            "local: sun.example.org is demanded, but this end is not known",
        ),
        (
            Require(peer="moon.example.org"),
            TOKENS["clear moon"],
            "peer: moon.example.org is demanded, but this is NONE (clear)",
        ),
        (
            Require(protocol="esp"),
            token(spi=0),
            "protocol: esp is demanded, but this is NONE (clear)",
        ),
        (~EXACT, token(esp()), "not assurance: it holds: this is EXACT (encrypted and authen"),
        (~EXACT, token(doubt="x"), "not assurance: it cannot be told: this is UNKNOWN (unkn"),
        (
            EXACT | (ENCRYPTED & Require(min_bits=1)) | ~INTEGRITY,
            token(doubt="x"),
            "assurance or (encrypted and min_bits) or not integrity: assurance: EXACT is demanded, "
            "but this is UNKNOWN (unknown: x); encrypted: this is UNKNOWN (unknown: x); "
            "not integrity: it cannot be told: this is",
        ),
        (~(ENCRYPTED | EXACT), token(esp()), "not (encrypted or assurance): it holds: this is"),
        (EXACT & (ENCRYPTED | INTEGRITY), token(esp(encryption=CBC)), "encrypted or integrity: "),
    ],
)
def test_refusals_of_combinations(requirement, ptoken, text):
    assert str(requirement.check(ptoken)).startswith(text)


def test_a_pending_token_is_refused_until_it_is_not():
    bench = Bench()
    pending = bench.resolve(0x1001)
    assert ENCRYPTED.check(pending)
    assert ENCRYPTED.decide(pending) is None
    bench.add(esp())
    assert ENCRYPTED.check(pending) is None


# The algebra


@given(requirements, anything)
def test_negation_is_kleenes(requirement, ptoken):
    answer = requirement.decide(ptoken)
    assert (~requirement).decide(ptoken) is (None if answer is None else not answer)
    assert ~~requirement == requirement
    assert (requirement.check(ptoken) is None) is (answer is True)
    assert (
        requirement.check(ptoken) is None
        or (~requirement).check(ptoken) is None
        or (answer is None)
    )


@given(requirements, requirements, anything)
def test_de_morgan(one, other, ptoken):
    assert (~(one & other)).decide(ptoken) is (~one | ~other).decide(ptoken)
    assert (~(one | other)).decide(ptoken) is (~one & ~other).decide(ptoken)


@given(requirements, requirements, anything)
def test_combining_is_commutative_and_idempotent(one, other, ptoken):
    assert one & other == other & one
    assert one | other == other | one
    assert hash(one & other) == hash(other & one)
    assert one & one == one | one == one


@given(requirements, requirements, requirements, anything)
def test_combining_is_associative_and_distributes(a, b, c, ptoken):
    assert (a & b) & c == a & (b & c)
    assert (a | b) | c == a | (b | c)
    assert (a & (b | c)).decide(ptoken) is ((a & b) | (a & c)).decide(ptoken)


@given(requirements, st.sampled_from(UNTOLD))
def test_nothing_is_met_by_what_is_unknown(requirement, ptoken):
    assert requirement.decide(ptoken) is None
    assert requirement.check(ptoken)
    assert (~requirement).check(ptoken)


@given(requirements, anything)
def test_demands_hold_of_whatever_meets_the_requirement(requirement, ptoken):
    demands = requirement.demands
    if requirement.check(ptoken) is None:
        assert ENCRYPTED.check(ptoken) is None or not demands.encrypted
        assert INTEGRITY.check(ptoken) is None or not demands.integrity
        assert demands.mode is None or Require(mode=demands.mode).check(ptoken) is None
        assert demands.protocol is None or Require(protocol=demands.protocol).check(ptoken) is None
    assert demands.integrity or demands == Demands()


def test_known_to_be_clear_is_known_not_to_be_encrypted():
    assert (~ENCRYPTED).check(token(spi=0)) is None


@pytest.mark.parametrize(
    ("requirement", "demands"),
    [
        (ENCRYPTED, Demands(encrypted=True, integrity=True)),
        (EXACT, Demands()),
        (~ENCRYPTED, Demands()),
        (Require(peer="a.example"), Demands(integrity=True)),
        (
            Require(encrypted=True, mode="tunnel", protocol="esp"),
            Demands(True, True, Mode.TUNNEL, IPPROTO_ESP),
        ),
        (ENCRYPTED | Require(mode="tunnel"), Demands(integrity=True)),
        (
            Require(encrypted=True, mode="tunnel") | Require(mode="tunnel"),
            Demands(integrity=True, mode=Mode.TUNNEL),
        ),
        (ENCRYPTED | EXACT, Demands()),
        (~(~ENCRYPTED | EXACT), Demands(encrypted=True, integrity=True)),
        (~(~ENCRYPTED & ~INTEGRITY), Demands(integrity=True)),
    ],
)
def test_demands(requirement, demands):
    assert requirement.demands == demands


# A value


@given(requirements)
def test_it_is_a_value(requirement):
    again = Require.parse(str(requirement))
    assert again == requirement
    assert hash(again) == hash(requirement)
    assert str(again) == str(requirement)
    code = eval(repr(requirement), {"Require": Require, "Assurance": Assurance})
    assert code == requirement
    assert pickle.loads(pickle.dumps(requirement)) == requirement
    assert copy.deepcopy(requirement) == requirement


def test_it_reads_as_code():
    assert Require(encrypted=True, integrity=False) == ENCRYPTED
    assert ENCRYPTED != INTEGRITY
    assert ENCRYPTED != "encrypted"
    assert Require(assurance=5) == EXACT
    assert repr(Require(encrypted=True, assurance=Assurance.EXACT)) == (
        "Require(encrypted=True, assurance=Assurance.EXACT)"
    )
    assert repr(EXACT & ~(ENCRYPTED | Require(peer="b.example")) & ENCRYPTED & INTEGRITY) == (
        "Require(assurance=Assurance.EXACT) & ~(Require(encrypted=True) | "
        "Require(peer='b.example')) & Require(encrypted=True, integrity=True)"
    )
    assert repr(EXACT & ENCRYPTED) == (
        "Require(assurance=Assurance.EXACT) & Require(encrypted=True)"
    )
    assert repr(~(ENCRYPTED & INTEGRITY)) == "~Require(encrypted=True, integrity=True)"


def test_it_does_not_change():
    for name in ("encrypted", "_node"):
        with pytest.raises(AttributeError):
            setattr(ENCRYPTED, name, False)
        with pytest.raises(AttributeError):
            delattr(ENCRYPTED, name)


def test_it_has_no_truth_value():
    """``a and b`` would quietly be ``b``."""
    with pytest.raises(TypeError, match="&"):
        _ = ENCRYPTED and INTEGRITY


def test_only_requirements_are_combined():
    with pytest.raises(TypeError):
        _ = ENCRYPTED & "integrity"
    with pytest.raises(TypeError):
        _ = ENCRYPTED | True


@pytest.mark.parametrize(
    "clauses", [{}, {"encrypted": False}, {"encrypted": None, "assurance": Assurance.UNKNOWN}]
)
def test_it_demands_something(clauses):
    with pytest.raises(ValueError, match="clause"):
        Require(**clauses)


@pytest.mark.parametrize(
    "clauses",
    [
        {"encrypted": "yes"},
        {"integrity": 1},
        {"end_to_end": "no"},
        {"assurance": 5.0},
        {"assurance": True},
        {"min_bits": "128"},
        {"min_bits": True},
        {"mode": b"tunnel"},
        {"protocol": None, "mode": 1.0},
        {"protocol": b"esp"},
        {"algorithms": b"cbc(aes)"},
        {"algorithms": 12},
        {"forbidden_algorithms": [1]},
        {"peer": 7},
        {"peer": [None]},
        {"peer": b"moon"},
        {"local": {"moon.example": 1}.values()},
        {"authentication_method": 3},
        {"policy_name": 3},
        {"unheard_of": 1},
    ],
)
def test_clauses_have_types(clauses):
    with pytest.raises(TypeError):
        Require(**clauses)


@pytest.mark.parametrize(
    "clauses",
    [
        {"assurance": "SURE"},
        {"assurance": 9},
        {"min_bits": 0},
        {"min_bits": -1},
        {"min_bits": 1025},
        {"mode": "trigger"},
        {"mode": Mode.IN_TRIGGER},
        {"protocol": "comp"},
        {"protocol": 108},
        {"protocol": True},
        {"algorithms": "aes"},
        {"algorithms": []},
        {"forbidden_algorithms": ["3des"]},
        {"peer": []},
        {"peer": "*"},
        {"peer": "mo*.example.org"},
        {"peer": "itoken1:kind=SHEEP"},
        {"peer": PRINTED},
        {"local": ""},
        {"authentication_method": "PSK"},
        {"policy_name": ""},
    ],
)
def test_values_make_sense(clauses):
    with pytest.raises(ValueError, match=next(iter(clauses))):
        Require(**clauses)


def test_a_pattern_is_what_its_text_says():
    """A pattern that was built by hand, not read, counts as its text."""
    forged = IdentityPattern("moon.example.org", IdentityKind.FQDN, "sun.example.org")
    assert Require(peer=forged).decide(by(SUN)) is False


def test_it_is_not_nested_without_end():
    def nest(requirement, times):
        for _ in range(times):
            requirement = ~(requirement & EXACT)
        return requirement

    deepest = nest(ENCRYPTED, MAX_DEPTH // 2)
    assert Require.parse(str(deepest)) == deepest
    with pytest.raises(ValueError, match="deep"):
        nest(deepest, 1)
