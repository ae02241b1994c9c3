"""Whose SA an SA is: charon's word, the moment it was said, and SPIs that are used again."""

from __future__ import annotations

import pytest
from sas import ah, comp, esp
from test_ike import LOCAL, MOVED, PEER, child, ike, sa, synced, up

from ipsec_aio.enums import Direction
from ipsec_aio.events import SAAdded, SADeleted, SAMapped
from ipsec_aio.flow import Mark
from ipsec_aio.identities import UNIDENTIFIED, Awaited, Identities
from ipsec_aio.identity import IToken
from ipsec_aio.join import LISTED_SECONDS, Join
from ipsec_aio.mirror import TOMBSTONE_SECONDS, Mirror
from ipsec_aio.tokens import PENDING_SECONDS

ALICE, BOB = (Identities(None, IToken.named(f"peer{n}")) for n in (1, 2))
SPI = 0x1001


def of(spi=SPI, source=PEER, destination=LOCAL, **fields):
    return esp(spi, source, destination, **fields)


class Bench:
    """A kernel's SAs and a charon's word on them, at a time."""

    def __init__(self, *listed) -> None:
        self.now = 100.0
        self.table = synced(*listed)
        self.mirror = Mirror()
        self.mirror.begin_resync(0)
        self.mirror.finish_resync(0)
        self.pending: set[str] = set()
        self.join = Join(self.mirror, self.table, self.ends)

    def ends(self, sa):
        name = sa.peer_id
        return None if name in self.pending else Identities(None, IToken.named(name))

    def add(self, sa):
        self.now += 0.01
        self.mirror.apply(SAAdded(sa), self.now)
        return self.mirror.sad.get(sa.key)

    def remove(self, sa) -> None:
        self.now += 0.01
        self.mirror.apply(SADeleted(sa.key), self.now)

    def say(self, name, message):
        self.now += 0.01
        return self.table.apply(name, message, self.now)

    def refresh(self, message) -> None:
        self.now += 0.01
        self.table.refresh(message, self.now)

    def list_again(self, *listed) -> None:
        self.now += 0.01
        self.table.begin_resync(self.now)
        for message in listed:
            self.table.load(message)
        self.table.finish_resync(self.now)

    def ask(self, record, direction=Direction.IN):
        return self.join.identities_of(record, self.now, direction)

    def whose(self, record):
        """Of an SA that leads out."""
        return self.ask(record, Direction.OUT)


def test_charon_reports_what_it_installed():
    bench = Bench()
    record = bench.add(of())
    assert bench.ask(record) == Awaited(record.added + PENDING_SECONDS)
    bench.say("child-updown", up(ike(1), child(1)))
    assert bench.ask(record) == ALICE


def test_who_it_is_may_take_a_moment_more():
    bench = Bench()
    bench.pending.add("peer1")
    record = bench.add(of())
    bench.say("child-updown", up(ike(1), child(1)))
    assert bench.ask(record) == Awaited(record.added + PENDING_SECONDS)
    bench.now += PENDING_SECONDS
    assert bench.ask(record) == UNIDENTIFIED
    bench.pending.clear()
    assert bench.ask(record) == ALICE


def test_nobody_is_waited_for_long():
    bench = Bench()
    record = bench.add(of())
    bench.now += PENDING_SECONDS + 0.1
    assert bench.ask(record) == UNIDENTIFIED
    bench.say("child-updown", up(ike(1), child(1)))
    assert bench.ask(record) == ALICE


@pytest.mark.parametrize(
    "sa",
    [
        comp(SPI, PEER, LOCAL),
        of(direction=Direction.OUT),
    ],
)
def test_what_vouches_for_nobody_is_not_waited_for(sa):
    assert Bench().ask(Bench().add(sa)) == UNIDENTIFIED


@pytest.mark.parametrize(
    "sa",
    [ah(SPI, PEER, LOCAL), of(destination=MOVED), of(SPI + 7), of(0x2001)],
    ids=["protocol", "destination", "number", "the other way"],
)
def test_an_sa_of_another_name_is_another(sa):
    bench = Bench()
    record = bench.add(sa)
    bench.say("child-updown", up(ike(1), child(1)))
    assert bench.ask(record) == Awaited(record.added + PENDING_SECONDS)


def test_what_was_said_before_an_sa_came_is_of_another():
    bench = Bench(sa(ike(1), child(1)))
    record = bench.add(of())
    assert isinstance(bench.ask(record), Awaited)
    assert bench.join.of_number(record.sa) == (1,)
    bench.list_again(sa(ike(2), child(2, spi=SPI)))
    assert bench.ask(record) == BOB


def test_a_listing_counts_from_its_beginning():
    bench = Bench()
    bench.table.begin_resync(bench.now)
    record = bench.add(of())
    bench.table.load(sa(ike(1), child(1)))
    bench.now += 1
    bench.table.finish_resync(bench.now)
    assert isinstance(bench.ask(record), Awaited)


def test_a_rekeyed_child_and_its_successor():
    bench = Bench()
    old = bench.add(of())
    bench.say("child-updown", up(ike(1), child(1)))
    new = bench.add(of(SPI + 1))
    section = {"old": child(1, "REKEYED"), "new": child(2)}
    bench.say("child-rekey", {"conn": ike(1) | {"child-sas": {"net": section}}})
    assert bench.ask(old) == bench.ask(new) == ALICE
    bench.now += bench.table.linger + 1
    bench.table.advance(bench.now)
    assert bench.ask(old) == ALICE, "it is known"


def test_what_is_known_stays_whatever_becomes_of_charon():
    bench = Bench()
    record = bench.add(of())
    bench.say("child-updown", up(ike(1), child(1)))
    assert bench.ask(record) == ALICE
    bench.list_again()
    bench.now += 100
    bench.table.advance(bench.now)
    assert bench.ask(record) == ALICE
    bench.remove(record.sa)
    assert bench.ask(record) == ALICE


def test_the_newest_word_counts():
    bench = Bench()
    record = bench.add(of())
    bench.say("child-updown", up(ike(1), child(1)))
    assert bench.ask(record) == ALICE
    bench.say("child-updown", up(ike(1, remote_id=b"peer2"), child(1)))
    assert bench.ask(record) == BOB


def test_a_number_that_is_used_again():
    bench = Bench()
    hers = bench.add(of())
    bench.say("child-updown", up(ike(1), child(1)))
    # Nobody asked for hers before it was gone.
    bench.remove(hers.sa)
    his = bench.add(of())
    assert bench.ask(hers) == Awaited(hers.added + PENDING_SECONDS)
    assert isinstance(bench.ask(his), Awaited), "what was said was of hers"
    bench.say("child-updown", up(ike(2), child(2, spi=SPI)))
    assert isinstance(bench.ask(his), Awaited), "and this may be old news, too"
    assert bench.join.doubtful == {2}
    bench.join.doubtful.clear()
    assert isinstance(bench.ask(his), Awaited)
    assert not bench.join.doubtful, "it is asked about once"
    bench.refresh(sa(ike(2), child(2, spi=SPI)))
    assert bench.ask(his) == BOB
    bench.now += PENDING_SECONDS
    assert bench.ask(hers) == UNIDENTIFIED, "nobody can tell any more"


def test_a_removed_sa_may_be_named_while_its_number_is_nobody_else_s():
    bench = Bench()
    record = bench.add(of())
    bench.remove(record.sa)
    bench.say("child-updown", up(ike(1), child(1)))
    assert bench.ask(record) == ALICE


def test_sas_of_one_number_are_told_apart_by_mark_and_interface():
    bench = Bench()
    plain, marked, bound = (
        bench.add(of()),
        bench.add(of(mark=Mark(5, 0xFFFFFFFF))),
        bench.add(of(if_id=9)),
    )
    bench.say("ike-updown", up(ike(1)))
    bench.say("ike-updown", up(ike(2)))
    bench.refresh(sa(ike(1), child(1) | {"mark-in": b"00000005"}))
    assert bench.ask(marked) == ALICE
    assert isinstance(bench.ask(plain), Awaited)
    assert isinstance(bench.ask(bound), Awaited)
    bench.refresh(sa(ike(2), child(2, spi=SPI) | {"if-id-in": b"00000009"}))
    assert (bench.ask(marked), bench.ask(bound)) == (ALICE, BOB)
    bench.now += PENDING_SECONDS
    assert bench.ask(plain) == UNIDENTIFIED


@pytest.mark.parametrize("other", [of(source=MOVED), of(mode=1)])
def test_an_sa_that_somebody_put_in_the_place_of_charon_s(other):
    bench = Bench()
    hers = bench.add(of())
    bench.say("child-updown", up(ike(1), child(1)))
    assert bench.ask(hers) == ALICE
    bench.remove(hers.sa)
    record = bench.add(other)
    bench.refresh(sa(ike(1), child(1)))
    bench.now += PENDING_SECONDS
    bench.list_again(sa(ike(1), child(1)))
    assert bench.ask(record) == UNIDENTIFIED
    assert not bench.join.keyed_by_hand(record)


def test_charon_that_contradicts_itself_names_nobody():
    bench = Bench()
    record = bench.add(of())
    bench.say("child-updown", up(ike(1), child(1)))
    bench.say("child-updown", up(ike(2), child(2, spi=SPI)))
    assert bench.ask(record) == UNIDENTIFIED


def test_a_mark_that_charon_does_not_put_on_the_sa_is_no_hindrance():
    bench = Bench()
    record = bench.add(of())
    bench.say("child-updown", up(ike(1), child(1) | {"mark-in": b"00000005"}))
    assert bench.ask(record) == ALICE


def test_a_new_address_makes_it_another_until_charon_says_so_again():
    bench = Bench()
    record = bench.add(of())
    bench.say("child-updown", up(ike(1), child(1)))
    assert bench.ask(record) == ALICE
    bench.now += 1
    bench.mirror.apply(SAMapped(record.sa.key, 0, PEER, MOVED, 4500, 4501), bench.now)
    (moved,) = bench.mirror.sad.numbered(SPI)
    assert isinstance(bench.ask(moved), Awaited)
    bench.refresh(sa(ike(1, remote_host=b"192.0.2.3"), child(1)))
    assert (bench.ask(moved), bench.ask(record)) == (ALICE, ALICE)


# What charon does not list


LISTED = sa(ike(1), child(1, reqid=7)), sa(ike(2), child(2, reqid=8))


@pytest.fixture
def reqids():
    bench = Bench()
    for number, message in enumerate(LISTED, 1):
        bench.say("ike-updown", up(ike(number)))
        bench.say("child-updown", {"up": b"yes"} | message)
    record = bench.add(of(0x9999, reqid=7))
    return bench, record


def test_a_reqid_names_nobody_who_came_after_the_sa():
    for listed in ((), LISTED):
        bench = Bench(*listed)
        record = bench.add(of(0x9999, reqid=7))
        if not listed:
            bench.say("ike-updown", up(ike(1)))
        bench.now += LISTED_SECONDS
        bench.list_again(*LISTED)
        assert bench.ask(record) == UNIDENTIFIED


def test_what_charon_does_not_list_after_a_while_is_not_waited_for(reqids):
    bench, _ = reqids
    record = bench.add(of(0x9998))
    assert isinstance(bench.ask(record), Awaited)
    assert bench.join.wants_listing()
    bench.list_again(*LISTED)
    assert isinstance(bench.ask(record), Awaited), "it may be about to"
    assert not bench.join.keyed_by_hand(record)
    bench.now += LISTED_SECONDS
    bench.list_again(*LISTED)
    assert not bench.join.wants_listing()
    assert bench.ask(record) == UNIDENTIFIED
    assert bench.join.keyed_by_hand(record)
    assert not bench.join.unlisted


def test_a_reqid_names_a_peer_if_it_is_his_alone(reqids):
    bench, record = reqids
    assert isinstance(bench.ask(record), Awaited)
    bench.now += LISTED_SECONDS
    assert isinstance(bench.ask(record), Awaited)
    bench.list_again(*LISTED)
    assert bench.ask(record) == ALICE
    assert not bench.join.keyed_by_hand(record)
    bench.say("child-updown", up(ike(2), child(3, reqid=7)))
    assert bench.ask(record) == UNIDENTIFIED, "not any more"


@pytest.mark.parametrize(
    "other",
    [
        of(0x9999),
        of(0x9999, reqid=9),
        of(0x9999, MOVED, reqid=7),
        of(0x9999, destination=MOVED, reqid=7),
        of(0x9999, reqid=7, if_id=3),
        of(0x9999, reqid=7, mode=1),
        ah(0x9999, PEER, LOCAL, reqid=7),
        of(0x1002, reqid=7),
    ],
)
def test_a_reqid_names_nobody_otherwise(reqids, other):
    bench, _ = reqids
    record = bench.add(other)
    bench.now += PENDING_SECONDS + 0.1
    assert bench.ask(record) == UNIDENTIFIED
    bench.list_again(*LISTED)
    expected = BOB if other.spi == 0x1002 else UNIDENTIFIED
    assert bench.ask(record) == expected


def test_what_charon_lacks_means_nothing_while_it_is_away_nor_for_what_is_gone(reqids):
    bench, record = reqids
    bench.now += PENDING_SECONDS + 0.1
    bench.list_again(*LISTED)
    bench.table.begin_resync(bench.now)
    assert bench.ask(record) == UNIDENTIFIED
    assert not bench.join.keyed_by_hand(record)
    bench.list_again(*LISTED)
    assert bench.ask(record) == ALICE
    bench.remove(record.sa)
    assert bench.ask(record) == UNIDENTIFIED
    assert not bench.join.keyed_by_hand(record)


def test_a_reqid_whose_children_are_gone_names_nobody(reqids):
    bench, record = reqids
    bench.now += LISTED_SECONDS
    bench.list_again(*LISTED)
    bench.say("child-updown", sa(ike(1), child(1, reqid=7)))
    assert bench.ask(record) == UNIDENTIFIED


def test_tombstones_outlive_no_word_of_charon():
    assert synced().linger > TOMBSTONE_SECONDS


def test_what_is_doubted_is_remembered_within_bounds(monkeypatch):
    monkeypatch.setattr("ipsec_aio.join._REMEMBERED", 1)
    bench = Bench()
    for spi in (SPI, SPI + 1):
        bench.remove(bench.add(of(spi)).sa)
        bench.add(of(spi))
    for number in (1, 2):
        bench.say("child-updown", up(ike(number), child(number)))
    for spi in (SPI, SPI + 1):
        bench.ask(bench.mirror.sad.get(of(spi).key))
    assert bench.join.doubtful == {1, 2}
    assert len(bench.join._doubted) == 1


# What leads out


def back(spi=0x2001, source=LOCAL, destination=PEER, **fields):
    """The SA of the other direction: child 1 has this number outwards."""
    return esp(spi, source, destination, **fields)


@pytest.mark.parametrize("direction", [None, Direction.OUT])
def test_the_sa_that_leads_back_is_the_same_peer_s(direction):
    bench = Bench()
    record = bench.add(back(direction=direction))
    assert bench.whose(record) == Awaited(record.added + PENDING_SECONDS)
    bench.say("child-updown", up(ike(1), child(1)))
    assert bench.whose(record) == ALICE
    bench.list_again()
    bench.now += 100
    assert bench.whose(record) == ALICE, "what is known stays"


def test_an_sa_is_asked_for_in_one_direction():
    bench = Bench()
    into, out = bench.add(of(direction=Direction.IN)), bench.add(back(direction=Direction.OUT))
    bench.say("child-updown", up(ike(1), child(1)))
    assert bench.whose(into) == bench.ask(out) == UNIDENTIFIED
    assert (bench.ask(into), bench.whose(out)) == (ALICE, ALICE)


def test_who_is_at_the_far_end_of_what_leads_out_sent_nothing_by_it():
    """Kernels before 6.10 do not tell the direction."""
    bench = Bench()
    record = bench.add(back())
    bench.say("child-updown", up(ike(1), child(1)))
    assert bench.whose(record) == ALICE
    bench.now += PENDING_SECONDS + 0.1
    assert bench.ask(record) == UNIDENTIFIED


@pytest.mark.parametrize(
    "other",
    [
        back(0x1001),
        back(0x2002),
        back(source=MOVED),
        back(destination=MOVED),
        ah(0x2001, LOCAL, PEER),
        back(mode=1),
        back(mark=Mark(5, 0xFF)),
        back(if_id=9),
        back(0x9999, reqid=1),
    ],
)
def test_no_other_sa_is(other):
    bench = Bench()
    bench.say("ike-updown", up(ike(1)))
    record = bench.add(other)
    bench.say("child-updown", up(ike(1), child(1)))
    assert isinstance(bench.whose(record), Awaited)
    bench.now += PENDING_SECONDS + 0.1
    bench.list_again(sa(ike(1), child(1)))
    assert bench.whose(record) == UNIDENTIFIED


def test_two_peers_behind_one_address_with_equal_selectors():
    bench = Bench()
    hers, his = bench.add(back()), bench.add(back(0x2002))
    bench.say("child-updown", up(ike(1), child(1)))
    bench.say("child-updown", up(ike(2), child(2)))
    assert (bench.whose(hers), bench.whose(his)) == (ALICE, BOB)


def test_marks_tell_them_apart_where_their_numbers_are_equal():
    bench = Bench()
    hers, his = bench.add(back(mark=Mark(5, 0xFF))), bench.add(back(if_id=9))
    bench.say("ike-updown", up(ike(1)))
    bench.say("ike-updown", up(ike(2)))
    marked = child(1) | {"mark-out": b"5", "mark-mask-out": b"ff", "mark-in": b"6"}
    bench.refresh(sa(ike(1), marked))
    assert isinstance(bench.whose(his), Awaited)
    bound = child(2) | {"spi-out": b"00002001", "if-id-out": b"9", "if-id-in": b"8"}
    bench.refresh(sa(ike(2), bound))
    assert (bench.whose(hers), bench.whose(his)) == (ALICE, BOB)


def rekeyed(bench):
    """Child 2 in the place of child 1."""
    section = {"old": child(1, "REKEYED"), "new": child(2)}
    bench.say("child-rekey", {"conn": ike(1) | {"child-sas": {"net": section}}})


def test_the_successor_of_a_rekeyed_child():
    bench = Bench()
    old = bench.add(back())
    bench.say("child-updown", up(ike(1), child(1)))
    assert bench.whose(old) == ALICE
    new = bench.add(back(0x2002))
    rekeyed(bench)
    assert bench.whose(old) == bench.whose(new) == ALICE


def test_an_sa_that_charon_installs_after_it_told():
    """So it does where the peer had the child rekeyed."""
    bench = Bench()
    bench.add(back())
    bench.say("child-updown", up(ike(1), child(1)))
    rekeyed(bench)
    new = bench.add(back(0x2002))
    assert isinstance(bench.whose(new), Awaited), "what was said may be of another"
    assert bench.join.of_number(new.sa) == (1,)
    bench.refresh(sa(ike(1), child(1, "DELETED"), child(2)))
    assert bench.whose(new) == ALICE


def test_the_number_of_a_rekeyed_child_may_be_another_peer_s():
    """charon lists it for a while longer than its SA outwards is there."""
    bench = Bench()
    old = bench.add(back())
    bench.say("child-updown", up(ike(1), child(1)))
    bench.add(back(0x2002))
    rekeyed(bench)
    bench.remove(old.sa)
    his = bench.add(back())
    bench.refresh(sa(ike(1), child(1, "DELETED"), child(2)))
    assert isinstance(bench.whose(his), Awaited)
    told = child(3) | {"spi-out": b"00002001"}
    bench.say("child-updown", up(ike(2), told))
    assert isinstance(bench.whose(his), Awaited), "an event may be old news"
    assert bench.join.doubtful == {2}
    bench.refresh(sa(ike(2), told))
    assert bench.whose(his) == BOB


def test_a_peer_that_moved_is_found_where_charon_says_that_it_is():
    bench = Bench()
    old = bench.add(back())
    bench.say("child-updown", up(ike(1), child(1)))
    assert bench.whose(old) == ALICE
    bench.remove(old.sa)
    moved = bench.add(back(destination=MOVED))
    assert isinstance(bench.whose(moved), Awaited)
    bench.refresh(sa(ike(1, remote_host=b"192.0.2.3"), child(1)))
    assert bench.whose(moved) == ALICE
    # This end moves.
    bench.remove(moved.sa)
    moved = bench.add(back(source=PEER, destination=MOVED))
    assert bench.join.of_number(moved.sa) == (1,)
    assert isinstance(bench.whose(moved), Awaited)
    bench.refresh(sa(ike(1, remote_host=b"192.0.2.3", local_host=b"192.0.2.1"), child(1)))
    assert bench.whose(moved) == ALICE


def test_between_two_addresses_of_this_host_an_sa_leads_both_ways():
    bench = Bench()
    record = bench.add(back())
    mine = ike(1), child(1)
    theirs = (
        ike(2, local_host=b"192.0.2.1", remote_host=b"192.0.2.2"),
        child(2, spi=0x2001),
    )
    bench.say("child-updown", up(*mine))
    assert bench.whose(record) == ALICE
    assert isinstance(bench.ask(record), Awaited)
    bench.say("child-updown", up(*theirs))
    assert (bench.whose(record), bench.ask(record)) == (ALICE, BOB)
    bench.list_again()
    bench.table.advance(bench.now + 100)
    assert bench.ask(record) == BOB
    assert isinstance(bench.whose(record), Awaited), "what it was asked for last is known"


def test_what_charon_tells_of_by_itself_needs_no_listing():
    bench = Bench()
    both = bench.add(of()), bench.add(back())
    for record, direction in zip(both, (Direction.IN, Direction.OUT), strict=True):
        assert isinstance(bench.ask(record, direction), Awaited)
    assert set(bench.join.unlisted) == {*both}
    bench.say("child-updown", up(ike(1), child(1)))
    assert not bench.join.wants_listing()
    assert not bench.join.unlisted
    gone, foreign = bench.add(back(0x9998)), bench.add(back(0x9999))
    bench.whose(gone)
    bench.remove(gone.sa)
    assert not bench.join.wants_listing()
    bench.whose(foreign)
    assert bench.join.wants_listing()


def test_what_is_not_listed_is_remembered_within_bounds(monkeypatch):
    monkeypatch.setattr("ipsec_aio.join._REMEMBERED", 1)
    bench = Bench()
    known, foreign = bench.add(of()), bench.add(back(0x9999))
    bench.ask(known)
    bench.whose(foreign)
    assert len(bench.join.unlisted) == 1
    bench.say("child-updown", up(ike(1), child(1)))
    assert bench.join.wants_listing(), "there may be more"
