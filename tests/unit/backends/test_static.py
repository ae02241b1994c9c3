"""Identities of SAs that were keyed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sas import LOCAL, OTHER, PEER, ah, esp
from test_memory import CLEAR, CLIENT, SERVER, arrive

from ipsec_aio.backends import open_backend
from ipsec_aio.backends.memory import MemoryBackend
from ipsec_aio.backends.static import StaticIdentities
from ipsec_aio.enums import Direction
from ipsec_aio.identities import UNIDENTIFIED, Identities
from ipsec_aio.identity import IToken

ALICE, BOB, ME = "alice.example.org", "bob.example.org", "me.example.org"


def table(*entries) -> StaticIdentities:
    return StaticIdentities.of({"identity": list(entries)})


def peer(entry_or_entries, sa=None):
    found = table(*entry_or_entries).find(esp(reqid=7, if_id=3) if sa is None else sa).peer
    return None if found is None else str(found)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"spi": 0x1001}, {"spi": 0x1002}),
        ({"proto": "esp"}, {"proto": "ah"}),
        ({"proto": 50}, {"proto": 51}),
        ({"src": "192.0.2.2"}, {"src": "192.0.2.3"}),
        ({"dst": "192.0.2.1"}, {"dst": "192.0.2.2"}),
        ({"reqid": 7}, {"reqid": 8}),
        ({"if_id": 3}, {"if_id": 4}),
    ],
)
def test_an_entry_is_for_what_has_all_that_it_names(right, wrong):
    assert peer([right | {"peer": ALICE}]) == ALICE
    assert peer([wrong | {"peer": ALICE}]) is None
    assert peer([{"spi": 0x1001, "reqid": 7} | wrong | {"peer": ALICE}]) is None
    assert peer([{"spi": 0x1001, "reqid": 7} | right | {"peer": ALICE}]) == ALICE


def test_both_ends():
    found = table({"spi": 0x1001, "peer": ALICE, "local": ME}).find(esp())
    assert found == Identities(IToken.named(ME), IToken.named(ALICE))
    found = table({"spi": 0x1001, "local": ME}).find(esp())
    assert found == Identities(IToken.named(ME), None)


BACK = {"source": LOCAL, "destination": PEER, "reqid": 7}


@pytest.mark.parametrize(
    ("entry", "sa"),
    [
        ({"src": "192.0.2.2", "dst": "192.0.2.1"}, esp(0x2001, **BACK)),
        ({"src": "192.0.2.2"}, esp(0x2001, **BACK)),
        ({"dst": "192.0.2.1", "reqid": 7}, esp(0x2001, **BACK)),
        ({"src": "192.0.2.2", "spi": 0x2001}, esp(0x2001, **BACK)),
        ({"reqid": 7}, esp(0x2001, **BACK)),
        ({"spi": 0x2001}, esp(0x2001, **BACK)),
        # Of it alone.
        ({"src": "192.0.2.1", "dst": "192.0.2.2"}, esp(0x2001, **BACK)),
    ],
)
def test_what_leads_back_has_the_same_ends(entry, sa):
    identities = table(entry | {"peer": ALICE, "local": ME})
    ends = Identities(IToken.named(ME), IToken.named(ALICE))
    assert identities.find(sa, Direction.OUT) == ends
    other = replace(sa, spi=0x3001, reqid=8, destination=OTHER, source=OTHER)
    assert identities.find(other, Direction.OUT) == UNIDENTIFIED
    if entry == {"src": "192.0.2.2"}:
        assert identities.find(sa) == UNIDENTIFIED, "what comes in from here is not hers"


def test_entries_for_both_directions_must_agree():
    entries = [{"src": "192.0.2.2", "peer": ALICE}, {"dst": "192.0.2.2", "peer": BOB}]
    assert table(*entries).find(esp(0x2001, **BACK), Direction.OUT) == UNIDENTIFIED
    assert table(*entries[:1]).find(esp(0x2001, **BACK), Direction.OUT).peer == IToken.named(ALICE)


def test_entries_that_contradict_each_other_name_nobody():
    entries = [{"spi": 0x1001, "peer": ALICE}, {"src": "192.0.2.2", "peer": BOB}]
    assert peer(entries) is None
    assert peer(entries, replace(esp(), source=OTHER)) == ALICE
    assert peer(entries, esp(0x9999)) == BOB
    assert peer([entries[0], entries[0]]) == ALICE
    assert table().find(ah(1, PEER, LOCAL)) == UNIDENTIFIED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("identity = 3", "identity is a int, not a list"),
        ("[[peers]]", "unknown key 'peers'"),
        ("[[identity]]\npeer = 'a'\nspy = 1", r"\[\[identity\]\] number 1: unknown key 'spy'"),
        ("[[identity]]\nspi = 1", "number 1: peer and local are missing"),
        ("[[identity]]\npeer = 'a'", "number 1: it is for no SA"),
        ("[[identity]]\npeer = '*.a'\nspi = 1", r"number 1: peer: .*\*"),
        ("[[identity]]\nlocal = ''\nspi = 1", "number 1: local: "),
        ("[[identity]]\npeer = 'a'\nspi = 1\n[[identity]]\npeer='a'\nsrc='x'", "number 2: src: "),
        ("[[identity]]\npeer = 'a'\nspi = -1", "spi -1 is not between"),
        ("[[identity]]\npeer = 'a'\nproto = 'gre'", "unknown proto 'gre'"),
        ("[[identity]]\npeer = 'a'\nspi = '1'", "spi is a str, not a int"),
        ("peer = ", "Invalid value"),
    ],
)
async def test_what_is_wrong_is_told(tmp_path, text, message):
    path = tmp_path / "who.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as seen:
        async with open_backend("memory", identities=path):
            pass
    assert str(path) in str(seen.value)


async def test_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError):
        async with open_backend("memory", identities="/none"):
            pass


async def test_any_backend_takes_them(tmp_path):
    path = tmp_path / "who.toml"
    path.write_text(f"[[identity]]\nsrc = '{CLIENT}'\npeer = 'fqdn:{ALICE}'\nlocal = '{ME}'")
    async with open_backend("memory", identities=path) as backend:
        assert isinstance(backend, MemoryBackend)
        sa = backend.add_sa(src=CLIENT, dst=SERVER)
        backend.add_sa(src=CLEAR, dst=SERVER)
        token = arrive(backend)
        assert (str(token.peer), str(token.local)) == (ALICE, ME)
        assert arrive(backend, CLEAR).peer is None
        backend.rekey(sa)
        assert arrive(backend) is token
        # Who is told otherwise knows better.
        backend.add_sa(src=CLIENT, dst=SERVER, peer=BOB)
        assert str(arrive(backend).peer) == BOB
        late = backend.add_sa(src=CLIENT, dst=SERVER, identity_pending=True)
        assert arrive(backend).pending
        backend.identify(late, peer=BOB)
        assert str(arrive(backend).peer) == BOB


def test_a_declaration_may_hold_them():
    backend = MemoryBackend.from_toml(f"""
        [[sa]]
        src = "{CLIENT}"
        dst = "{SERVER}"
        spi = 0x1001
        [[identity]]
        spi = 0x1001
        peer = "{ALICE}"
    """)
    assert str(arrive(backend).peer) == ALICE
