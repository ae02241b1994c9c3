"""How peers proved themselves: only where charon's listings leave no doubt."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from requirements import by
from test_identity import recorded
from test_ike import ike, sa, synced, up

from ipsec_aio.identities import Identities
from ipsec_aio.identity import AuthenticationMethod, Certificate, IdentityKind, IToken
from ipsec_aio.ike import AuthenticationRound, Connection, decode_connection
from ipsec_aio.names import ike_text
from ipsec_aio.proofs import CACHED, Listed, Proofs, decode_certificate
from ipsec_aio.require import Require

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
    assert bench.proofs.wants
    assert bench.ends() is None
    bench.list()
    assert str(bench.ends().peer) == "a@example.org"
    assert method(bench.ends().peer) is None, "what was listed before does not count"
    bench.come("psk", section(2))
    bench.list()
    assert method(bench.ends(2).peer) is AuthenticationMethod.PRESHAREDKEY


# Only who is established


def eap(**more):
    return section(1, "admin.example", **more)


def listed_again(bench, message):
    """Everything is listed again, an IKE SA of the connection eap among it."""
    bench.now += 1
    bench.table.begin_resync(bench.now)
    bench.table.load(named("eap", sa(message)))
    bench.table.finish_resync(bench.now)


@pytest.mark.parametrize("claim", ["admin.example", "%any"])
def test_one_that_is_not_established_is_not_judged(claim):
    bench = Bench()
    listed_again(bench, section(1, claim, state="CONNECTING"))
    assert not bench.proofs.wants
    bench.list()
    assert bench.ends() is None
    token = bench.peer("eap", eap(remote_eap_id=b"alice@example"))
    assert (str(token), method(token)) == ("alice@example", AuthenticationMethod.EAP)


def test_one_that_is_established_when_it_is_listed_again():
    bench = Bench()
    listed_again(bench, eap(state="CONNECTING"))
    bench.list()
    listed_again(bench, eap(remote_eap_id=b"alice@example"))
    assert bench.proofs.wants
    bench.list()
    assert str(bench.ends().peer) == "alice@example"


@pytest.mark.parametrize(("came", "peer"), [(True, "alice@example"), (False, None)])
def test_one_that_goes_is_judged_if_it_is_known_to_have_come_up(came, peer):
    bench = Bench()
    if came:
        bench.come("eap", eap(remote_eap_id=b"alice@example"))
    listed_again(bench, eap(state="DELETING", remote_eap_id=b"alice@example"))
    bench.list()
    assert (bench.ends() and str(bench.ends().peer)) == peer


@pytest.mark.parametrize(
    "changed", [{}, {"remote_eap_id": b"bob@example"}, {"local_id": b"another.example"}]
)
def test_one_whose_names_change_is_nobody_s(changed):
    bench = Bench()
    bench.peer("eap", eap(remote_eap_id=b"alice@example"))
    listed_again(bench, eap() | {key.replace("_", "-"): v for key, v in changed.items()})
    bench.list()
    assert bench.ends() == Identities()
    listed_again(bench, eap(remote_eap_id=b"alice@example"))
    assert str(bench.ends().peer) == "alice@example"


def test_a_successor_with_another_name_is_nobody_s():
    bench = Bench()
    bench.peer("psk", section())
    both = {"old": section(), "new": section(2, "b@example.org")}
    bench.table.apply("ike-rekey", {"psk": both}, bench.now)
    bench.list()
    assert bench.ends(2) == Identities()


# Names that anybody could have chosen


def admitting(kind, name="", authorities=()):
    round_ = AuthenticationRound(kind, name, authorities=authorities)
    return Connection("net", "IKEv2", (), (round_,))


EXACT = admitting("pre-shared key", "a@example.org")
GROUP = admitting("pre-shared key")
BARE = Listed(None, False, bare=True)


def was_there(bench, name="net", **more):
    """What was there before anybody listened."""
    bench.table.begin_resync(bench.now)
    bench.table.load(named(name, sa(section(**more))))
    bench.table.finish_resync(bench.now)
    bench.list()
    return bench.ends().peer


def proves(token):
    """Whether ``peer=`` is met by it, and nothing is known otherwise."""
    answer = Require(peer="a@example.org").decide(by(token))
    assert answer in (True, None)
    return answer is True


OPEN = [
    GROUP,
    admitting("pre-shared key", "*@example.org"),
    admitting("pre-shared key", "%any"),
    admitting("any"),
    admitting("public key"),
    admitting("public key", "*@example.org"),
    Connection("net", "IKEv2", (), ()),
]
CLOSED = [
    EXACT,
    admitting("any", "a@example.org"),
    admitting("public key", "a@example.org"),
    admitting("public key", authorities=("CN=ca",)),
    admitting("EAP"),
]


@pytest.mark.parametrize(
    ("connection", "proved"), [*((c, False) for c in OPEN), *((c, True) for c in CLOSED)]
)
def test_a_restart_proves_nothing_more(connection, proved):
    assert proves(Bench([connection], [BARE]).peer("net", section())) is proved
    assert proves(was_there(Bench([connection], [BARE]))) is proved


def test_what_weak_names_are_called():
    group, bare = AuthenticationMethod.GROUPKEY, AuthenticationMethod.BTNS
    assert method(Bench([GROUP]).peer("net", section())) is group
    assert method(was_there(Bench([GROUP]))) is group
    assert method(was_there(Bench([admitting("any")]))) is group
    assert method(was_there(Bench([admitting("public key")], [BARE]))) is bare


@pytest.mark.parametrize(
    "certificates", [[], CERTIFICATES, [Listed(None, True, bare=True)], [Listed(None, False)]]
)
def test_without_bare_keys_a_public_key_is_certified(certificates):
    bench = Bench([admitting("public key")], certificates)
    assert proves(was_there(bench))


def test_where_no_certificates_were_listed_there_may_be_bare_keys():
    bench = Bench([admitting("public key")])
    bench.table.begin_resync(bench.now)
    bench.table.load(named("net", sa(section())))
    bench.table.finish_resync(bench.now)
    bench.proofs.listed(bench.connections, None, bench.now, bench.now)
    assert not proves(bench.ends().peer)


def test_a_connection_that_is_not_listed_names_nobody():
    assert Bench([]).peer("net", section()) is None
    assert was_there(Bench([])) is None
    bench = Bench([EXACT])
    bench.connections = []
    assert bench.peer("net", section()) is None


def test_an_identity_of_eap_needs_no_connection():
    token = was_there(Bench([]), remote_eap_id=b"a@example.org")
    assert method(token) is AuthenticationMethod.EAP


@pytest.mark.parametrize(("before", "after"), [(GROUP, EXACT), (EXACT, GROUP)])
def test_any_form_of_a_connection_may_have_been_used(before, after):
    bench = Bench([before])
    bench.connections = [after]
    assert not proves(bench.peer("net", section()))
    bench.come("net", section(2))
    bench.list()
    assert proves(bench.ends(2).peer) is (after is EXACT)


def test_a_form_that_was_gone_for_a_moment():
    bench = Bench([GROUP])
    for connections in ([], [EXACT]):
        bench.connections = connections
        bench.list(late=[("net", section())] if not connections else ())
    assert not proves(bench.ends().peer)


def test_a_form_that_is_long_gone():
    bench = Bench([GROUP])
    bench.connections = [EXACT]
    bench.list()
    bench.now += 61
    bench.list()
    assert proves(was_there(bench))
    bench.connections = []
    bench.list()
    bench.now += 61
    bench.list()
    assert not bench.proofs._forms


def test_a_form_that_came_back_was_not_there_meanwhile():
    bench = Bench([EXACT])
    for connections in ([admitting("EAP")], [EXACT]):
        bench.connections = connections
        bench.list(late=[("net", section())])
    bench.list()
    assert method(bench.ends().peer) is None


# Names of another kind than they look like


MOON = "moon.example.org"
INSIDE = [admitting("public key", authorities=("C=CH, O=Lab, CN=Lab CA",))]


def certificate(*alternatives, key_id=b""):
    (hers,) = (
        each.certificate
        for each in CERTIFICATES
        if not each.own and each.certificate.identifies(IToken.named(ALICE))
    )
    return Listed(replace(hers, alternatives=frozenset(alternatives), key_id=key_id), False)


HERS = certificate((IdentityKind.FQDN, MOON))
OTHER = certificate((IdentityKind.FQDN, "sun.example.org"))
POSING = certificate(key_id=MOON.encode())
AUTHORITY = replace(OTHER, authority=True)


@pytest.mark.parametrize(
    ("certificates", "fresh", "old"),
    [
        ([HERS], True, True),
        ([HERS, OTHER], True, True),
        ([POSING], False, False),
        ([HERS, POSING], False, False),
        ([OTHER], False, True),
        ([AUTHORITY], True, True),
        ([], True, True),
        ([OTHER, Listed(None, False)], True, True),
        ([OTHER] * CACHED, True, True),
        ([certificate((IdentityKind.RFC822, MOON))], False, False),
    ],
)
def test_a_name_that_certificates_have_as_another_kind(certificates, fresh, old):
    peer = Bench(INSIDE, certificates).peer("net", section(peer=MOON))
    assert (peer is not None and peer.matches(MOON)) is fresh
    peer = was_there(Bench(INSIDE, certificates), peer=MOON)
    assert (peer is not None and peer.matches(MOON)) is old


def test_an_address_that_is_in_there_as_a_name_too():
    both = certificate((IdentityKind.IPV4, "192.0.2.1"), (IdentityKind.FQDN, "192.0.2.1"))
    assert str(Bench(INSIDE, [both]).peer("net", section(peer="192.0.2.1"))) == "192.0.2.1"
    name = certificate((IdentityKind.FQDN, "192.0.2.1"))
    assert Bench(INSIDE, [name]).peer("net", section(peer="192.0.2.1")) is None


def test_a_subject_that_no_certificate_has_is_opaque():
    token = Bench(INSIDE, [OTHER]).peer("net", section(peer="CN=moon"))
    assert (str(token), token.opaque, method(token)) == ("CN=moon", True, INLINE)


def test_a_name_that_the_connection_demands_is_of_its_kind():
    exact = admitting("public key", MOON, ("C=CH, O=Lab, CN=Lab CA",))
    assert Bench([exact], [OTHER]).peer("net", section(peer=MOON)).matches(MOON)


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
    assert decode_certificate({"type": b"PUBKEY"}) == Listed(None, False, bare=True)
    assert decode_certificate({"type": b"X509", "data": b"rubbish"}) == Listed(None, False)
    assert decode_certificate({"type": b"X509"}) == Listed(None, False)
    assert decode_certificate({"type": b"X509", "flag": b"CA"}).authority
    own = [each for each in CERTIFICATES if each.own]
    assert [ike_text(each.certificate.subject) for each in own] == [
        "C=CH, O=Lab, CN=server.example.org"
    ]


def test_certificates_without_the_package_that_reads_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    (message, *_) = recorded("list-cert")
    assert decode_certificate(message).certificate is None
