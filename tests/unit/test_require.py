"""What is demanded of a channel, and how a refusal reads."""

from __future__ import annotations

import pickle

import pytest
from sas import CBC, ah, esp, null
from test_tokens import Bench, by_policy

from ipsec_aio.enums import Assurance
from ipsec_aio.errors import ProtectionError
from ipsec_aio.require import Require

ENCRYPTED, INTEGRITY = Require(encrypted=True), Require(integrity=True)
EXACT = Require(assurance=Assurance.EXACT)


def token(*sas, spi=0x1001, **fields):
    return Bench(*sas).resolve(spi, **fields)


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


def test_a_refusal_names_the_clause_and_what_was_found():
    error = ENCRYPTED.check(token(null()))
    assert isinstance(error, PermissionError)
    assert str(error) == (
        "encrypted: this is EXACT (authenticated by "
        "esp/transport(ecb(cipher_null)+hmac(sha256)-256/128))"
    )
    assert EXACT.check(token(spi=0)).reason == "EXACT is demanded, but this is NONE (clear)"
    assert isinstance(pickle.loads(pickle.dumps(error)), ProtectionError)


def test_a_pending_token_is_refused_until_it_is_not():
    bench = Bench()
    pending = bench.resolve(0x1001)
    assert ENCRYPTED.check(pending)
    bench.add(esp())
    assert ENCRYPTED.check(pending) is None


def test_it_is_a_value():
    assert Require(encrypted=True, integrity=False) == ENCRYPTED
    assert hash(Require(encrypted=True)) == hash(ENCRYPTED)
    assert ENCRYPTED != INTEGRITY
    assert Require(assurance=5) == EXACT
    with pytest.raises(AttributeError):
        ENCRYPTED.encrypted = False
    assert repr(Require(encrypted=True, assurance=Assurance.EXACT)) == (
        "Require(encrypted=True, assurance=Assurance.EXACT)"
    )
    assert eval(repr(INTEGRITY)) == INTEGRITY


@pytest.mark.parametrize(
    "clauses", [{}, {"encrypted": False}, {"encrypted": None, "assurance": Assurance.UNKNOWN}]
)
def test_it_demands_something(clauses):
    with pytest.raises(ValueError, match="clause"):
        Require(**clauses)


@pytest.mark.parametrize(
    "clauses", [{"encrypted": "yes"}, {"integrity": 1}, {"assurance": "EXACT"}, {"assurance": 9}]
)
def test_clauses_have_types(clauses):
    with pytest.raises(TypeError):
        Require(**clauses)


@pytest.mark.parametrize(
    "name",
    [
        "peer",
        "local",
        "min_bits",
        "mode",
        "protocol",
        "algorithms",
        "end_to_end",
        "authentication_method",
        "policy_name",
    ],
)
def test_other_clauses_are_refused_not_ignored(name):
    with pytest.raises(NotImplementedError):
        Require(encrypted=True, **{name: "x"})
    with pytest.raises(TypeError):
        Require(encrypted=True, unheard_of=1)


def test_combining_is_refused():
    for combine in (lambda: ENCRYPTED & INTEGRITY, lambda: ENCRYPTED | INTEGRITY, lambda: ~EXACT):
        with pytest.raises(NotImplementedError):
            combine()
