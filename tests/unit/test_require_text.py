"""Requirements as text and as tables."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from requirements import requirements

from ipsec_aio.enums import Assurance
from ipsec_aio.require import Require

A, B, C = Require(encrypted=True), Require(integrity=True), Require(end_to_end=True)


@pytest.mark.parametrize(
    ("text", "requirement"),
    [
        ("encrypted", A),
        ("  encrypted\n", A),
        ("encrypted and integrity", Require(encrypted=True, integrity=True)),
        ("encrypted or integrity and end_to_end", A | (B & C)),
        ("(encrypted or integrity) and end_to_end", (A | B) & C),
        ("not encrypted and integrity", ~A & B),
        ("not (encrypted and integrity)", ~(A & B)),
        ("not not encrypted", A),
        ("((encrypted))", A),
        ("peer='*.example.org'", Require(peer="*.example.org")),
        ('peer = "*.example.org"', Require(peer="*.example.org")),
        ("peer=['a.example', 'b.example']", Require(peer=["a.example", "b.example"])),
        ("peer='CN=d''Artagnan'", Require(peer="CN=d'Artagnan")),
        ('peer="CN=d\'Artagnan"', Require(peer="CN=d'Artagnan")),
        ('policy_name="a ""b"""', Require(policy_name='a "b"')),
        (r"peer='O=Acme\, Inc.'", Require(peer=r"O=Acme\, Inc.")),
        ("peer=moon", Require(peer="moon")),
        ("policy_name='and'", Require(policy_name="and")),
        ("min_bits=128", Require(min_bits=128)),
        ("assurance=exact", Require(assurance=Assurance.EXACT)),
        ("mode=transport and protocol=ESP", Require(mode="transport", protocol="esp")),
        ("forbidden_algorithms='cbc(des)'", Require(forbidden_algorithms="cbc(des)")),
        (
            "authentication_method=[EAP, PRESHAREDKEY]",
            Require(authentication_method=["PRESHAREDKEY", "EAP"]),
        ),
    ],
)
def test_read(text, requirement):
    assert Require.parse(text) == requirement


@pytest.mark.parametrize(
    ("requirement", "text"),
    [
        (~(A & B) | C, "not (encrypted and integrity) or end_to_end"),
        ((A | B) & ~C, "(encrypted or integrity) and not end_to_end"),
        ((A & B) | C, "encrypted and integrity or end_to_end"),
        (Require(peer=["*.a.example", "x"]), "peer=['*.a.example', x]"),
        (Require(policy_name="not"), "policy_name='not'"),
        (Require(policy_name="7"), "policy_name='7'"),
        (
            Require(assurance=5, min_bits=8, mode=1),
            "min_bits=8 and mode=tunnel and assurance=EXACT",
        ),
    ],
)
def test_written(requirement, text):
    assert str(requirement) == text
    assert Require.parse(text) == requirement


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "a clause is expected at position 0, not the end"),
        ("encrypted and", "a clause is expected at position 13"),
        (
            "encrypted integrity",
            "'and', 'or' or the end is expected at position 10, not 'integrity'",
        ),
        ("(encrypted", r"'\)' is expected at position 10, not the end"),
        ("encrypted)", "the end is expected at position 9"),
        ("secure", "a clause is expected at position 0, not 'secure'"),
        ("encrypted=True", "the end is expected at position 9, not '='"),
        ("min_bits", "'=' is expected"),
        ("min_bits 128", "'=' is expected"),
        ("min_bits=", "a value is expected at position 9"),
        ("min_bits=128bits", "no part of a requirement at position 9: '128bits'"),
        ("min_bits='128'", r"min_bits is a number of bits, not '128' \(at position 0\)"),
        ("min_bits=[128, 256]", "min_bits is a number"),
        ("peer=[]", "a value is expected"),
        ("peer=['a.example'", "']' is expected"),
        ("peer=['a.example',]", "a value is expected"),
        ("encrypted and peer='mo*n'", "peer: .*at position 14"),
        ("peer='moon", "no part of a requirement at position 5"),
        ("assurance=UNKNOWN", "demands something"),
        ("encrypted & integrity", "no part of a requirement at position 9"),
        ("(" * 3000 + "encrypted" + ")" * 3000, "nested too deep"),
        ("not " * 3000 + "encrypted", "nested too deep"),
        ("encrypted" + " " * (1 << 20), "characters"),
    ],
)
def test_what_is_wrong_is_told(text, problem):
    with pytest.raises(ValueError, match=problem):
        Require.parse(text)


@given(st.text(alphabet="()[]=,'\" abencryptedornotpeermin_bits1289", max_size=60))
def test_any_text_is_read_or_refused(text):
    try:
        requirement = Require.parse(text)
    except ValueError:
        return
    assert Require.parse(str(requirement)) == requirement


# Tables


def test_a_table():
    requirement = Require.from_toml(
        """
        [service.require]
        encrypted = true
        integrity = false
        min_bits = 128
        assurance = "exact"
        peer = ["*.example.org", "alice@example.org"]
        any = [{ mode = "transport" }, "mode=tunnel and end_to_end"]
        all = ["protocol=esp"]
        not = { peer = "mallory.example.org" }
        """,
        "service",
        "require",
    )
    assert requirement == Require(
        encrypted=True,
        min_bits=128,
        assurance=Assurance.EXACT,
        peer=["*.example.org", "alice@example.org"],
    ) & (Require(mode="transport") | Require(mode="tunnel") & C) & Require(
        protocol="esp"
    ) & ~Require(peer="mallory.example.org")


def test_a_text_in_a_table():
    assert Require.from_toml("require = 'encrypted or integrity'", "require") == A | B
    assert Require.from_toml("encrypted = true") == A
    with pytest.raises(KeyError):
        Require.from_toml("encrypted = true", "require")


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ({}, "^here: .*clause"),
        ({"encrypted": False}, "^here: .*clause"),
        ({"encryptd": True}, "^here.encryptd: there is no such clause"),
        ({"encrypted": "yes"}, "^here.encrypted: "),
        ({"min_bits": "128"}, "^here.min_bits: "),
        ({"peer": "mo*n"}, "^here.peer: "),
        ({"any": []}, r"^here.any: a list"),
        ({"any": {"encrypted": True}}, r"^here.any: a list"),
        ({"any": [{"encrypted": True}, {"min_bits": 0}]}, r"^here.any\[1\].min_bits: "),
        ({"all": ["encrypted or"]}, r"^here.all\[0\]: a clause is expected at position 12"),
        ({"not": {"all": [{"mode": "x"}]}}, r"^here.not.all\[0\].mode: "),
        ({"not": 7}, "^here.not: a table or a text"),
        ({"not": {}}, "^here.not: .*clause"),
    ],
)
def test_what_is_wrong_in_a_table_is_told_by_key(table, problem):
    with pytest.raises(ValueError, match=problem):
        Require.from_mapping(table, where="here")


@given(requirements)
def test_tables_take_texts(requirement):
    table = json.loads(json.dumps({"all": [str(requirement)]}))
    assert Require.from_mapping(table) == requirement
