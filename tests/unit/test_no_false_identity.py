"""Tokens and their peers against a kernel and a keying daemon that are played.

All peers are behind one address, with one reqid and one algorithm. Each calls itself in IKE by a
name of its choice, and proves its own by EAP some time later. Packets wait in the socket's queue
and the daemon's word in its socket, though not as long as removed SAs are remembered; SPIs are used
again, also those that the peers choose for what is sent to them; both ends are lost and come back.
No token may name another than who sent its packets, none may change its mind, and nobody may be
named of an SA that leads to somebody else.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sas import esp, seen
from test_ike import LOCAL, PEER, child, ike, sa, up

from ipsec_aio.enums import Direction
from ipsec_aio.events import SAAdded, SADeleted
from ipsec_aio.identities import UNIDENTIFIED, Identities
from ipsec_aio.identity import IToken
from ipsec_aio.ike import AuthenticationRound, Connection, IKETable
from ipsec_aio.join import Join
from ipsec_aio.mirror import TOMBSTONE_SECONDS, Mirror
from ipsec_aio.proofs import Proofs
from ipsec_aio.sa import SA
from ipsec_aio.tokens import PToken, Resolver

SPIS = st.integers(0x1001, 0x1004)
OUTWARDS = st.integers(0x2001, 0x2002)
NAMES = st.sampled_from(["alice", "bob", "carol"])
TICK = 0.001
CONNECTIONS = [Connection("conn", "IKEv2", (), (AuthenticationRound("EAP"),))]


@dataclass(eq=False)
class Child:
    """A child of charon's, and the kernel's SAs."""

    number: int
    sa: SA
    out: SA
    state: str = "INSTALLED"

    @property
    def section(self):
        told = child(self.number, self.state, spi=self.sa.spi, reqid=1)
        return told | {"spi-out": b"%08x" % self.out.spi}


@dataclass(eq=False)
class IKE:
    """An IKE SA of charon's."""

    number: int
    spi: int
    claim: str
    peer: str | None = None
    children: list[Child] = field(default_factory=list)

    @property
    def section(self):
        claim = self.claim.encode()
        if self.peer is None:
            return ike(self.number, "CONNECTING", spi=self.spi, remote_id=claim)
        # What EAP proved is not said where it is the same.
        proved = {} if self.peer == self.claim else {"remote_eap_id": self.peer.encode()}
        return ike(self.number, spi=self.spi, remote_id=claim, **proved)


@dataclass(eq=False)
class Sent:
    """A token that packets of a peer came with, and whom it ever named."""

    token: PToken
    peer: str | None
    named: set[IToken] = field(default_factory=set)


class Peers(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.count = self.ike_spis = 0
        self.kernel: dict[int, tuple[SA, str | None]] = {}
        # Whom SAs that lead out were made for, also those that are gone.
        self.sent_to: list[tuple[SA, str | None]] = []
        self.repeated: set[int] = set()
        self.named_out = 0
        self.events: list = []
        self.queue: list = []
        self.ikes: list[IKE] = []
        self.owners: dict[int, IKE] = {}  # by SPI of IKE
        self.words: list = []
        self.there = True
        self.sent: list[Sent] = []
        self.slow = False
        self.mirror = Mirror()
        self.table = IKETable()
        self.proofs = Proofs(self.table)
        self.join = Join(self.mirror, self.table, self.proofs.ends)
        self.resolver = Resolver(self.mirror, lambda: self.now)
        self.resolver.generation = 1
        self.resolver.identified = True
        self.resolver.identify = self.join.identities_of
        self.resolver.lookup_missing = self.lookup
        self.resync()
        self.list_all()

    # What connects the two with the engine: as the backend does

    def lookup(self, key) -> bool:
        self.drain()
        return True

    def drain(self) -> None:
        for event in self.events:
            self.mirror.apply(event, self.now)
            if isinstance(event, SAAdded):
                self.repeated.update(self.join.of_number(event.sa))
        self.events.clear()
        self.mirror.advance(self.now)

    def moment(self) -> float:
        self.now += TICK
        self.drain()
        return self.now

    def judge(self) -> None:
        began = self.moment()
        self.proofs.listed(CONNECTIONS, None, began, self.moment())

    def changed(self) -> None:
        if self.there and not self.slow and self.proofs.wants:
            self.judge()
        self.mirror.bump()
        self.resolver.settle_all()
        again, everything = self.join.doubtful | self.repeated, self.join.wants_listing()
        self.join.doubtful.clear()
        self.repeated.clear()
        if self.there and everything:
            self.list_all()
        elif self.there:
            for number in again:
                self.list_again(number)

    def list_again(self, number) -> None:
        now = self.moment()
        for each in self.ikes:
            if each.number == number:
                self.table.refresh(self.listed(each), now)
        self.changed()

    def list_all(self) -> None:
        self.table.begin_resync(self.moment())
        for each in self.ikes:
            self.table.load(self.listed(each))
        self.table.finish_resync(self.moment())
        self.changed()

    def listed(self, each: IKE):
        return sa(each.section, *(c.section for c in each.children))

    def resync(self) -> None:
        self.events.clear()
        self.mirror.begin_resync(self.now)
        for known, _ in self.kernel.values():
            self.mirror.load(SAAdded(known), self.now)
        self.mirror.finish_resync(self.now)
        self.resolver.settle_all()

    # The kernel

    def put(self, spi, peer) -> SA:
        known = esp(spi, PEER, LOCAL, reqid=1 if peer else 0)
        self.kernel[spi] = known, peer
        self.events.append(SAAdded(known))
        return known

    def take(self, known: SA) -> None:
        if self.kernel.get(known.spi, (None,))[0] is known:
            del self.kernel[known.spi]
            self.events.append(SADeleted(known.key))

    def lead(self, spi, peer) -> SA:
        """Put in an SA that leads out."""
        known = esp(spi, LOCAL, PEER, reqid=1 if peer else 0)
        self.install_out(known, peer)
        return known

    def install_out(self, known, peer) -> None:
        self.kernel[known.spi] = known, peer
        self.sent_to.append((known, peer))
        self.events.append(SAAdded(known))

    @rule(spi=SPIS | OUTWARDS)
    def key_by_hand(self, spi):
        if spi not in self.kernel:
            if spi < 0x2000:
                self.put(spi, None)
            else:
                self.lead(spi, None)

    def part_with(self, old: Child) -> None:
        self.take(old.sa)
        self.take(old.out)

    @rule(data=st.data())
    def delete_by_hand(self, data):
        mine = [known for known, peer in self.kernel.values() if peer is None]
        if mine:
            self.take(data.draw(st.sampled_from(mine)))

    # charon

    def number(self) -> int:
        self.count += 1
        return self.count

    def ike_spi(self) -> int:
        # Random and of 64 bits: a charon that counts anew does not have them again.
        self.ike_spis += 1
        return self.ike_spis

    def say(self, name, message) -> None:
        if self.there:
            self.words.append((name, message, self.now))

    @property
    def established(self) -> list[IKE]:
        return [each for each in self.ikes if each.peer is not None]

    def begun(self, claim, name=None) -> IKE:
        new = IKE(self.number(), self.ike_spi(), claim, name)
        self.ikes.append(new)
        self.owners[new.spi] = new
        return new

    @rule(claim=NAMES)
    def begin(self, claim):
        self.begun(claim)

    @precondition(lambda self: len(self.established) < len(self.ikes))
    @rule(data=st.data(), name=NAMES, spi=SPIS, out=OUTWARDS)
    def establish(self, data, name, spi, out):
        begun = data.draw(st.sampled_from([each for each in self.ikes if each.peer is None]))
        begun.peer = name
        self.say("ike-updown", up(begun.section))
        self.install(begun, spi, out)

    @rule(claim=NAMES, name=NAMES, spi=SPIS, out=OUTWARDS)
    def connect(self, claim, name, spi, out):
        new = self.begun(claim, name)
        self.say("ike-updown", up(new.section))
        self.install(new, spi, out)

    @precondition(lambda self: self.established)
    @rule(data=st.data(), spi=SPIS, out=OUTWARDS)
    def add_a_child(self, data, spi, out):
        self.install(data.draw(st.sampled_from(self.established)), spi, out)

    def install(self, parent, spi, out):
        if spi in self.kernel or out in self.kernel:
            return
        new = Child(self.number(), self.put(spi, parent.peer), self.lead(out, parent.peer))
        parent.children.append(new)
        self.say("child-updown", up(parent.section, new.section))

    @precondition(lambda self: any(each.children for each in self.ikes))
    @rule(data=st.data(), spi=SPIS, out=OUTWARDS, asked=st.booleans())
    def rekey(self, data, spi, out, asked):
        """``asked``, by the peer: then what leads out is installed once that is told."""
        if spi in self.kernel or out in self.kernel:
            return
        parent = data.draw(st.sampled_from([each for each in self.ikes if each.children]))
        old = data.draw(st.sampled_from(parent.children))
        known = esp(out, LOCAL, PEER, reqid=1)
        new = Child(self.number(), self.put(spi, parent.peer), known)
        parent.children.append(new)
        if not asked:
            self.install_out(known, parent.peer)
        # The old one is listed for a while longer, though nothing is sent by it.
        old.state = "DELETED"
        both = {"old": old.section, "new": new.section}
        self.say("child-rekey", {"conn": parent.section | {"child-sas": {"net": both}}})
        self.take(old.out)
        if asked:
            self.install_out(known, parent.peer)

    @precondition(lambda self: any(each.children for each in self.ikes))
    @rule(data=st.data())
    def end(self, data):
        parent = data.draw(st.sampled_from([each for each in self.ikes if each.children]))
        old = data.draw(st.sampled_from(parent.children))
        parent.children.remove(old)
        self.part_with(old)
        if old.state != "DELETED":
            self.say("child-updown", sa(parent.section, old.section))

    @precondition(lambda self: self.ikes)
    @rule(data=st.data())
    def disconnect(self, data):
        parent = data.draw(st.sampled_from(self.ikes))
        self.ikes.remove(parent)
        for old in parent.children:
            self.part_with(old)
        self.say("ike-updown", sa(parent.section))
        self.say("child-updown", sa(parent.section, *(c.section for c in parent.children)))

    @precondition(lambda self: self.established)
    @rule(data=st.data())
    def rekey_ike(self, data):
        parent = data.draw(st.sampled_from(self.established))
        old, parent.number, parent.spi = parent.section, self.number(), self.ike_spi()
        self.owners[parent.spi] = parent
        self.say("ike-rekey", {"conn": {"old": old, "new": parent.section}})

    @rule(flush=st.booleans())
    def restart(self, flush):
        """charon forgets all, counts anew, and may leave its SAs behind."""
        if flush:
            for parent in self.ikes:
                for old in parent.children:
                    self.part_with(old)
        self.ikes.clear()
        self.count = 0
        self.go_away()

    @rule()
    def go_away(self):
        self.there = False
        self.words.clear()
        self.table.begin_resync()
        self.changed()

    @precondition(lambda self: not self.there)
    @rule()
    def come_back(self):
        self.there = True
        self.list_all()

    @precondition(lambda self: self.words)
    @rule(count=st.integers(1, 3))
    def hear(self, count):
        for _ in range(min(count, len(self.words))):
            name, message, _ = self.words.pop(0)
            for number in self.table.apply(name, message, self.moment()):
                self.list_again(number)
            self.changed()

    @rule()
    def judge_slowly(self):
        self.slow = not self.slow
        self.changed()

    @precondition(lambda self: self.there)
    @rule()
    def look_again(self):
        self.list_all()
        if not self.slow:
            self.judge()
            self.changed()

    # Packets

    @precondition(lambda self: any(spi < 0x2000 for spi in self.kernel))
    @rule(data=st.data())
    def send(self, data):
        inwards = [each for spi, each in self.kernel.items() if spi < 0x2000]
        known, peer = data.draw(st.sampled_from(inwards))
        self.queue.append((seen(known.spi, local=LOCAL, peer=PEER), peer))

    @precondition(lambda self: self.queue)
    @rule()
    def receive(self):
        evidence, peer = self.queue.pop(0)
        self.drain()
        self.sent.append(Sent(self.resolver.resolve(evidence), peer))
        self.changed()

    @precondition(lambda self: self.sent_to)
    @rule()
    def reply(self):
        """Ask of whatever may be sent by; nobody may be named of what leads to another."""
        self.moment()
        owners = {id(known): peer for known, peer in self.sent_to}
        for record in list(self.mirror.sad.between(LOCAL, PEER)):
            answer = self.join.identities_of(record, self.now, Direction.OUT)
            if isinstance(answer, Identities) and answer.peer is not None:
                assert str(answer.peer) == owners[id(record.sa)]
                self.named_out += 1
        self.changed()

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def forget(self, data):
        self.sent.remove(data.draw(st.sampled_from(self.sent)))

    # Time, and losses

    @rule(seconds=st.sampled_from([0.1, 0.6, 2.1, 11.0, 31.0]))
    def wait(self, seconds):
        while self.queue:
            self.receive()
        while self.words and self.now + seconds > self.words[0][2] + TOMBSTONE_SECONDS:
            self.hear(1)
        self.now += seconds
        self.drain()
        self.table.advance(self.now)
        self.changed()

    @rule()
    def lose(self):
        while self.queue:
            self.receive()
        self.resync()
        if self.there:
            self.list_all()

    # What must hold

    @invariant()
    def nobody_is_named_who_did_not_send_it(self):
        for each in self.sent:
            peer = each.token.peer
            if peer is not None:
                each.named.add(peer)
            assert {str(peer) for peer in each.named} <= {str(each.peer)}
            assert len(each.named) <= 1, "how it was proved is told once"
            assert peer is not None or not each.named, "it was named and is not any more"

    @invariant()
    def nobody_is_who_he_did_not_prove_to_be(self):
        for each in self.table.sas():
            ends = self.proofs.ends(each)
            if ends is not None and ends.peer is not None:
                assert str(ends.peer) == self.owners[each.initiator_spi].peer

    @invariant()
    def a_channel_is_one_token(self):
        channels = {}
        for each in self.sent:
            token = each.token
            if not token.pending:
                whole = token.channel
                kind = whole._kind
                assert channels.setdefault((kind.verdict, kind.identities), whole) is whole

    @invariant()
    def nobody_s_sas_are_another_s(self):
        owners = {id(known): peer for known, peer in self.kernel.values()}
        for each in self.sent:
            if each.token._kind.identities != UNIDENTIFIED:
                for known in each.token.sas:
                    # What the mirror has not heard of yet is gone from the kernel.
                    assert owners.get(id(known), each.peer) == each.peer


TestPeers = Peers.TestCase
TestPeers.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)


class Replies(Peers):
    """The same with less that can happen, and so more of what leads out."""

    begin = establish = connect = add_a_child = rekey = None
    send = receive = forget = judge_slowly = lose = None
    go_away = come_back = restart = disconnect = rekey_ike = delete_by_hand = None

    @initialize()
    def two_peers(self):
        for name in ("alice", "bob"):
            self.say("ike-updown", up(self.begun(name, name).section))
        self.listen()

    @property
    def inwards(self):
        return next(spi for spi in range(0x1001, 0x2000) if spi not in self.kernel)

    @rule()
    def listen(self):
        while self.words:
            self.hear(1)

    @rule(data=st.data(), out=OUTWARDS, told=st.booleans())
    def come_up(self, data, out, told):
        self.install(data.draw(st.sampled_from(self.ikes)), self.inwards, out)
        if told:
            self.listen()

    @precondition(lambda self: any(each.children for each in self.ikes))
    @rule(data=st.data(), out=OUTWARDS, asked=st.booleans(), told=st.booleans())
    def replace(self, data, out, asked, told):
        Peers.rekey(self, data, self.inwards, out, asked)
        if told:
            self.listen()


TestReplies = Replies.TestCase
TestReplies.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
