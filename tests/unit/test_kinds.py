"""One object for a channel as long as somebody holds it; what is left of others is removed."""

from __future__ import annotations

import gc
import sys
import weakref
from linecache import getline

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from sas import esp, seen, tunnel

from ipsec_aio.events import SAAdded
from ipsec_aio.flow import Selector
from ipsec_aio.kinds import Kind
from ipsec_aio.mirror import Mirror
from ipsec_aio.tokens import PToken, Resolver

HOSTS = st.integers(1, 6)
LOCALS = st.integers(1, 3)


def resolver(*sas) -> Resolver:
    mirror = Mirror()
    mirror.begin_resync(0)
    mirror.finish_resync(0)
    for sa in sas:
        mirror.apply(SAAdded(sa), 0)
    made = Resolver(mirror, lambda: 0.0)
    made.generation = 1
    return made


def token_of(asked: Resolver, host: int, local: int = 1, spi: int = 0) -> PToken:
    addresses = {"peer": host.to_bytes(4, "big"), "local": local.to_bytes(4, "big")}
    return asked.resolve(seen(spi, **addresses))


def left(asked: Resolver) -> int:
    """How many kinds there are, and references in them."""
    each = [kind._tokens for kind in asked._kinds.values()]
    return len(each) + sum(1 if isinstance(t, weakref.ref) else len(t or ()) for t in each)


class Channels(RuleBasedStateMachine):
    """Some hold tokens, and let go of them; others pass by."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = resolver()
        self.held: dict[tuple[int, int], PToken] = {}
        self.passed = 1 << 16

    @rule(host=HOSTS, local=LOCALS)
    def hold(self, host, local):
        token = token_of(self.asked, host, local)
        assert self.held.setdefault((host, local), token) is token

    @rule(host=HOSTS, local=LOCALS)
    def let_go(self, host, local):
        token = self.held.pop((host, local), None)
        if token is not None:
            reference = weakref.ref(token)
            del token
            assert reference() is None

    @rule(count=st.integers(1, 9), local=st.integers(1, 30))
    def pass_by(self, count, local):
        for _ in range(count):
            self.passed += 1
            token_of(self.asked, self.passed, local)

    @invariant()
    def what_is_held_is_the_only_one(self):
        for (host, local), token in self.held.items():
            assert token_of(self.asked, host, local) is token

    @invariant()
    def nothing_is_kept_of_what_nobody_holds(self):
        # Of one that was alone with its kind, the reference goes with that.
        locals_ = {local for _, local in self.held}
        assert len(self.held) <= left(self.asked) - len(locals_) <= len(self.held) + 1


TestChannels = Channels.TestCase
TestChannels.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)


def test_what_peers_of_one_tunnel_have_in_common_is_kept_once():
    asked = resolver(tunnel(selector=Selector(family=2)))
    tokens = [token_of(asked, host, spi=0x1001) for host in range(1, 4)]
    assert len({*tokens}) == 3
    assert len({token._kind for token in tokens}) == 1
    assert len({token.audit_string for token in tokens}) == 3


def test_what_differs_in_anything_but_the_peer_is_of_another_kind():
    asked = resolver(esp(), tunnel(spi=0x1002, selector=Selector(family=2)))
    tokens = [
        token_of(asked, 1),
        token_of(asked, 1, local=2),
        token_of(asked, 1, spi=0x1002),
        asked.resolve(seen(0x1001)),
        asked.resolve(seen(generation=2)),
    ]
    assert len({token._kind for token in tokens}) == len(tokens)


@pytest.mark.parametrize("locals_", [1, 100])
def test_spoofed_sources_leave_nothing_behind(locals_):
    asked = resolver()
    held = [token_of(asked, host, host % locals_) for host in range(1, 1000)]
    for host in range(1000, 3000):
        token_of(asked, host, host % locals_)
    assert left(asked) == len(held) + locals_
    assert [token_of(asked, host, host % locals_) for host in range(1, 1000)] == held
    del held[:]
    gc.collect()
    assert left(asked) == 0


class Session:
    """Something in a cycle, whose end asks for tokens."""

    def __init__(
        self, asked: Resolver, host: int, found: dict[int, PToken], ended: set[int]
    ) -> None:
        self.me = self
        self.asked, self.host, self.found, self.ended = asked, host, found, ended

    def __del__(self) -> None:
        for host in (self.host, self.host + 1):
            token = token_of(self.asked, host)
            assert self.found.setdefault(host, token) is token
        self.ended.add(self.host)


def test_what_the_garbage_collector_ends_may_ask_for_tokens():
    asked = resolver()
    found: dict[int, PToken] = {}
    ended: set[int] = set()
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for host in range(1, 300):
            Session(asked, host, found, ended)
            token = token_of(asked, host)
            assert found.setdefault(host, token) is token
            if host % 100 == 0:
                found.clear()
    finally:
        gc.set_threshold(*before)
        # Those that are left: later, they would end with the resolver, whose references go first.
        gc.collect()
    assert len(ended) == 299


@pytest.mark.parametrize("asked_for", [[99], [98], [98, 97]], ids=["itself", "another", "others"])
@pytest.mark.parametrize("others", [0, 1, 2])
def test_what_is_kept_meanwhile_is_not_lost(others, asked_for):
    """By whatever comes between two lines of code: another's end, or a signal's handler.

    Neither comes before an assignment that calls nothing.
    """
    lines = 0
    moment = 0
    while lines >= moment:
        moment += 1
        lines = 0
        asked = resolver()
        held = [token_of(asked, 1 + host) for host in range(others)]

        def trace(frame, event, _, asked=asked, held=held, moment=moment):
            nonlocal lines
            if frame.f_code is not Kind.keep.__code__:
                return None
            if event != "line" or "self._tokens = " in getline(
                frame.f_code.co_filename, frame.f_lineno
            ):
                return trace
            lines += 1
            if lines == moment:
                held.extend(token_of(asked, host) for host in asked_for)
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            held.append(token_of(asked, 99))
        finally:
            sys.settrace(before)
        for each in held:
            assert asked.resolve(seen(peer=each._ends[0], local=each._ends[1])) is each
    assert moment > 3


def test_the_text_of_an_address_is_the_tokens_peer():
    token = token_of(resolver(), 0x0A000001)
    assert token._peer == "10.0.0.1"
    assert token._ends == (bytes([10, 0, 0, 1]), bytes([0, 0, 0, 1]))
