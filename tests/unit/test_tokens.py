"""Tokens: what they refuse, what they say, and when they are the same."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import weakref

import pytest
from sas import (
    CBC,
    GMAC,
    OTHER,
    PEER,
    SHA,
    ah,
    comp,
    esp,
    larval,
    null,
    protect,
    seen,
    tunnel,
)

from ipsec_aio import tokens as module
from ipsec_aio.enums import Assurance
from ipsec_aio.errors import StaleTokenError, TokenError
from ipsec_aio.events import PolicyAdded, SAAdded, SADeleted
from ipsec_aio.flow import Selector, pack_address
from ipsec_aio.mirror import TOMBSTONE_SECONDS, Mirror
from ipsec_aio.policy import Template
from ipsec_aio.sa import Usage
from ipsec_aio.tokens import PENDING_SECONDS, PToken, Resolver

PROPERTIES = (
    "assurance",
    "protected",
    "privacy_protected",
    "integrity_protected",
    "compression_available",
    "tunnel_mode",
    "ipoptions_protected",
    "policy_name",
    "channel",
    "local",
    "peer",
    "sa",
    "sas",
    "alive",
    "audit_string",
    "information_string",
)


class Bench:
    """A resolver over a mirror, with its own clock."""

    def __init__(self, *sas, trust_policy=False) -> None:
        self.now = 100.0
        self.mirror = Mirror()
        self.mirror.begin_resync(0)
        self.mirror.finish_resync(0)
        self.resolver = Resolver(self.mirror, lambda: self.now, trust_policy=trust_policy)
        self.resolver.generation = 1
        self.settled: list[PToken] = []
        self.resolver.settled = self.settled.append
        for sa in sas:
            self.add(sa)

    def add(self, sa) -> None:
        self.mirror.apply(SAAdded(sa), self.now)

    def remove(self, sa) -> None:
        self.mirror.apply(SADeleted(sa.key), self.now)

    def resolve(self, spi=0, **fields) -> PToken:
        return self.resolver.resolve(seen(spi, **fields))


def drive(coroutine):
    """Run what does not wait."""
    with pytest.raises(StopIteration) as stop:
        coroutine.send(None)
    return stop.value.value


@pytest.fixture
def token() -> PToken:
    return Bench(esp()).resolve(0x1001)


# An opaque handle


def test_nobody_builds_one():
    with pytest.raises(TypeError, match="cannot be built"):
        PToken()
    with pytest.raises(TypeError):
        PToken("x")


def test_it_is_final():
    with pytest.raises(TypeError, match="subclass"):
        type("Forged", (PToken,), {})


def test_a_forged_one_says_nothing():
    forged = object.__new__(PToken)
    for name in PROPERTIES:
        with pytest.raises(AttributeError):
            getattr(forged, name)


@pytest.mark.parametrize("do", [pickle.dumps, copy.copy, copy.deepcopy])
def test_it_is_not_copied(token, do):
    with pytest.raises(TypeError, match="own process"):
        do(token)
    with pytest.raises(TypeError, match="own process"):
        do([token]) if do is not copy.copy else do(token)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_pickle_protocol_takes_it(token, protocol):
    with pytest.raises(TypeError):
        pickle.dumps(token, protocol)


def test_it_has_no_truth_value(token):
    with pytest.raises(TypeError, match="protected"):
        bool(token)
    with pytest.raises(TypeError):
        _ = token and None


def test_it_does_not_change(token):
    for name in (*PROPERTIES, "_verdict", "anything"):
        with pytest.raises(AttributeError):
            setattr(token, name, True)
        with pytest.raises(AttributeError):
            delattr(token, name)
    assert not hasattr(token, "__dict__")


def test_equality_is_identity(token):
    other = Bench(esp()).resolve(0x1001)
    assert token == token
    assert token != other
    assert len({token, other, token}) == 2


def test_it_can_be_referred_to_weakly_and_dies():
    bench = Bench(esp())
    token = bench.resolve(0x1001)
    reference = weakref.ref(token)
    assert bench.resolve(0x1001) is reference()
    del token
    gc.collect()
    assert reference() is None
    assert not bench.resolver._kinds


# What it says


@pytest.mark.parametrize(
    ("sa", "privacy", "integrity", "protected"),
    [
        (esp(), True, True, True),
        (tunnel(), True, True, True),
        (null(), False, True, True),
        (ah(), False, True, True),
        (esp(aead=GMAC), False, True, True),
        (esp(encryption=CBC, authentication=SHA), True, True, True),
        (esp(encryption=CBC), True, False, False),
        (comp(), False, False, False),
    ],
)
def test_protected_demands_integrity(sa, privacy, integrity, protected):
    token = Bench(sa).resolve(0x1001)
    assert token.assurance is Assurance.EXACT
    assert token.privacy_protected is privacy
    assert token.integrity_protected is integrity
    assert token.protected is protected
    assert token.tunnel_mode is (sa == tunnel())
    assert token.compression_available is (sa == comp())
    assert token.ipoptions_protected is (sa in (ah(), tunnel()))
    assert token.policy_name is None
    assert (token.local, token.peer) == (None, None)
    assert token.sa == sa
    assert token.sas == (sa,)
    assert token.alive


def test_a_clear_channel():
    token = Bench().resolve(0)
    assert token.assurance is Assurance.NONE
    assert token.protected is False
    assert token.privacy_protected is False
    assert token.ipoptions_protected is False
    assert token.sa is None
    assert token.sas == ()
    assert token.alive
    assert token.information_string == "clear"
    assert repr(token) == (
        "<PToken local=192.0.2.1 peer=192.0.2.2 assurance=NONE privacy=no integrity=no tunnel=no>"
    )


def test_an_unknown_one():
    token = Bench().resolve(0, doubt="evidence was truncated")
    assert token.assurance is Assurance.UNKNOWN
    assert token.protected is False
    assert token.privacy_protected is None
    assert token.tunnel_mode is None
    assert not token.alive
    assert token.information_string == "unknown: evidence was truncated"
    assert "reason='evidence was truncated'" in repr(token)


def by_policy(trust_policy):
    bench = Bench(esp(), trust_policy=trust_policy)
    selector = Selector(destination_port=5000, destination_port_mask=0xFFFF, proto=17)
    bench.mirror.apply(PolicyAdded(protect(selector=selector)), 90)
    return bench.resolve(generation=0)


def test_a_policy_counts_only_where_it_is_trusted():
    token = by_policy(False)
    assert token.assurance is Assurance.POLICY
    assert token.integrity_protected is True
    assert token.protected is False
    assert token.policy_name == "any → any:5000 proto 17 priority 10"
    assert by_policy(True).protected is True
    assert "local=192.0.2.1:5000 peer=192.0.2.2 proto=17" in token.audit_string
    assert f"policy={token.policy_name!r}" in token.audit_string


def test_a_trusted_policy_without_a_known_sa_proves_no_integrity():
    bench = Bench(trust_policy=True)
    bench.mirror.apply(PolicyAdded(protect(Template())), 90)
    token = bench.resolve(generation=0)
    assert (token.assurance, token.protected) == (Assurance.POLICY, False)
    assert token.information_string == "not protected"


def test_what_an_operator_reads():
    token = Bench(esp(reqid=7)).resolve(0x1001)
    assert token.information_string == (
        "encrypted and authenticated by esp/transport(rfc4106(gcm(aes))-128/128) reqid 7"
    )
    assert token.audit_string == (
        "local=192.0.2.1 peer=192.0.2.2 assurance=EXACT privacy=yes integrity=yes tunnel=no "
        "by=esp/transport(rfc4106(gcm(aes))-128/128) reqid 7 spi=0x00001001"
    )
    token = by_policy(False)
    six = Bench(esp(source=pack_address("2001:db8::2"), destination=pack_address("2001:db8::1")))
    assert "local=2001:db8::1 peer=2001:db8::2" in repr(
        six.resolve(0x1001, local=pack_address("2001:db8::1"), peer=pack_address("2001:db8::2"))
    )


def test_ports_of_ipv6_are_readable():
    one, two = pack_address("2001:db8::1"), pack_address("2001:db8::2")
    selector = Selector(source_port=7, source_port_mask=0xFFFF)
    token = Bench(tunnel(selector=selector)).resolve(0x1001, local=one, peer=two, peer_port=7)
    assert "local=2001:db8::1 peer=[2001:db8::2]:7 proto=17" in repr(token)


# Channels


def test_a_channel_is_one_object_whatever_the_ports():
    bench = Bench(esp())
    token = bench.resolve(0x1001)
    assert bench.resolve(0x1001, peer_port=1, local_port=2, protocol=6) is token
    assert bench.resolve(0) is not token


def test_ports_make_channels_where_selectors_name_them():
    selector = Selector(destination_port_mask=0xFFFF, destination_port=5000)
    bench = Bench(tunnel(selector=selector))
    token = bench.resolve(0x1001, local_port=5000)
    assert bench.resolve(0x1001, local_port=5000, peer_port=9) is token
    assert bench.resolve(0x1001, local_port=5000, protocol=6) is not token


def test_an_equivalent_rekey_is_the_same_channel():
    bench = Bench(esp(1))
    token = bench.resolve(1)
    bench.now += 1
    bench.add(esp(2))
    assert bench.resolve(2) is token
    assert (token.sa, token.sas) == (esp(2), (esp(1), esp(2)))
    bench.remove(esp(1))
    assert (token.sas, token.alive) == ((esp(2),), True)
    assert bench.resolve(2) is token
    bench.remove(esp(2))
    assert (token.sa, token.alive, token.protected) == (None, False, True)


@pytest.mark.parametrize(
    "other", [null(2), esp(2, reqid=1), ah(2), esp(2, if_id=1), esp(2, encryption=CBC)]
)
def test_another_protection_is_another_channel(other):
    bench = Bench(esp(1), other)
    token = bench.resolve(1)
    assert bench.resolve(2) is not token
    assert token.sas == (esp(1),)


def test_a_removed_sa_s_packets_are_of_the_same_channel():
    bench = Bench(esp(1), esp(2))
    bench.resolver.lookup_missing = lambda key: True
    token = bench.resolve(1)
    bench.remove(esp(1))
    assert bench.resolve(1) is token
    bench.now += TOMBSTONE_SECONDS
    bench.mirror.advance(bench.now)
    assert bench.resolve(1) is not token


def test_sas_of_a_dump_are_put_in_order_by_their_age():
    bench = Bench()
    old, new = (esp(n, usage=Usage(add_time=n)) for n in (1, 2))
    bench.mirror.begin_resync(1)
    bench.mirror.load(SAAdded(new), 1)
    bench.mirror.load(SAAdded(old), 1)
    bench.mirror.finish_resync(1)
    assert bench.resolve(1).sas == (old, new)


def test_a_token_stays_as_it_was_resolved():
    bench = Bench(esp())
    token = bench.resolve(0x1001)
    bench.mirror.begin_resync(bench.now)
    assert token.protected
    assert token.alive
    assert not bench.resolve(0x1001).protected
    bench.mirror.finish_resync(bench.now)
    assert token.protected
    assert not token.alive
    bench.resolver.close()
    assert token.protected


def test_a_closed_resolver_keeps_nothing_alive():
    bench = Bench(esp())
    token, clear = bench.resolve(0x1001), bench.resolve(0)
    bench.resolver.close()
    assert not token.alive
    assert not clear.alive
    assert token.protected


def test_equivalence():
    bench = Bench(esp(1), esp(2, reqid=5), null(3), esp(4, OTHER), esp(5, encryption=CBC))
    one, two, weak, other, cipher = (
        bench.resolve(n, peer=OTHER if n == 4 else PEER) for n in range(1, 6)
    )
    assert one.equivalent(one)
    assert one.equivalent(two)
    assert two.equivalent(one)
    assert not one.equivalent(weak)
    assert not one.equivalent(other)
    assert not one.equivalent(cipher)
    unknown = bench.resolve(1, doubt="x")
    assert unknown.equivalent(unknown)
    assert not unknown.equivalent(bench.resolve(1, doubt="y"))
    assert not one.equivalent(unknown)
    assert bench.resolve(0).equivalent(bench.resolve(0))


# Pending


def test_a_pending_one_says_unknown_and_then_what_comes():
    bench = Bench()
    token = bench.resolve(0x1001)
    assert token.assurance is Assurance.UNKNOWN
    assert bench.resolve(0x1001) is token
    bench.add(esp())
    assert token.protected
    assert bench.settled == [token]
    assert bench.resolve(0x1001) is token
    assert drive(token.resolved()) is token.channel is token


def test_one_of_a_known_channel_leads_to_its_token():
    bench = Bench(esp(1))
    known, pending = bench.resolve(1), bench.resolve(2)
    bench.add(esp(2))
    assert pending.protected
    assert pending is not known
    assert drive(pending.resolved()) is pending.channel is known


def test_what_it_became_is_fixed():
    bench = Bench()
    token = bench.resolve(0x1001)
    bench.add(null())
    assert token.privacy_protected is False
    bench.add(esp())
    assert token.privacy_protected is False


def test_larval_sas_do_not_settle_it():
    bench = Bench()
    token = bench.resolve(0x1001)
    bench.add(larval(0x1001))
    assert token.assurance is Assurance.UNKNOWN
    bench.add(esp())
    assert token.protected


def test_too_late_is_unknown_for_good():
    bench = Bench()
    token = bench.resolve(0x1001)
    assert bench.resolver.next_deadline() == bench.now + PENDING_SECONDS
    bench.now += PENDING_SECONDS + 0.1
    assert bench.resolve(0x1001) is not token
    bench.add(esp())
    assert not token.protected
    assert bench.settled == [token]
    assert drive(token.resolved()) is token
    assert bench.resolve(0x1001).protected


def test_a_resync_ends_the_wait():
    bench = Bench()
    token = bench.resolve(0x1001)
    bench.mirror.begin_resync(bench.now)
    bench.mirror.load(SAAdded(esp()), bench.now)
    bench.mirror.finish_resync(bench.now)
    assert not token.protected
    assert "lost" in token.information_string
    assert bench.resolve(0x1001).protected


def test_a_stamp_that_is_lost_ends_the_wait():
    bench = Bench()
    token = bench.resolve(0x1001)
    bench.resolver.generation = 2
    bench.add(esp())
    assert token.assurance is Assurance.UNKNOWN
    assert bench.settled == [token]


def test_closing_ends_the_wait():
    bench = Bench()
    token = bench.resolve(0x1001)
    bench.resolver.close()
    assert bench.settled == [token]
    assert "closed" in token.information_string
    assert bench.resolver.next_deadline() is None


def test_an_addition_is_noticed_although_the_epoch_changed_before():
    bench = Bench()
    token = bench.resolve(0x1001)
    bench.mirror.bump()
    bench.resolver.settle_all()
    epoch = bench.mirror.epoch
    bench.add(esp())
    assert bench.mirror.epoch != epoch
    bench.resolver.settle_all()
    assert bench.settled == [token]
    bench.resolver.settle(token)
    assert bench.settled == [token]


def test_those_who_wait_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "PENDING_LIMIT", 2)
    bench = Bench()
    tokens = [bench.resolve(spi) for spi in (1, 2, 3)]
    bench.add(esp(1))
    bench.add(esp(3))
    assert [t.protected for t in tokens] == [True, False, False]
    assert "too many" in tokens[2].information_string
    del tokens
    gc.collect()
    assert bench.resolver.next_deadline() is None


def test_without_a_backend_nobody_can_wait():
    token = Bench().resolve(0x1001)
    with pytest.raises(TokenError):
        token.resolved().send(None)


# Processes and threads


def test_it_is_stale_after_a_fork():
    bench = Bench(esp())
    token, pending = bench.resolve(0x1001), bench.resolve(7)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        failed = b"failed"
        try:
            for one in (token, pending):
                for name in PROPERTIES:
                    with pytest.raises(StaleTokenError):
                        getattr(one, name)
                with pytest.raises(StaleTokenError):
                    one.resolved().send(None)
                with pytest.raises(StaleTokenError):
                    one.equivalent(one)
            assert repr(token) == "<PToken stale: of another process>"
            assert token == token
            assert bench.resolver.stale
            assert Bench(esp()).resolve(0x1001).protected
            failed = b"passed"
        finally:
            os.write(writer, failed)
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        assert pipe.read() == b"passed"
    os.waitpid(child, 0)
    assert token.protected
    assert not bench.resolver.stale


def test_the_lock_covers_what_other_threads_read():
    bench = Bench(esp())
    bench.resolver.lock = lock = threading.Lock()
    token = bench.resolve(0x1001)
    with lock:
        thread = threading.Thread(target=lambda: token.sas)
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
    thread.join()
