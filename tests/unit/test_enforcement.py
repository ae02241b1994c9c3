"""What a socket's policy may demand, and what is asked in user space because it stands in."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sas import FAR, GATE, LOCAL, OTHER, PEER, ah, comp, esp, protect, seen, tunnel

from ipsec_aio.backends.memory import MemoryBackend
from ipsec_aio.backends.tables import TableBackend
from ipsec_aio.enforcement import Plan, common, derive, governing, implies, objection
from ipsec_aio.enums import Direction, Mode, PolicyAction
from ipsec_aio.events import DefaultActions, PolicyAdded, PolicyDeleted, SAAdded, SADeleted
from ipsec_aio.flow import Mark, Selector
from ipsec_aio.mirror import Mirror
from ipsec_aio.policy import Policy, Template
from ipsec_aio.require import Demands
from ipsec_aio.sa import IPPROTO_AH, IPPROTO_COMP, IPPROTO_ESP

ESP = Template()
AH = Template(proto=IPPROTO_AH)
COMP = Template(proto=IPPROTO_COMP, optional=True)
TUNNEL = Template(mode=Mode.TUNNEL, source=FAR, destination=GATE)
UDP, TCP, PORT = 17, 6, 5000


ENCRYPTED = Demands(encrypted=True, integrity=True)


def plan(*inbound: tuple[Template, ...], demands: Demands = ENCRYPTED, out=()) -> Plan:
    found = derive(demands, inbound, out)
    assert isinstance(found, Plan), found
    return found


def why_not(*inbound: tuple[Template, ...], demands: Demands = ENCRYPTED) -> str:
    found = derive(demands, inbound)
    assert isinstance(found, str), found
    return found


# What can be demanded


def test_one_kind_of_protection_is_demanded_as_the_policies_do() -> None:
    assert plan((ESP,)) == Plan((ESP,))
    exact = replace(TUNNEL, reqid=7, spi=0x1001)
    assert plan((exact,)) == Plan((exact,))
    assert plan((COMP, ESP)).inbound == (COMP, ESP)


def test_what_policies_differ_in_is_left_open_and_loose() -> None:
    one, two = replace(TUNNEL, reqid=1), replace(TUNNEL, reqid=2, source=PEER)
    found = plan((one,), (two,))
    assert found == Plan((replace(TUNNEL, source=b""),), loose=True)
    assert plan((ESP,), (replace(ESP, reqid=3),)) == Plan((ESP,), loose=True)
    masked = [(replace(ESP, encryption_algorithms=n, auth_algorithms=n),) for n in (1, 3)]
    assert plan(*masked) == Plan((ESP,), loose=True)
    assert not plan((replace(ESP, reqid=3),)).loose


def test_other_kinds_than_demanded_do_not_count_but_make_it_loose() -> None:
    demands = replace(ENCRYPTED, mode=Mode.TRANSPORT)
    assert plan((ESP,), (TUNNEL,), demands=demands) == Plan((ESP,), loose=True)
    assert plan((TUNNEL,), demands=demands) == Plan((ESP,), loose=True)
    assert plan((ESP,), (AH,)).inbound == (ESP,)
    assert plan((ESP,), (AH,), demands=Demands(integrity=True, protocol=IPPROTO_AH)).inbound == (
        AH,
    )


def test_without_policies_the_requirement_must_say_it_all() -> None:
    whole = replace(ENCRYPTED, mode=Mode.TUNNEL)
    assert plan(demands=whole) == Plan((Template(mode=Mode.TUNNEL),))
    assert "which mode," in why_not()
    assert "which protocol and mode" in why_not(demands=Demands(integrity=True))
    assert "which protocol," in why_not(demands=Demands(integrity=True, mode=Mode.TRANSPORT))
    assert "which mode" in why_not((AH,)), "AH does not encrypt"
    assert "demands nothing" in why_not((ESP,), demands=Demands())


def test_integrity_alone_is_what_the_policies_say() -> None:
    integrity = Demands(integrity=True)
    assert plan((AH,), demands=integrity).inbound == (AH,)
    assert "differ (AH transport, ESP transport)" in why_not((AH,), (ESP,), demands=integrity)
    assert "ESP transport, ESP tunnel" in why_not((ESP,), (TUNNEL,))
    assert "IPComp transport optional+ESP" in why_not((ESP,), (COMP, ESP))


def test_the_template_that_evidence_names() -> None:
    assert plan((ESP, AH)).template is ESP
    assert plan((COMP, AH), demands=Demands(integrity=True)).template is AH


def test_outbound_is_demanded_where_one_policy_governs() -> None:
    assert plan((ESP,), out=[(ESP,)]).outbound == (ESP,)
    assert plan((ESP,), out=[(ESP,), (AH,)]).outbound == (ESP,)
    assert plan((ESP,), out=[(ESP,), (replace(ESP, reqid=2),)]).outbound is None
    assert plan((ESP,)).outbound is None


def test_what_goes_out_says_of_which_kind_the_answers_are() -> None:
    tunnel = replace(TUNNEL, reqid=7)
    assert plan(out=[(tunnel,)]) == Plan((Template(mode=Mode.TUNNEL),), (tunnel,))
    assert plan(out=[(COMP, ESP)]) == Plan((ESP,), (COMP, ESP))
    assert isinstance(derive(ENCRYPTED, (), [(ESP,), (TUNNEL,)]), str)


_TEMPLATES = st.builds(
    Template,
    proto=st.sampled_from([IPPROTO_ESP, IPPROTO_AH]),
    mode=st.sampled_from([Mode.TRANSPORT, Mode.TUNNEL]),
    source=st.sampled_from([b"", FAR, PEER]),
    reqid=st.integers(0, 2),
    spi=st.sampled_from([0, 0x1001]),
    auth_algorithms=st.sampled_from([0xFFFFFFFF, 1]),
)


@given(
    st.lists(st.lists(_TEMPLATES, min_size=1, max_size=2).map(tuple), max_size=3),
    st.builds(
        Demands,
        encrypted=st.booleans(),
        integrity=st.just(True),
        mode=st.sampled_from([None, *Mode]),
        protocol=st.sampled_from([None, IPPROTO_ESP, IPPROTO_AH]),
    ),
)
def test_a_plan_demands_what_the_requirement_does_and_knows_where_it_is_loose(
    bundles: list[tuple[Template, ...]], demands: Demands
) -> None:
    found = derive(demands, bundles)
    if isinstance(found, str):
        return
    proto = demands.protocol or (IPPROTO_ESP if demands.encrypted else None)
    assert any(
        proto in (None, t.proto) and demands.mode in (None, t.mode) and not t.optional
        for t in found.inbound
    )
    tight = all(any(implies(t, wanted) for t in found.inbound) for b in bundles for wanted in b)
    assert found.loose is not tight


# Which policies govern


def of(direction: Direction = Direction.IN, **fields: object) -> Selector:
    """A selector for traffic of our port; ``here`` and ``there`` are ends of it."""
    inbound = direction is Direction.IN
    here, there = fields.pop("here", b""), fields.pop("there", b"")
    ends = (there, here) if inbound else (here, there)
    port = int(fields.pop("port", 0))  # type: ignore[call-overload]
    mask = 0xFFFF if port else 0
    ports = {"destination_port": port, "destination_port_mask": mask}
    if not inbound:
        ports = {"source_port": port, "source_port_mask": mask}
    return Selector(
        *ends,  # type: ignore[arg-type]
        *(8 * len(end) for end in ends),  # type: ignore[arg-type]
        proto=int(fields.pop("proto", 0)),  # type: ignore[call-overload]
        family=2,
        **ports,
    )


@pytest.mark.parametrize("direction", [Direction.IN, Direction.OUT])
def test_policies_that_may_govern_a_port(direction: Direction) -> None:
    def found(selector: Selector, **narrow: object) -> bool:
        policy = protect(ESP, selector=selector, direction=direction)
        return bool(governing([policy], UDP, PORT, direction, **narrow))  # type: ignore[arg-type]

    assert found(of(direction))
    assert found(of(direction, port=PORT, proto=UDP))
    assert not found(of(direction, port=PORT + 1))
    assert not found(of(direction, proto=TCP))
    assert found(of(direction, there=PEER))
    assert found(of(direction, there=PEER), peer=PEER, local=LOCAL)
    assert not found(of(direction, there=PEER), peer=OTHER)
    assert not found(of(direction, here=LOCAL), local=OTHER)
    assert not found(of(direction, there=PEER), peer=bytes(16))


def test_what_comes_after_a_policy_for_all_of_it_governs_nothing() -> None:
    every = protect(AH, priority=5, selector=Selector(family=2))
    one = protect(ESP, priority=4, selector=from_peer(), index=16)
    late = protect(TUNNEL, priority=6, selector=from_peer(OTHER), index=24)
    known = [late, every, one]
    assert governing(known, UDP, PORT, Direction.IN) == ((ESP,), (AH,))
    assert governing(known, UDP, PORT, Direction.IN, local=LOCAL, peer=PEER) == ((ESP,),)
    assert governing(known, UDP, PORT, Direction.IN, local=LOCAL, peer=OTHER) == ((AH,),)
    tied = [protect(TUNNEL, priority=5, selector=from_peer(OTHER), index=24), every]
    assert governing(tied, UDP, PORT, Direction.IN, local=LOCAL) == ((TUNNEL,), (AH,))
    bypass = replace(every, templates=(), priority=3)
    assert governing([*known, bypass], UDP, PORT, Direction.IN) == ()
    for open_end in (
        replace(bypass, mark=Mark(1, 1)),
        replace(bypass, mark=Mark(1, 0)),
        replace(bypass, kind=1),
    ):
        assert governing([*known, open_end], UDP, PORT, Direction.IN) == ((ESP,), (AH,))
    by_interface = replace(bypass, selector=Selector(family=2, ifindex=2))
    assert governing([*known, by_interface], UDP, PORT, Direction.IN) == ((ESP,), (AH,))
    by_port = replace(bypass, selector=Selector(source_port=1, source_port_mask=65535, family=2))
    both = {"local": LOCAL, "peer": PEER}
    assert governing([*known, by_port], UDP, PORT, Direction.IN, **both) == ((ESP,),)
    assert governing([by_port, every], UDP, PORT, Direction.IN, **both) == ((AH,),)


def test_the_unspecified_address_is_any_of_its_family() -> None:
    one = protect(ESP, selector=from_peer())
    six = protect(AH, selector=Selector(family=10), index=16)
    assert governing([one, six], UDP, PORT, Direction.IN, local=bytes(4)) == ((ESP,),)
    assert governing([one, six], UDP, PORT, Direction.IN, local=bytes(16)) == ((AH,),)
    assert governing([one, six], UDP, PORT, Direction.IN) == ((ESP,), (AH,))


def test_what_two_templates_have_in_common() -> None:
    assert common(TUNNEL, replace(TUNNEL, source=PEER, reqid=4)) == replace(TUNNEL, source=b"")
    assert common(ESP, AH) is common(ESP, TUNNEL) is None


def test_the_peer_s_port_and_policies_that_govern_nothing() -> None:
    far = Selector(source_port=53, source_port_mask=0xFFFF, family=2)
    assert governing([protect(selector=far)], UDP, PORT, Direction.IN, peer_port=53)
    assert not governing([protect(selector=far)], UDP, PORT, Direction.IN, peer_port=54)
    others = [
        protect(if_id=3),
        protect(action=PolicyAction.BLOCK),
        protect(replace(ESP, optional=True)),
        protect(direction=Direction.OUT),
        protect(direction=Direction.FWD),
    ]
    assert governing(others, UDP, PORT, Direction.IN) == ()
    assert governing([protect(), protect(priority=3)], UDP, 0, Direction.IN) == ((ESP,),)


# What a policy stands in for


def mirror(*policies: Policy, sas=(), inbound=PolicyAction.ALLOW) -> Mirror:
    made = Mirror()
    made.begin_resync(0.0)
    made.load(DefaultActions(inbound, inbound, PolicyAction.ALLOW), 0.0)
    made.finish_resync(0.0)
    for event in (*map(PolicyAdded, policies), *map(SAAdded, sas)):
        made.apply(event, 1.0)
    return made


def from_peer(peer: bytes = PEER) -> Selector:
    return Selector(peer, LOCAL, 32, 32, family=2)


def test_what_is_implied_is_let_in() -> None:
    strict = replace(ESP, reqid=7)
    assert objection(mirror(protect(strict)), seen(), (strict,)) == ""
    assert objection(mirror(protect(ESP)), seen(), (strict,)) == ""
    assert objection(mirror(), seen(), (ESP,)) == ""
    assert objection(mirror(protect(ESP, selector=from_peer(OTHER))), seen(), (ESP,)) == ""
    optional = protect(COMP, ESP)
    assert objection(mirror(optional), seen(), (ESP,)) == ""


def test_what_the_policies_refuse_is_refused() -> None:
    blocked = protect(action=PolicyAction.BLOCK, selector=from_peer())
    assert "blocks" in objection(mirror(blocked), seen(), (ESP,))
    assert "no policy" in objection(mirror(inbound=PolicyAction.BLOCK), seen(), (ESP,))
    assert "tunnelled" in objection(mirror(), seen(), (TUNNEL,))
    bypass = replace(protect(), templates=())
    assert "tunnelled" in objection(mirror(bypass), seen(), (TUNNEL,))
    assert objection(mirror(protect(TUNNEL)), seen(), (TUNNEL,)) == ""
    assert "another SA" in objection(mirror(protect(AH)), seen(), (ESP,))
    # Which of equals comes first is not certain: all must be met.
    pair = (protect(ESP), protect(AH, selector=from_peer(), index=16))
    assert "another SA" in objection(mirror(*pair), seen(), (ESP,))


def test_one_peer_s_sa_does_not_speak_for_another() -> None:
    """Alice's SA has reqid 1, Carol's 2; the socket's policy had to leave the reqid open."""
    policies = (
        protect(replace(ESP, reqid=1), selector=from_peer(PEER)),
        protect(replace(ESP, reqid=2), selector=from_peer(OTHER), index=16),
    )
    made = mirror(*policies, sas=[esp(0x1001, reqid=1), esp(0x1002, source=OTHER, reqid=2)])
    assert objection(made, seen(0x1001), (ESP,)) == ""
    assert "another SA" in objection(made, seen(0x1001, peer=OTHER), (ESP,))
    assert objection(made, seen(0x1002, peer=OTHER), (ESP,)) == ""
    assert "another SA" in objection(made, seen(0x1001, generation=0), (ESP,))
    assert "another SA" in objection(made, seen(0x9999), (ESP,))
    assert "another SA" in objection(made, seen(0), (ESP,))
    made.apply(SADeleted(esp(0x1001).key), 2.0)
    assert objection(made, seen(0x1001), (ESP,)) == "", "it may have waited in the queue"
    # Another inbound SA of that number: nobody knows which it was.
    made.apply(SAAdded(ah(0x1001, reqid=1)), 3.0)
    assert "another SA" in objection(made, seen(0x1001), (ESP,))


def test_a_tunnel_s_gateway_is_compared() -> None:
    made = mirror(protect(TUNNEL), sas=[tunnel(0x1001), tunnel(0x1002)])
    any_gateway = replace(TUNNEL, source=b"")
    assert objection(made, seen(0x1001), (any_gateway,)) == ""
    other = replace(tunnel(0x1003), source=OTHER)
    made.apply(SAAdded(other), 2.0)
    assert "another SA" in objection(made, seen(0x1003), (any_gateway,))
    outbound = replace(tunnel(0x1001), source=GATE, destination=FAR, direction=Direction.OUT)
    made.apply(SAAdded(outbound), 2.0)
    assert objection(made, seen(0x1001), (any_gateway,)) == ""


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (replace(ESP, reqid=r, spi=s), replace(ESP, reqid=q, spi=t))
        for r, s, q, t in product((0, 1), repeat=4)
    ],
)
def test_implication_is_that_of_every_sa(ours: Template, theirs: Template) -> None:
    sas = [esp(spi, reqid=reqid) for spi, reqid in product((1, 2), (1, 2))]

    def meets(sa, t) -> bool:
        return t.reqid in (0, sa.reqid) and t.spi in (0, sa.spi)

    assert implies(ours, theirs) == all(meets(sa, theirs) for sa in sas if meets(sa, ours))


# Backends


def test_a_backend_tells_templates_and_forgets_them_when_policies_change() -> None:
    backend = MemoryBackend()
    assert backend.templates(UDP, PORT, Direction.IN) == ()
    policy = backend.add_policy(src="192.0.2.2", dst="192.0.2.1", reqid=5)
    assert backend.templates(UDP, PORT, Direction.IN) == ((replace(ESP, reqid=5),),)
    assert backend.templates(UDP, PORT, Direction.OUT) == ()
    assert backend.templates(UDP, PORT, Direction.IN, peer=OTHER) == ()
    backend.delete_policy(policy)
    assert backend.templates(UDP, PORT, Direction.IN) == ()
    assert backend.objection(seen(), (ESP,)) == ""


def test_in_memory_a_declared_sa_protects_without_a_policy() -> None:
    backend = MemoryBackend()
    backend.add_sa(src="192.0.2.2", dst="192.0.2.1", reqid=5)
    found = ((replace(ESP, reqid=5),),)
    assert backend.templates(TCP, 0, Direction.OUT, local=LOCAL, peer=PEER) == found
    assert backend.templates(TCP, 0, Direction.IN, peer=PEER) == found
    assert backend.templates(TCP, 0, Direction.OUT, local=LOCAL, peer=OTHER) == ()
    backend.add_sa(src="198.51.100.2", dst="198.51.100.1", mode="tunnel")
    assert backend.templates(TCP, 0, Direction.OUT, local=LOCAL, peer=OTHER)
    backend.flush_sas()
    backend.add_sa(src="192.0.2.2", dst="192.0.2.1", proto="comp")
    assert backend.templates(TCP, 0, Direction.OUT, local=LOCAL, peer=PEER) == ()


def test_templates_are_kept_while_policies_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = MemoryBackend()
    backend.add_policy()
    calls = []
    monkeypatch.setattr(
        "ipsec_aio.enforcement.governing", lambda *_, **__: calls.append(1) or ((ESP,),)
    )
    backend.templates(UDP, 1, Direction.IN)
    backend.add_sa(src="192.0.2.2", dst="192.0.2.1")
    TableBackend.templates(backend, UDP, 1, Direction.IN)
    assert len(calls) == 1
    for port in range(2, 1100):
        TableBackend.templates(backend, UDP, port, Direction.IN)
    assert len(backend._templates) <= 1024
    backend.mirror.apply(PolicyDeleted(next(iter(backend.mirror.spd)).key), 0.0)
    assert not calls.clear()
    TableBackend.templates(backend, UDP, 1099, Direction.IN)
    assert len(calls) == 1


def test_compressed_packets_and_marks_are_no_matter() -> None:
    made = mirror(protect(COMP, ESP), sas=[comp(0x1001), esp(0x1001)])
    assert objection(made, seen(0x1001), (ESP,)) == ""
    marked = protect(AH, mark=Mark(5, 0xFF))
    assert objection(mirror(marked), seen(mark=4), (ESP,)) == ""
    assert "another SA" in objection(mirror(marked), seen(mark=5), (ESP,))
    assert "marks" in objection(mirror(marked), seen(mark=None), (ESP,))
    by_interface = protect(AH, selector=Selector(family=2, ifindex=3))
    assert "interfaces" in objection(mirror(by_interface), seen(), (ESP,))
    bound = esp(0x1001, selector=Selector(ifindex=4))
    assert "interfaces" in objection(mirror(protect(ESP), sas=[bound]), seen(), (ESP,))
