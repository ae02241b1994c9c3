"""The whole engine against a kernel that is played: no token may claim what its packets lack.

Packets wait in the socket's queue, the event of a new SA may come after its first packets, events
are lost, numbers are used again, stamps come and go.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sas import CBC, ah, comp, esp, null, seen, tunnel

from ipsec_aio.enums import Assurance
from ipsec_aio.events import SAAdded, SADeleted, SAsFlushed
from ipsec_aio.mirror import Mirror
from ipsec_aio.tokens import Resolver

KINDS = st.sampled_from(
    [esp, null, ah, comp, lambda spi: tunnel(spi), lambda spi: esp(spi, encryption=CBC)]
)
SPIS = st.integers(1, 3)


class Traffic(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.kernel: dict = {}
        self.events: list = []
        self.socket: list = []
        self.told: list = []
        self.generation = 1
        self.answers = True
        self.mirror = Mirror()
        self.resolver = Resolver(self.mirror, lambda: self.now)
        self.resolver.generation = 1
        self.resolver.lookup_missing = self.lookup
        self.resync()

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
        self.resolver.settle_all()

    def resync(self) -> None:
        self.events.clear()
        self.mirror.begin_resync(self.now)
        for sa in reversed(self.kernel.values()):
            self.mirror.load(SAAdded(sa), self.now)
        self.mirror.finish_resync(self.now)
        self.resolver.settle_all()

    def put(self, sa) -> None:
        # The kernel takes an SA only where its key is free.
        if self.kernel.pop(sa.key, None):
            self.events.append(SADeleted(sa.key))
        self.kernel[sa.key] = sa
        self.events.append(SAAdded(sa))

    @rule(kind=KINDS, spi=SPIS)
    def add(self, kind, spi):
        self.put(kind(spi))

    @precondition(lambda self: self.kernel)
    @rule(data=st.data())
    def rekey(self, data):
        sa = data.draw(st.sampled_from(list(self.kernel.values())))
        self.put(replace(sa, spi=data.draw(SPIS)))

    @precondition(lambda self: self.kernel)
    @rule(data=st.data())
    def delete(self, data):
        key = data.draw(st.sampled_from(list(self.kernel)))
        del self.kernel[key]
        self.events.append(SADeleted(key))

    @rule()
    def flush(self):
        self.kernel.clear()
        self.events.append(SAsFlushed(0))

    @rule(data=st.data(), clear=st.booleans())
    def send(self, data, clear):
        sas = list(self.kernel.values())
        sa = None if clear or not sas else data.draw(st.sampled_from(sas))
        spi = sa.spi if sa else 0
        self.socket.append((seen(spi, generation=self.generation), sa))

    @rule(spi=SPIS, lost=st.booleans())
    def forge(self, spi, lost):
        """A clear packet with a mark that came while no verified stamp was there to clear it."""
        generation = self.generation - 1 if lost and self.generation > 1 else 0
        self.socket.append((seen(spi, generation=generation), None))

    @precondition(lambda self: self.socket)
    @rule(late=st.booleans(), answers=st.booleans())
    def receive(self, late, answers):
        evidence, sa = self.socket.pop(0)
        last = self.events[-1] if self.events else None
        # The one event that may come after a packet is that of the packet's own, new SA; and no
        # two SAs that live at once share a number by accident within that moment.
        own = isinstance(last, SAAdded) and last.sa == sa
        alone = sum(other.spi == evidence.spi for other in self.kernel.values()) == 1
        self.drain(late=int(late and own and alone))
        self.answers = answers
        self.told.append((self.resolver.resolve(evidence), sa))
        self.answers = True

    @rule(seconds=st.sampled_from([0.5, 3.0, 11.0]))
    def wait(self, seconds):
        while self.socket:
            self.receive(False, True)
        self.drain()
        self.now += seconds
        self.drain()

    @rule()
    def lose(self):
        while self.socket:
            self.receive(False, True)
        self.resync()

    @rule()
    def lose_stamp(self):
        self.generation += 1
        self.resolver.generation = self.generation
        self.mirror.bump()
        self.resolver.settle_all()

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
                assert sa is None, "called clear"
            if token.tunnel_mode is not None and sa:
                assert token.tunnel_mode == bool(sa.mode)


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
