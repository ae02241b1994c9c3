"""How peers proved themselves: only where charon's listings leave no doubt."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_identity import recorded
from test_ike import ike, sa, synced, up

from ipsec_aio.identities import Identities
from ipsec_aio.identity import AuthenticationMethod, Certificate, IdentityKind, IToken
from ipsec_aio.ike import AuthenticationRound, Connection, decode_connection
from ipsec_aio.names import ike_text
from ipsec_aio.proofs import CACHED, Listed, Proofs, decode_certificate

CONNECTIONS = [decode_connection(message) for message in recorded("list-conn")]
CERTIFICATES = [decode_certificate(message) for message in recorded("list-cert")]
ALICE = "C=CH, O=Lab, CN=alice.example.org"
MALLORY = "C=CH, O=Lab, CN=mallory, OU=Admins"
OWN = "server.example.org"
INLINE, TRUSTED = AuthenticationMethod.PKIX_INLINE, AuthenticationMethod.PKIX_TRUSTED


def section(number=1, peer="a@example.org", **more):
    return ike(number, remote_id=peer.encode(), local_id=OWN.encode(), **more)


def named(name, message):
    """Under the name of a connection."""
    return {name: message["conn"]} | {k: v for k, v in message.items() if k != "conn"}


class Bench:
    """An IKE SA of a connection that was listed before and after it came up."""

    def __init__(self, connections=CONNECTIONS, certificates=CERTIFICATES) -> None:
        self.now = 100.0
        self.table = synced()
        self.proofs = Proofs(self.table)
        self.connections, self.certificates = list(connections), list(certificates)
        self.list()

    def list(self, *, late=()) -> None:
        began = self.now
        for name, message in late:
            self.come(name, message)
        self.now += 1
        self.proofs.listed(self.connections, self.certificates, began, self.now)

    def come(self, name, message) -> None:
        self.now += 1
        self.table.apply("ike-updown", named(name, up(message)), self.now)

    def ends(self, number=1) -> Identities | None:
        (found,) = (each for each in self.table.sas() if each.unique_id == number)
        return self.proofs.ends(found)

    def peer(self, name, message) -> IToken | None:
        self.come(name, message)
        assert self.proofs.wants
        self.list()
        assert not self.proofs.wants
        return self.ends().peer


def method(token):
    return token.authentication_method


def test_a_pre_shared_key():
    token = Bench().peer("psk", section())
    assert token == IToken.from_ike(
        "a@example.org", authentication_method=AuthenticationMethod.PRESHAREDKEY
    )


def test_this_end():
    bench = Bench()
    bench.peer("psk", section())
    assert bench.ends().local == IToken.named(OWN)


def test_a_certificate():
    token = Bench().peer("x509", section(peer=ALICE))
    assert (token.kind, token.opaque, method(token)) == (IdentityKind.DN, False, INLINE)
    assert token.matches("C=CH, O=Lab, CN=*")
    assert token.certificate_dn == ALICE
    assert token.certificate_authority_dn == "C=CH, O=Lab, CN=Lab CA"
    assert len(token.pub_key_id) == 32
    assert token.channel_binding.startswith(b"ipsec-end-point:")


def test_a_certificate_says_what_printed_text_cannot():
    token = Bench().peer("x509", section(peer=MALLORY))
    assert not token.matches("C=CH, O=Lab, CN=mallory, OU=Admins")
    assert not token.opaque


def test_without_a_key_of_ours_nothing_is_bound():
    bench = Bench(certificates=[each for each in CERTIFICATES if not each.own])
    token = bench.peer("x509", section(peer=ALICE))
    assert (method(token), token.channel_binding) == (INLINE, None)


@pytest.mark.parametrize(
    "certificates",
    [
        [],
        [each for each in CERTIFICATES if not each.certificate.identifies(IToken.named(ALICE))],
        [*CERTIFICATES, Listed(None, False)],
        [*CERTIFICATES, Listed(None, True)],
    ],
    ids=["none", "none of his", "and a raw key", "and a raw key of ours"],
)
def test_a_certificate_that_may_be_another_says_nothing(certificates):
    token = Bench(certificates=certificates).peer("x509", section(peer=ALICE))
    assert (token.opaque, token.certificate_dn, token.pub_key_id) == (True, None, None)


def test_two_certificates_of_one_name_say_nothing():
    (hers,) = (
        each
        for each in CERTIFICATES
        if not each.own and each.certificate.identifies(IToken.named(ALICE))
    )
    other = Listed(replace(hers.certificate, public_key=b"another"), False)
    token = Bench(certificates=[*CERTIFICATES, other]).peer("x509", section(peer=ALICE))
    assert token.opaque
    ours = Listed(hers.certificate, True)
    token = Bench(certificates=[*CERTIFICATES, ours]).peer("x509", section(peer=ALICE))
    assert token.opaque


def test_a_cache_that_may_have_dropped_it_says_nothing():
    (other,) = (
        each
        for each in CERTIFICATES
        if not each.own and each.certificate.identifies(IToken.named(ALICE))
    )
    crowd = [*CERTIFICATES, *[other] * CACHED]
    assert Bench(certificates=crowd).peer("x509", section(peer=ALICE)).opaque


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"remote_eap_id": b"carol@example.org"}, AuthenticationMethod.EAP),
        ({"remote_xauth_id": b"dave"}, AuthenticationMethod.XAUTH),
    ],
)
def test_what_speaks_for_itself(fields, expected):
    bench = Bench(connections=[])
    token = bench.peer("roads", section(**fields))
    assert str(token) == next(iter(fields.values())).decode()
    assert method(token) is expected


def test_eap_under_the_same_name():
    assert method(Bench().peer("eap", section())) is AuthenticationMethod.EAP


def trusting(*subjects):
    return Connection(
        "x509",
        "IKEv2",
        (AuthenticationRound("public key"),),
        (AuthenticationRound("public key", certificates=subjects),),
    )


def test_a_certificate_that_is_configured():
    token = Bench([trusting(ALICE)]).peer("x509", section(peer=ALICE))
    assert (method(token), token.certificate_dn) == (TRUSTED, ALICE)


@pytest.mark.parametrize("subjects", [(), (MALLORY,)])
def test_a_certificate_that_may_not_have_been_asked_for(subjects):
    token = Bench([trusting(*subjects)]).peer("x509", section(peer=ALICE))
    assert (method(token), token.opaque) == (None, True)


def test_a_configured_one_that_is_not_listed():
    token = Bench([trusting(ALICE)], []).peer("x509", section(peer=ALICE))
    assert (method(token), token.opaque) == (None, True)


def test_a_certificate_whose_subject_cannot_be_printed():
    name = "alice.example.org"
    odd = Certificate(b"?", b"?", b"key", frozenset({(IdentityKind.FQDN, name)}))
    token = Bench([trusting("?")], [Listed(odd, False)]).peer("x509", section(peer=name))
    assert (str(token), method(token)) == (name, None)


# Only what was listed before and after


def test_what_was_there_before_anybody_listened():
    bench = Bench()
    bench.table.begin_resync(bench.now)
    bench.table.load(named("psk", sa(section())))
    bench.table.finish_resync(bench.now)
    assert bench.proofs.wants
    bench.list()
    token = bench.ends().peer
    assert (str(token), method(token)) == ("a@example.org", None)


@pytest.mark.parametrize("before", [[], CONNECTIONS[1:]])
def test_a_connection_that_was_loaded_meanwhile(before):
    bench = Bench(before)
    bench.connections = CONNECTIONS
    assert method(bench.peer("psk", section())) is None
    bench.come("psk", section(2))
    bench.list()
    assert method(bench.ends(2).peer) is AuthenticationMethod.PRESHAREDKEY


def test_a_connection_that_was_changed_meanwhile():
    bench = Bench()
    bench.connections = [Connection("psk", "IKEv2", (), (AuthenticationRound("EAP"),))]
    assert method(bench.peer("psk", section())) is None


def test_one_that_came_while_it_was_listed_waits_for_the_next_listing():
    bench = Bench()
    bench.list(late=[("psk", section())])
    assert bench.ends() is None
    assert bench.proofs.wants
    bench.list()
    assert method(bench.ends().peer) is AuthenticationMethod.PRESHAREDKEY


def test_one_that_came_during_the_first_listing_proves_nothing():
    bench = Bench()
    bench.proofs.failed()
    bench.list(late=[("psk", section())])
    bench.list()
    assert method(bench.ends().peer) is None


def test_what_cannot_be_listed():
    bench = Bench()
    bench.come("psk", section())
    bench.proofs.failed()
    assert not bench.proofs.wants
    assert method(bench.ends().peer) is None
    bench.come("psk", section(2))
    bench.list()
    assert method(bench.ends(2).peer) is None, "what was listed before does not count"


# Once


def test_a_rekeyed_ike_sa_is_the_same():
    bench = Bench()
    token = bench.peer("psk", section())
    old, new = section(), section(2)
    bench.connections = []
    bench.table.apply("ike-rekey", {"psk": {"old": old, "new": new}}, bench.now)
    assert not bench.proofs.wants
    assert bench.ends(2).peer is token
    bench.list()
    assert bench.ends(2).peer is token


def test_what_is_gone_is_forgotten():
    bench = Bench()
    bench.peer("psk", section())
    bench.table.apply("ike-updown", named("psk", sa(section())), bench.now)
    bench.list()
    assert not bench.proofs._judged


# What is no name


@pytest.mark.parametrize("peer", ["%any", "what?", ""])
def test_nobody(peer):
    bench = Bench()
    assert bench.peer("x509", section(peer=peer)) is None


def test_what_charon_lists():
    assert decode_certificate({"type": b"X509_CRL", "data": b"x"}) is None
    assert decode_certificate({"type": b"PUBKEY"}) == Listed(None, False)
    assert decode_certificate({"type": b"X509", "data": b"rubbish"}) == Listed(None, False)
    assert decode_certificate({"type": b"X509"}) == Listed(None, False)
    own = [each for each in CERTIFICATES if each.own]
    assert [ike_text(each.certificate.subject) for each in own] == [
        "C=CH, O=Lab, CN=server.example.org"
    ]
