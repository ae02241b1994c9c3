"""Tokens and who is at their ends: late, once, and never somebody else."""

from __future__ import annotations

import pytest
from sas import OTHER, PEER, comp, esp, protect, seen
from test_tokens import Bench as Plain
from test_tokens import drive

from ipsec_aio.enums import Assurance
from ipsec_aio.events import PolicyAdded
from ipsec_aio.identities import UNIDENTIFIED, Awaited, Identities
from ipsec_aio.identity import IToken
from ipsec_aio.mirror import TOMBSTONE_SECONDS
from ipsec_aio.policy import Template
from ipsec_aio.tokens import PENDING_SECONDS

ME, ALICE, BOB = (IToken.named(f"{name}.example.org") for name in ("me", "alice", "bob"))
HERS, HIS = Identities(ME, ALICE), Identities(ME, BOB)


class Bench(Plain):
    """Identities by SPI; those that are not told are awaited."""

    def __init__(self, *sas, **ends) -> None:
        super().__init__(*sas)
        self.ends: dict[int, Identities] = {}
        self.resolver.identified = True
        self.resolver.identify = self.identify

    def identify(self, record, now):
        until = record.added + PENDING_SECONDS
        waits = Awaited(until) if now <= until else UNIDENTIFIED
        return self.ends.get(record.sa.spi, waits)

    def tell(self, **ends) -> None:
        """``x1001=HERS``: by SPI."""
        self.ends.update({int(spi[1:], 16): who for spi, who in ends.items()})
        self.settle()

    def settle(self) -> None:
        self.mirror.bump()
        self.resolver.settle_all()

    def wait(self, seconds) -> None:
        self.now += seconds
        self.mirror.advance(self.now)
        self.settle()


def test_who_is_known_already():
    bench = Bench(esp())
    bench.tell(x1001=HERS)
    token = bench.resolve(0x1001)
    assert (token.local, token.peer, token.pending) == (ME, ALICE, False)
    assert "peer_id=FQDN:'alice.example.org'" in repr(token)
    assert "local_id=FQDN:'me.example.org'" in token.audit_string
    assert drive(token.resolved()) is token


def test_without_anybody_to_tell_nobody_is_awaited():
    token = Plain(esp()).resolve(0x1001)
    assert (token.local, token.peer, token.pending) == (None, None, False)


def test_identities_come_later_and_once():
    bench = Bench(esp())
    token = bench.resolve(0x1001)
    assert token.pending
    assert token.protected, "what the SA does is known"
    assert (token.local, token.peer) == (None, None)
    assert " pending" in repr(token)
    assert bench.resolve(0x1001) is token
    bench.tell(x1001=HERS)
    assert (token.peer, token.pending) == (ALICE, False)
    assert bench.settled == [token]
    assert bench.resolve(0x1001) is token
    bench.tell(x1001=HIS)
    assert token.peer == ALICE
    assert bench.resolve(0x1001).peer == BOB


def test_after_the_deadline_it_goes_without():
    bench = Bench(esp())
    token = bench.resolve(0x1001)
    assert bench.resolver.next_deadline() == bench.now + PENDING_SECONDS
    bench.now += PENDING_SECONDS + 0.1
    assert token.pending is False
    assert token.peer is None
    bench.tell(x1001=HERS)
    assert token.peer is None
    assert bench.resolve(0x1001).peer == ALICE
    assert bench.resolve(0x1001) is not token


def test_what_comes_after_the_deadline_is_not_told_to_those_who_waited():
    bench = Bench(esp())
    token = bench.resolve(0x1001)
    bench.now += PENDING_SECONDS + 0.1
    bench.ends[0x1001] = HERS
    assert token.peer is None


@pytest.mark.parametrize("end", ["close", "resync"])
def test_the_end_of_waiting(end):
    bench = Bench(esp())
    token = bench.resolve(0x1001)
    if end == "close":
        bench.resolver.close()
    else:
        bench.mirror.begin_resync(bench.now)
        bench.mirror.finish_resync(bench.now)
    bench.tell(x1001=HERS)
    assert (token.pending, token.peer, token.protected) == (False, None, True)


def test_a_rekeyed_channel_stays_one():
    bench = Bench(esp())
    bench.tell(x1001=HERS)
    token = bench.resolve(0x1001)
    bench.add(esp(0x1002))
    late = bench.resolve(0x1002)
    assert late is not token
    assert late.pending
    assert [sa.spi for sa in token.sas] == [0x1001], "whose the new one is, is not known yet"
    bench.tell(x1002=HERS)
    assert late.peer == ALICE
    assert drive(late.resolved()) is token
    assert bench.resolve(0x1002) is token
    assert [sa.spi for sa in token.sas] == [0x1001, 0x1002]


def test_sas_that_look_alike_are_told_apart():
    bench = Bench(esp(), esp(0x1002))
    hers, his = bench.resolve(0x1001), bench.resolve(0x1002)
    assert hers is not his
    bench.tell(x1002=HIS)
    assert (hers.peer, his.peer) == (None, BOB)
    bench.tell(x1001=HERS)
    assert (hers.peer, his.peer) == (ALICE, BOB)
    assert not hers.equivalent(his)
    assert [sa.spi for sa in hers.sas] == [0x1001]
    bench.remove(esp())
    assert hers.alive is False
    assert his.alive is True


def test_those_that_wait_for_one_channel_become_it():
    bench = Bench(esp(), esp(0x1002))
    one, other = bench.resolve(0x1001), bench.resolve(0x1002)
    bench.tell(x1001=HERS, x1002=HERS)
    assert one.equivalent(other)
    assert drive(one.resolved()) is drive(other.resolved()) is bench.resolve(0x1002)


def test_unknown_is_only_like_unknown():
    bench = Bench(esp())
    before = bench.resolve(0x1001)
    bench.wait(PENDING_SECONDS + 1)
    bench.tell(x1001=HERS)
    after = bench.resolve(0x1001)
    assert not before.equivalent(after)
    bench.ends.clear()
    assert before.equivalent(bench.resolve(0x1001))


def test_of_several_that_may_have_carried_it_all_must_agree():
    bench = Bench(esp(), comp())
    bench.tell(x1001=HERS)
    assert bench.resolve(0x1001).peer == ALICE
    twins = {50: HERS, 108: HIS}
    bench.resolver.identify = lambda record, now: twins[record.sa.proto]
    assert bench.resolve(0x1001).peer is None
    assert bench.resolve(0x1001).local == ME


def test_a_number_in_use_again_names_nobody_until_the_old_packets_are_gone():
    bench = Bench(esp())
    bench.tell(x1001=HERS)
    hers = bench.resolve(0x1001)
    bench.remove(esp())
    old = next(iter(bench.mirror.graveyard.numbered(0x1001)))
    bench.add(esp(aead=None, authentication=esp().aead))
    bench.resolver.identify = lambda record, now: HERS if record is old else HIS
    assert bench.resolve(0x1001).peer is None
    bench.wait(TOMBSTONE_SECONDS + 1)
    assert bench.resolve(0x1001).peer == BOB
    assert hers.peer == ALICE


def test_an_sa_that_is_missing_first_and_then_without_identities():
    bench = Bench()
    token = bench.resolve(0x1001)
    assert (token.pending, token.protected) == (True, False)
    bench.now += PENDING_SECONDS / 2
    bench.add(esp())
    bench.settle()
    assert (token.pending, token.protected, token.peer) == (True, True, None)
    bench.now += PENDING_SECONDS - 0.1
    bench.tell(x1001=HERS)
    assert (token.pending, token.peer) == (False, ALICE)
    assert bench.resolve(0x1001) is token
    assert bench.settled == [token]


def test_too_many_wait(monkeypatch):
    monkeypatch.setattr("ipsec_aio.tokens.PENDING_LIMIT", 1)
    bench = Bench(esp(), esp(0x1002))
    one, other = bench.resolve(0x1001), bench.resolve(0x1002)
    assert (one.pending, other.pending, other.protected) == (True, False, True)
    bench.tell(x1002=HERS)
    assert other.peer is None
    assert bench.resolve(0x1002).peer == ALICE


# By inference: any SA that the policy is content with may have carried it


def inferred(bench, **fields):
    return bench.resolver.resolve(seen(generation=0, mark=None, **fields))


def test_a_policy_names_the_peer_where_all_that_it_admits_are_the_same():
    bench = Bench(esp(reqid=1), esp(0x1002, reqid=1), esp(0x1003, OTHER, reqid=2))
    bench.mirror.apply(PolicyAdded(protect(Template(reqid=1))), bench.now)
    bench.tell(x1001=HERS, x1002=HERS, x1003=HIS)
    bench.now += 2
    token = inferred(bench)
    assert (token.assurance, token.peer) == (Assurance.POLICY, ALICE)
    bench.tell(x1002=HIS)
    assert inferred(bench).peer is None


def test_a_policy_names_nobody_where_another_may_send_under_that_address():
    bench = Bench(esp(), esp(0x1002, OTHER))
    bench.mirror.apply(PolicyAdded(protect(Template())), bench.now)
    bench.tell(x1001=HERS, x1002=HIS)
    bench.now += 2
    assert inferred(bench).peer is None


def test_a_policy_names_nobody_under_a_template_without_sas():
    bench = Bench(esp())
    bench.mirror.apply(PolicyAdded(protect(Template(), Template(proto=51))), bench.now)
    bench.tell(x1001=HERS)
    bench.now += 2
    token = inferred(bench)
    assert (token.assurance, token.peer, token.pending) == (Assurance.POLICY, None, False)


def test_a_removed_sa_may_have_carried_what_was_queued():
    bench = Bench(esp(), esp(0x1002))
    bench.mirror.apply(PolicyAdded(protect(Template())), bench.now)
    bench.tell(x1001=HERS, x1002=HIS)
    bench.remove(esp())
    bench.now += 2
    bench.mirror.advance(bench.now)
    assert inferred(bench, peer=PEER).peer is None
    bench.wait(TOMBSTONE_SECONDS)
    assert inferred(bench).peer == BOB
