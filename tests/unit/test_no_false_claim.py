"""The whole engine against a kernel that is played: no token may claim what its packets lack.

Packets wait in a socket's queue, the event of a new SA may come after its first packets, events are
lost, numbers are used again; stamps, policies, and interfaces that hide security paths come and go.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from sas import CBC, OTHER, PEER, ah, comp, esp, null, protect, seen, tunnel

from ipsec_aio.enums import Assurance, Mode, PolicyAction
from ipsec_aio.events import (
    PoliciesFlushed,
    PolicyAdded,
    PolicyDeleted,
    SAAdded,
    SADeleted,
    SAsFlushed,
)
from ipsec_aio.flow import Mark, Selector
from ipsec_aio.mirror import TOMBSTONE_SECONDS, Mirror
from ipsec_aio.policy import Policy, Template
from ipsec_aio.protection import PROTECTING
from ipsec_aio.sa import SA
from ipsec_aio.tokens import Resolver

KINDS = [esp, null, ah, comp, lambda spi: tunnel(spi), lambda spi: esp(spi, encryption=CBC)]
SPIS = range(1, 4)
RARELY = [False] * 7 + [True]
PICKS = range(8)
BOTH = (False, True)


def move(**choices):
    """Make a method a rule, with choices for its arguments, that histories can be made of, too."""

    def decorate(method):
        made = rule(**{name: st.sampled_from(each) for name, each in choices.items()})(method)
        made.choices = choices
        return made

    return decorate


class Kernel(RuleBasedStateMachine):
    """SAs and interfaces, and one socket."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.kernel: dict = {}
        self.policies: dict = {}
        self.opaque = False
        self.went = False
        self.events: list = []
        # Evidence, SA and time of what waits.
        self.socket: list = []
        self.emptied = 0
        self.told: list = []
        self.generation = 1
        self.answers = True
        self.mirror = Mirror()
        self.resolver = Resolver(self.mirror, lambda: self.now, trust_policy=True)
        self.resolver.generation = 1
        self.resolver.lookup_missing = self.lookup
        self.resync()
        # Its socket is made after the tables were read.
        self.see()

    def lookup(self, key) -> bool:
        if self.answers:
            if key in self.kernel:
                self.mirror.apply(SAAdded(self.kernel[key]), self.now)
            self.drain()
        return self.answers

    def drain(self, late: int = 0) -> None:
        count = len(self.events) - late
        for event in self.events[:count]:
            self.mirror.apply(event, self.now)
        del self.events[:count]
        self.mirror.advance(self.now)
        self.look_at_links()
        self.resolver.settle_all()

    def look_at_links(self) -> None:
        self.resolver.opaque_interfaces = self.opaque
        if self.went:
            self.went = False
            self.resolver.links_until = self.mirror.count_change()
        self.mirror.bump()

    def resync(self) -> None:
        self.events.clear()
        self.mirror.begin_resync(self.now)
        for sa in reversed(self.kernel.values()):
            self.mirror.load(SAAdded(sa), self.now)
        for policy in reversed(self.policies.values()):
            self.mirror.load(PolicyAdded(policy), self.now)
        self.mirror.finish_resync(self.now)
        self.resolver.links_until = self.mirror.changes
        self.look_at_links()
        self.resolver.settle_all()

    def put(self, sa) -> None:
        # The kernel takes an SA only where its key is free.
        if self.kernel.pop(sa.key, None):
            self.events.append(SADeleted(sa.key))
        self.kernel[sa.key] = sa
        self.events.append(SAAdded(sa))

    @move(kind=KINDS, spi=SPIS)
    def add(self, kind, spi):
        self.put(kind(spi))

    @move(pick=PICKS)
    def delete(self, pick):
        if self.kernel:
            key = [*self.kernel][pick % len(self.kernel)]
            del self.kernel[key]
            self.events.append(SADeleted(key))

    @move(rarely=RARELY)
    def interface(self, rarely):
        """An xfrm interface comes or goes."""
        self.went = self.went or self.opaque
        self.opaque = rarely and not self.opaque

    def sends(self, pick: int, hidden: bool) -> tuple[SA | None, SA | None]:
        """Return the SA of a packet, and what is to be seen of it."""
        sas = [None, *self.kernel.values()]
        sa = sas[pick % len(sas)]
        # Through an xfrm interface it comes without a trace of its SA.
        return sa, None if hidden and self.opaque else sa

    @move(count=range(1, 4), late=BOTH, answers=BOTH)
    def receive(self, count, late, answers):
        for _ in range(min(count, len(self.socket))):
            self.receive_one(late=late, answers=answers)

    def receive_one(self, *, late: bool = False, answers: bool = True) -> None:
        evidence, sa, _ = self.socket.pop(0)
        last = self.events[-1] if self.events else None
        # The one event that may come after a packet is that of the packet's own, new SA; and no
        # two SAs that live at once share a number by accident within that moment.
        own = isinstance(last, SAAdded) and last.sa == sa
        alone = sum(other.spi == evidence.spi for other in self.kernel.values()) == 1
        self.drain(late=int(late and own and alone))
        self.answers = answers
        evidence = replace(evidence, after=self.emptied)
        self.told.append((self.resolver.resolve(evidence), sa))
        self.answers = True
        self.see()

    def see(self) -> None:
        if not self.socket:
            self.emptied = self.mirror.changes

    @move()
    def receive_all(self):
        """The loop takes in the news and all that waits, which may be nothing."""
        while self.socket:
            self.receive_one()
        self.drain()
        self.see()

    @move(seconds=[0.5, 3.0, 11.0])
    def wait(self, seconds):
        self.receive_all()
        self.now += seconds
        self.drain()

    @move(seconds=[0.5, 1.5, 4.0], drains=BOTH)
    def be_busy(self, seconds, drains):
        """Time passes while datagrams wait, but not so long that their SAs are forgotten."""
        oldest = self.socket[0][2] if self.socket else self.now
        if self.now + seconds - oldest < TOMBSTONE_SECONDS:
            self.now += seconds
            if drains:
                self.drain()

    @invariant()
    def every_claim_is_true(self):
        for token, sa in self.told:
            if token.privacy_protected:
                assert sa
                assert sa.encrypts
            if token.integrity_protected or token.protected:
                assert sa
                assert sa.authenticates
            if token.assurance is Assurance.NONE:
                assert sa is None or sa.proto not in PROTECTING, "called clear"
            if token.tunnel_mode is not None and sa:
                assert token.tunnel_mode == bool(sa.mode)


class Traffic(Kernel):
    """By the stamp."""

    @move(pick=PICKS, spi=SPIS)
    def rekey(self, pick, spi):
        if self.kernel:
            self.put(replace([*self.kernel.values()][pick % len(self.kernel)], spi=spi))

    @move()
    def flush(self):
        self.kernel.clear()
        self.events.append(SAsFlushed(0))

    @move(pick=PICKS, hidden=BOTH)
    def send(self, pick, hidden):
        sa, shown = self.sends(pick, hidden)
        evidence = seen(shown.spi if shown else 0, generation=self.generation)
        self.socket.append((evidence, sa, self.now))

    @move(spi=SPIS, lost=BOTH)
    def forge(self, spi, lost):
        """A clear packet with a mark that came while no verified stamp was there to clear it."""
        generation = self.generation - 1 if lost and self.generation > 1 else 0
        self.socket.append((seen(spi, generation=generation), None, self.now))

    @move()
    def lose(self):
        self.receive_all()
        self.resync()

    @move()
    def lose_stamp(self):
        self.generation += 1
        self.resolver.generation = self.generation
        self.mirror.bump()
        self.resolver.settle_all()


HISTORIES = 4000
LOOPBACK = 1
SELECTORS = [
    Selector(family=2),
    Selector(family=2, proto=17),
    Selector(PEER, source_prefix=32, family=2),
    Selector(OTHER, source_prefix=32, family=2),
]
TEMPLATES = [Template(), Template(), Template(proto=51), Template(mode=Mode.TUNNEL)]
ALLOW, BLOCK = PolicyAction
POLICIES = [
    *(
        protect(template, selector=selector, priority=priority)
        for template, selector, priority in product(TEMPLATES, SELECTORS, (1, 2, 3))
    ),
    *(
        protect(Template(optional=True), selector=selector, priority=priority, action=action)
        for selector, priority, action in product(SELECTORS, (0, 1, 2), (ALLOW, ALLOW, BLOCK))
    ),
]
# What is delivered here is routed to the loopback interface, whatever it came by.
DEVICES = [0] * 18 + [LOOPBACK, 3]
MARKS = [Mark()] * 9 + [Mark(0, 1), Mark(1, 1), Mark(2, 1)]


class Inference(Kernel):
    """By the policies, on a backend that was told to trust them."""

    @move(policy=POLICIES, ifindex=DEVICES, mark=MARKS)
    def add_policy(self, policy, ifindex, mark):
        selector = policy.selector._replace(ifindex=ifindex)
        policy = replace(policy, selector=selector, mark=mark)
        old = self.policies.get(policy.key)
        if old is not None and old.priority != policy.priority:
            del self.policies[policy.key]
        self.policies[policy.key] = policy
        self.events.append(PolicyAdded(policy))

    @move(pick=PICKS)
    def delete_policy(self, pick):
        if self.policies:
            key = [*self.policies][pick % len(self.policies)]
            del self.policies[key]
            self.events.append(PolicyDeleted(key))

    @move(rarely=RARELY)
    def flush_policies(self, rarely):
        if rarely:
            self.policies.clear()
            self.events.append(PoliciesFlushed(0))

    def lets_in(self, sa: SA | None) -> bool:
        """Whether the kernel lets in a datagram of the peer, with mark 0, under an SA or none."""
        fitting = [
            p
            for p in self.policies.values()
            if p.selector.source in (b"", PEER)
            and p.selector.ifindex in (0, LOOPBACK)
            and p.mark in (Mark(), Mark(0, 1))
        ]
        policy: Policy | None = min(fitting, key=lambda p: p.priority, default=None)
        if policy is None:
            return True
        (template,) = policy.templates
        fits = sa is not None and (sa.proto, sa.mode) == (template.proto, template.mode)
        return policy.action is PolicyAction.ALLOW and (template.optional or fits)

    @move(pick=PICKS, hidden=BOTH)
    def send(self, pick, hidden):
        sa, shown = self.sends(pick, hidden)
        if self.lets_in(shown):
            self.socket.append((seen(generation=0), sa, self.now))

    @move(rarely=RARELY)
    def lose(self, rarely):
        if rarely:
            self.resync()


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestInference = Inference.TestCase
TestInference.settings = TestTraffic.settings


@pytest.mark.parametrize("machine", [Traffic, Inference])
def test_long_histories(machine):
    """Hypothesis finds the shortest history of a lie; this one finds lies that take a long one."""
    rnd = Random(17)
    moves = [method for method in vars(machine).values() if hasattr(method, "choices")]
    moves += [method for method in vars(Kernel).values() if hasattr(method, "choices")]
    for _ in range(HISTORIES):
        played = machine()
        for _ in range(50):
            chosen = rnd.choice(moves)
            chosen(played, **{name: rnd.choice(each) for name, each in chosen.choices.items()})
        played.every_claim_is_true()
