"""What waits for a verdict: in order, bounded, and never past a refusal."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ipsec_aio.hold import LIMIT, PEER_LIMIT, Hold, Outcome

A, R, L = Outcome.ADMITTED, Outcome.REFUSED, Outcome.LATE


def review(hold, answers, now=0.0):
    return list(hold.review(lambda item: answers.get(item), now))


def held(*items, peer="p", now=0.0, **limits):
    hold = Hold(**limits)
    for item in items:
        assert hold.add(peer, item, 1, now)
    return hold


def test_nothing_waits_at_first():
    hold = Hold()
    assert not hold
    assert "p" not in hold
    assert hold.next_deadline() is None
    assert review(hold, {}) == []


def test_what_is_not_known_waits():
    hold = held(1, 2)
    assert review(hold, {}, 0.99) == []
    assert len(hold) == 2
    assert "p" in hold
    assert hold.next_deadline() == 1.0


def test_what_is_known_waits_behind_what_is_not():
    hold = held(1, 2)
    assert review(hold, {2: True}) == []
    assert review(hold, {2: False}) == []
    assert review(hold, {1: True, 2: True}) == [(1, A), (2, A)]
    assert not hold
    assert "p" not in hold


def test_peers_do_not_wait_for_each_other():
    hold = held(1, 2)
    hold.add("q", 3, 1, 0.5)
    assert review(hold, {3: False}) == [(3, R)]
    assert "q" not in hold


def test_what_is_late_makes_way():
    hold = held(1)
    hold.add("p", 2, 1, 0.5)
    assert hold.next_deadline() == 1.0
    assert review(hold, {2: True}, 1.0) == [(1, L), (2, A)]


def test_an_answer_counts_before_lateness():
    assert review(held(1), {1: True}, 99.0) == [(1, A)]


def test_what_came_after_a_look_at_it_is_judged_at_the_next():
    """A consumer that stops leaves the rest where it is."""
    hold = held(1, 2, 3)
    iterator = hold.review(lambda item: True, 0.0)
    assert next(iterator) == (1, A)
    assert len(hold) == 2
    iterator.close()
    assert review(hold, {2: True, 3: True}) == [(2, A), (3, A)]


def test_what_is_dropped_meanwhile_is_gone():
    hold = held(1, 2)
    hold.add("q", 3, 1, 0.0)
    left = []
    for item, _ in hold.review(lambda item: True, 0.0):
        left.append(item)
        assert hold.clear() == 2
    assert left == [1]
    assert not hold


def test_there_is_no_room_without_end():
    hold = held(*range(PEER_LIMIT))
    assert not hold.add("p", "over", 1, 0.0)
    for number in range(PEER_LIMIT, LIMIT):
        assert hold.add(number, number, 1, 0.0)
    assert not hold.add("q", "over", 1, 0.0)
    assert "q" not in hold
    assert hold.clear() == LIMIT
    assert hold.add("q", 1, 1, 0.0)


def test_bytes_have_their_limit():
    hold = Hold(limit_bytes=10)
    assert hold.add("p", 1, 6, 0.0)
    assert not hold.add("p", 2, 5, 0.0)
    assert hold.add("q", 3, 4, 0.0)
    assert review(hold, {1: True}) == [(1, A)]
    assert hold.add("p", 2, 6, 0.0)


class Holding(RuleBasedStateMachine):
    """Items come, are judged and get late in any order; a model says what must be so."""

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.hold = Hold(2.0, limit=6, limit_bytes=60, peer_limit=3)
        self.answers = {}
        self.came = defaultdict(list)
        self.left = defaultdict(list)
        self.since = {}
        self.size = {}

    @rule(peer=st.sampled_from("abcd"), size=st.integers(0, 30))
    def come(self, peer, size):
        item = (peer, len(self.since))
        waiting = self.waiting()
        took = self.hold.add(peer, item, size, self.now)
        room = (
            len(waiting) < 6
            and sum(self.size[each] for each in waiting) + size <= 60
            and sum(each[0] == peer for each in waiting) < 3
        )
        assert took is room
        self.since[item] = self.now
        self.size[item] = size
        if took:
            self.came[peer].append(item)

    def waiting(self):
        return [i for peer, items in self.came.items() for i in items[len(self.left[peer]) :]]

    @precondition(lambda self: self.waiting())
    @rule(data=st.data(), answer=st.booleans())
    def settle(self, data, answer):
        item = data.draw(st.sampled_from(self.waiting()))
        self.answers.setdefault(item, answer)

    @rule(seconds=st.floats(0, 3))
    def tick(self, seconds):
        self.now += seconds

    @rule(stop=st.integers(1, 20))
    def review(self, stop):
        for item, outcome in self.hold.review(self.answers.get, self.now):
            self.left[item[0]].append(item)
            answer = self.answers.get(item)
            assert outcome is {True: A, False: R, None: L}[answer]
            if answer is None:
                assert self.now >= self.since[item] + 2.0
            stop -= 1
            if not stop:
                return
        for peer, items in self.came.items():
            rest = items[len(self.left[peer]) :]
            # Whoever is first in his queue waits for a reason.
            assert not rest or (
                rest[0] not in self.answers and self.now < self.since[rest[0]] + 2.0
            )

    @rule()
    def drop(self):
        assert self.hold.clear() == len(self.waiting())
        for peer, items in self.came.items():
            self.left[peer] = list(items)

    @invariant()
    def in_order(self):
        for peer, items in self.left.items():
            assert items == self.came[peer][: len(items)]

    @invariant()
    def counted(self):
        waiting = self.waiting()
        assert len(self.hold) == len(waiting) <= 6
        assert {peer for peer in "abcd" if peer in self.hold} == {peer for peer, _ in waiting}
        deadlines = [self.since[item] + 2.0 for item in waiting]
        assert self.hold.next_deadline() == (min(deadlines) if deadlines else None)


TestHolding = Holding.TestCase
