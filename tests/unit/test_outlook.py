"""What a latch gets to see."""

from __future__ import annotations

import pytest
from sas import FAR, GATE, GCM, LOCAL, OTHER, PEER, ah, comp, esp, protect, tunnel

from ipsec_aio.backends.memory import MemoryBackend
from ipsec_aio.enums import Direction, PolicyAction
from ipsec_aio.errors import BackendUnavailable
from ipsec_aio.events import DefaultActions, PolicyAdded, SAAdded, SADeleted
from ipsec_aio.evidence import IPPROTO_TCP, Evidence
from ipsec_aio.flow import Selector
from ipsec_aio.identities import Awaited, Identities
from ipsec_aio.identity import IdentityKind, IToken
from ipsec_aio.mirror import Mirror
from ipsec_aio.outlook import survey
from ipsec_aio.sa import SA
from ipsec_aio.tokens import Resolver

CONNECTION = Evidence(IPPROTO_TCP, LOCAL, 5000, PEER, 40000)
ANN = IToken(IdentityKind.FQDN, "ann.example.org")
ALLOW, BLOCK = PolicyAction


@pytest.fixture
def resolver() -> Resolver:
    resolver = Resolver(Mirror(), lambda: 100.0)
    resolver.mirror.begin_resync(0)
    resolver.mirror.finish_resync(0)
    resolver.is_own = (LOCAL, GATE).__contains__
    return resolver


def show(resolver: Resolver, *facts) -> None:
    for fact in facts:
        resolver.mirror.apply(SAAdded(fact) if isinstance(fact, SA) else fact, 50.0)


def spis(sightings) -> set[int]:
    return {sighting.sa.spi for sighting in sightings}


def only(port: int) -> Selector:
    return Selector(source_port=port, source_port_mask=0xFFFF)


def test_what_may_come_in(resolver: Resolver) -> None:
    show(
        resolver,
        esp(1),
        ah(2),
        esp(3, source=OTHER),
        esp(4, destination=GATE),
        tunnel(5),
        esp(6, selector=only(40000)),
    )
    show(
        resolver,
        comp(11),
        esp(12, aead=None),
        esp(13, destination=OTHER),
        esp(14, direction=Direction.OUT),
        esp(15, selector=only(1)),
        tunnel(16, selector=only(1)),
        esp(17, source=LOCAL, destination=PEER),
        SA(source=GATE, destination=FAR, proto=50, spi=18, mode=1, aead=GCM),
    )
    outlook = survey(resolver, CONNECTION)
    assert spis(outlook.inbound) == {1, 2, 3, 4, 5, 6}
    assert {sighting.born for sighting in outlook.inbound} == {50.0}


def test_what_may_go_out(resolver: Resolver) -> None:
    back = Selector(destination_port=40000, destination_port_mask=0xFFFF)
    out = {"source": LOCAL, "destination": PEER}
    show(
        resolver,
        esp(1, **out),
        ah(2, **out),
        esp(3, selector=back, **out),
        SA(source=GATE, destination=FAR, proto=50, spi=4, mode=1, aead=GCM),
    )
    show(
        resolver,
        comp(11, **out),
        esp(12, aead=None, **out),
        esp(13, source=LOCAL, destination=OTHER),
        esp(14, direction=Direction.IN, **out),
        esp(15, selector=only(40000), **out),
        esp(16),
        tunnel(17),
    )
    assert spis(survey(resolver, CONNECTION).outbound) == {1, 2, 3, 4}


def test_policies_and_defaults(resolver: Resolver) -> None:
    outlook = survey(resolver, CONNECTION)
    assert (outlook.policies_in, outlook.policies_out) == ((), ())
    assert not outlook.blocked_in
    assert not outlook.blocked_out
    show(resolver, DefaultActions(BLOCK, ALLOW, ALLOW))
    assert (survey(resolver, CONNECTION).blocked_in, survey(resolver, CONNECTION).blocked_out) == (
        True,
        False,
    )
    inward = protect()
    show(resolver, PolicyAdded(inward), DefaultActions(BLOCK, ALLOW, BLOCK))
    outlook = survey(resolver, CONNECTION)
    assert outlook.policies_in == (inward,)
    assert not outlook.blocked_in
    assert outlook.blocked_out


def test_who_is_at_the_ends(resolver: Resolver) -> None:
    answers = {1: Identities(None, ANN), 2: Awaited(101.5), 3: Identities(), 4: Identities(ANN)}
    asked = set()

    def identify(record, now, direction=Direction.IN):
        asked.add((record.sa.spi, direction))
        return answers[record.sa.spi]

    resolver.identify = identify
    show(resolver, esp(1), esp(2), esp(3), esp(4, LOCAL, PEER))
    outlook = survey(resolver, CONNECTION)
    assert [(s.sa.spi, s.local, s.peer, s.pending) for s in outlook.inbound] == [
        (1, None, ANN, False),
        (2, None, None, True),
        (3, None, None, False),
    ]
    assert [(s.sa.spi, s.local, s.peer) for s in outlook.outbound] == [(4, ANN, None)]
    assert asked == {(spi, Direction.OUT if spi == 4 else Direction.IN) for spi in answers}
    assert outlook.settled_in == 1.5


def test_nothing_is_sure_while_tables_are_read(resolver: Resolver) -> None:
    resolver.opaque_interfaces = True
    assert survey(resolver, CONNECTION).opaque
    resolver.mirror.begin_resync(60.0)
    outlook = survey(resolver, CONNECTION)
    assert not outlook.sure
    assert outlook.opaque


def test_after_a_look_every_new_sa_is_told(resolver: Resolver) -> None:
    survey(resolver, CONNECTION)
    before = resolver.mirror.epoch
    show(resolver, esp(1))
    assert resolver.mirror.epoch != before
    survey(resolver, CONNECTION)
    before = resolver.mirror.epoch
    show(resolver, SADeleted(esp(1).key))
    assert resolver.mirror.epoch != before


async def test_a_backend_gives_it_while_it_is_open() -> None:
    backend = MemoryBackend()
    sa = backend.add_sa(src="192.0.2.2", dst="192.0.2.1")
    assert spis(backend.outlook(CONNECTION).inbound) == {sa.spi}
    await backend.aclose()
    with pytest.raises(BackendUnavailable):
        backend.outlook(CONNECTION)


@pytest.mark.parametrize("direction", [Direction.IN, Direction.OUT])
def test_where_policies_name_interfaces_nobody_knows_which_apply(resolver, direction):
    show(resolver, PolicyAdded(protect(direction=direction)))
    assert not survey(resolver, CONNECTION).opaque
    bound = protect(direction=direction, selector=Selector(ifindex=3), index=16)
    show(resolver, PolicyAdded(bound))
    assert survey(resolver, CONNECTION).opaque
