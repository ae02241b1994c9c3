"""The latch's table, what it compares, and that only the table moves it."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ipsec_aio.enums import Direction, Mode, PolicyAction
from ipsec_aio.flow import Mark, Selector, pack_address
from ipsec_aio.identity import AuthenticationMethod, IdentityKind, IToken
from ipsec_aio.latch import (
    INDETERMINATE,
    TRANSITIONS,
    Channel,
    ConnectionLatch,
    Grade,
    Latch,
    LatchEvent,
    LatchParameters,
    LatchReason,
    LatchState,
    ListenerLatch,
    Outlook,
    Sighting,
    diagram,
)
from ipsec_aio.policy import Policy, Template
from ipsec_aio.sa import IPPROTO_AH, IPPROTO_COMP, IPPROTO_ESP, SA, Algorithm

DOCS = Path(__file__).parents[2] / "docs/latching.md"
ALICE, BOB, GATE = pack_address("192.0.2.1"), pack_address("192.0.2.2"), pack_address("192.0.2.9")
GCM = Algorithm("rfc4106(gcm(aes))", 160, 128)
GCM_256 = Algorithm("rfc4106(gcm(aes))", 288, 128)
GCM_SHORT = Algorithm("rfc4106(gcm(aes))", 160, 64)
CBC = Algorithm("cbc(aes)", 128)
SHA1, SHA256 = Algorithm("hmac(sha1)", 160, 96), Algorithm("hmac(sha256)", 256, 128)
ANN, EVE = IToken(IdentityKind.FQDN, "ann.example.org"), IToken(IdentityKind.FQDN, "eve.org")
PSK, GROUP = AuthenticationMethod.PRESHAREDKEY, AuthenticationMethod.GROUPKEY
PKIX = AuthenticationMethod.PKIX_INLINE

_spis = count(0x1001)


def sa(**changes) -> SA:
    """An SA from alice to bob."""
    facts = {
        "source": ALICE,
        "destination": BOB,
        "proto": IPPROTO_ESP,
        "spi": next(_spis),
        "reqid": 1,
        "aead": GCM,
        "replay_window": 32,
    }
    return SA(**{**facts, **changes})


def out(**changes) -> SA:
    """Its counterpart; senders have no replay window."""
    return sa(**{"source": BOB, "destination": ALICE, "replay_window": 0, **changes})


def see(*sas: SA, **facts) -> tuple[Sighting, ...]:
    return tuple(Sighting(one, **facts) for one in sas)


def demand(direction=Direction.IN, **template) -> Policy:
    return Policy(
        selector=Selector(), direction=direction, templates=(Template(**{"reqid": 1, **template}),)
    )


def latch(*sas: SA, options: Latch | None = None, kernel: bool = False, **outlook):
    """A latch on these SAs, and the outlook that it was born with."""
    outlook = Outlook(**{"inbound": see(*sas), **outlook})
    return ConnectionLatch(options or Latch(), sas, outlook, kernel=kernel)


def reason(made: ConnectionLatch, *sas: SA, **outlook) -> LatchReason | None:
    """What breaks the latch when things are like this."""
    made.observe(Outlook(**{"inbound": see(*sas), **outlook}), 0.0)
    assert (made.state is LatchState.BROKEN) == (made.reason is not None)
    return made.reason


TUNNELLED = (demand(mode=Mode.TUNNEL, reqid=0),)


# -- the table -------------------------------------------------------------------------------


def test_the_documents_show_the_table() -> None:
    text = DOCS.read_text()
    assert f"```mermaid\n{diagram()}\n```" in text, f"docs/latching.md should show:\n{diagram()}"


def test_the_documents_explain_every_reason() -> None:
    text = DOCS.read_text()
    assert [r for r in LatchReason if f"| `{r}` |" not in text] == []


def test_the_table_is_a_function_and_every_state_can_be_left_but_the_last() -> None:
    assert len({(t.source, t.event) for t in TRANSITIONS}) == len(TRANSITIONS)
    assert {t.event for t in TRANSITIONS} == set(LatchEvent)
    for state in LatchState:
        targets = {t.target for t in TRANSITIONS if t.source is state}
        assert (LatchState.CLOSED in targets) == (state is not LatchState.CLOSED)


def test_options() -> None:
    assert Latch.of(None) is None
    assert Latch.of(False) is None
    assert Latch.of(True) == Latch(on_break="reset")
    pausing = Latch(on_break="pause", timeout=3)
    assert Latch.of(pausing) is pausing
    with pytest.raises(TypeError, match="latch is"):
        Latch.of("pause")
    with pytest.raises(ValueError, match="on_break"):
        Latch(on_break="ignore")
    with pytest.raises(ValueError, match="positive"):
        Latch(timeout=0)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"timeout": "5"}, "timeout is a number"),
        ({"timeout": True}, "timeout is a number"),
        ({"like": {}}, "like is LatchParameters"),
        ({"like": LatchParameters(peer="a.example.org")}, r"peer is an IToken, as IToken\.named"),
        ({"like": LatchParameters(local=5)}, "local is an IToken"),
        ({"like": LatchParameters(mode="transport")}, r"ipsec_aio\.enums\.Mode, not 'transport'"),
        ({"like": LatchParameters(protocols=[50])}, "protocols is a tuple"),
        ({"like": LatchParameters(quality=[])}, "quality is a tuple"),
    ],
)
def test_what_would_be_like_nothing_is_refused(wrong: Any, told: str) -> None:
    with pytest.raises(TypeError, match=told):
        Latch(**wrong)


# -- birth -----------------------------------------------------------------------------------


def test_what_is_latched() -> None:
    made = latch(sa())
    assert made.state is LatchState.ESTABLISHED
    assert made.parameters == LatchParameters(
        protocols=(IPPROTO_ESP,),
        mode=Mode.TRANSPORT,
        quality=(Grade(IPPROTO_ESP, Mode.TRANSPORT, GCM, None, None, replay=True),),
    )
    assert made.status == (LatchState.ESTABLISHED, "user", made.parameters, None, 0)
    assert latch(sa(), kernel=True).status.held_by == "kernel"


def test_quality_is_indeterminate_where_any_of_several_carried_the_handshake() -> None:
    good, other = sa(), sa(aead=None, encryption=CBC, authentication=SHA256)
    made = latch(good, other)
    assert made.parameters.quality == INDETERMINATE
    assert reason(made, good) is None
    assert reason(made, other) is None
    assert reason(made, sa(aead=GCM_SHORT), other) is LatchReason.QUALITY


def test_both_of_a_bundle_are_latched() -> None:
    esp, ah = sa(), sa(proto=IPPROTO_AH, aead=None, authentication=SHA256, mode=Mode.TUNNEL)
    made = latch(esp, ah)
    assert made.parameters.protocols == (IPPROTO_ESP, IPPROTO_AH)
    assert made.parameters.mode is None
    assert reason(made, esp) is LatchReason.LOST
    assert reason(made, esp, ah) is None


@pytest.mark.parametrize(
    "nothing", [(), (sa(proto=IPPROTO_COMP, aead=None),)], ids=["none", "comp"]
)
def test_without_protection_there_is_nothing_to_latch(nothing) -> None:
    made = latch(*nothing)
    assert (made.state, made.reason) == (LatchState.CLOSED, LatchReason.LOST)
    assert not made.observe(Outlook(inbound=see(sa())), 1.0)
    assert not made.void()
    assert not made.advance(99.0)


def test_a_connection_is_not_latched_to_what_conflicts_at_once() -> None:
    one = sa()
    assert latch(one, inbound=see(one, sa(reqid=2))).reason is LatchReason.PEER
    assert latch(one, sure=False).reason is LatchReason.EVIDENCE


@pytest.mark.parametrize(
    ("like", "expected"),
    [
        (LatchParameters(), None),
        (LatchParameters(protocols=(IPPROTO_ESP,), mode=Mode.TRANSPORT), None),
        (LatchParameters(protocols=(IPPROTO_AH,)), LatchReason.QUALITY),
        (LatchParameters(mode=Mode.TUNNEL), LatchReason.QUALITY),
        (LatchParameters(quality=(Grade.of(sa()),)), None),
        (LatchParameters(quality=(Grade.of(sa(aead=GCM_256)),)), LatchReason.QUALITY),
        (LatchParameters(quality=INDETERMINATE), None),
        (LatchParameters(peer=ANN), None),
        (LatchParameters(peer=EVE), LatchReason.PEER),
        (LatchParameters(local=ANN), LatchReason.PEER),
    ],
)
def test_a_connection_must_be_like_what_is_demanded(like, expected) -> None:
    one = sa()
    made = latch(one, options=Latch(like=like), inbound=see(one, peer=ANN))
    assert made.reason is expected
    assert made.state is (LatchState.CLOSED if expected else LatchState.ESTABLISHED)


def test_a_connection_can_be_held_to_what_an_earlier_one_was() -> None:
    one = sa()
    earlier = latch(one, inbound=see(one, peer=ANN, local=EVE)).parameters
    again = Latch(like=earlier)
    assert latch(one, options=again, inbound=see(one, peer=ANN, local=EVE)).reason is None
    assert latch(one, options=again, inbound=see(one, peer=EVE, local=EVE)).reason
    assert latch(one, options=again, inbound=see(one, peer=ANN)).reason is LatchReason.PEER


def test_a_listener_begets_latches_and_does_not_outlive_its_close() -> None:
    listener = ListenerLatch(Latch(like=LatchParameters(mode=Mode.TRANSPORT)))
    assert listener.state is LatchState.LISTENER
    one, tunnel = sa(), sa(mode=Mode.TUNNEL)
    child = listener.admit([one], Outlook(inbound=see(one)))
    assert child.state is LatchState.ESTABLISHED
    refused = listener.admit([tunnel], Outlook(inbound=see(tunnel)))
    assert (refused.state, refused.reason) == (LatchState.CLOSED, LatchReason.QUALITY)
    assert listener.state is LatchState.LISTENER
    listener.release()
    listener.release()
    assert listener.state is LatchState.CLOSED
    assert child.state is LatchState.ESTABLISHED
    with pytest.raises(RuntimeError, match="closed"):
        listener.admit([one], Outlook(inbound=see(one)))


# -- rekeys ----------------------------------------------------------------------------------


def test_a_thousand_equivalent_rekeys_keep_it() -> None:
    old = sa()
    made = latch(old)
    for _ in range(1000):
        new = sa()
        assert not made.observe(Outlook(inbound=see(old, new), outbound=see(out())), 1.0)
        assert not made.observe(Outlook(inbound=see(new), outbound=see(out())), 1.0)
        old = new
    assert made.status[2:] == (made.parameters, None, 0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"aead": GCM_256}, None),
        ({"aead": GCM_SHORT}, LatchReason.QUALITY),
        ({"aead": None, "encryption": CBC, "authentication": SHA256}, LatchReason.QUALITY),
        ({"aead": None}, LatchReason.QUALITY),
        ({"authentication": SHA256}, None),
        ({"replay_window": 0}, LatchReason.QUALITY),
        ({"replay_window": 64}, None),
        ({"reqid": 2}, LatchReason.PEER),
        ({"if_id": 7}, LatchReason.PEER),
        ({"mark": Mark(5, 0xFF)}, LatchReason.PEER),
        ({"source": bytes(4)}, LatchReason.PEER),
    ],
    ids=str,
)
def test_a_rekey_beside_the_old_one(changes, expected) -> None:
    old = sa()
    made = latch(old)
    new = replace(old, spi=next(_spis), **changes)
    assert reason(made, old, new) is expected
    assert reason(made, old) is None, "the conflict is gone"
    assert made.breaks == (expected is not None)


@pytest.mark.parametrize(
    ("weaker", "expected"),
    [
        ({"authentication": SHA1}, LatchReason.QUALITY),
        ({"encryption": Algorithm("cbc(aes)", 256)}, None),
        ({"encryption": Algorithm("ecb(cipher_null)")}, LatchReason.QUALITY),
        ({"encryption": None}, LatchReason.QUALITY),
    ],
    ids=str,
)
def test_separate_algorithms_are_compared_each(weaker, expected) -> None:
    suite = {"aead": None, "encryption": CBC, "authentication": SHA256}
    old = sa(**suite)
    assert reason(latch(old), sa(**{**suite, **weaker})) is expected


def test_what_is_sent_may_not_be_weaker_either() -> None:
    old = sa()
    made = latch(old, outbound=see(out()))
    assert reason(made, old, outbound=see(out(aead=GCM_SHORT))) is LatchReason.QUALITY
    assert reason(made, old) is None, "no outbound SA: the kernel asks for one"
    # Without a policy nothing but the channel's own SAs matters outwards.
    assert reason(made, old, outbound=see(out(reqid=2, aead=GCM_SHORT))) is None
    policies = (demand(Direction.OUT), demand(Direction.OUT, reqid=2, optional=True))
    made = latch(old, policies_out=(demand(Direction.OUT),))
    assert reason(made, old, outbound=see(out(reqid=2)), policies_out=policies[:1]) is None
    unsure = Policy(selector=Selector(), templates=tuple(t for p in policies for t in p.templates))
    foreign = see(out(reqid=2))
    assert reason(made, old, outbound=foreign, policies_out=(unsure,)) is LatchReason.PEER


def test_interfaces_that_hide_things_break_it() -> None:
    old = sa()
    assert latch(old, opaque=True).reason is LatchReason.EVIDENCE
    made = latch(old, kernel=True)
    assert reason(made, old, opaque=True) is LatchReason.EVIDENCE
    assert reason(made, old) is None


def test_loss_and_restore() -> None:
    old = sa()
    made = latch(old, options=Latch(on_break="pause"))
    assert reason(made) is LatchReason.LOST
    assert made.breaks == 1
    assert made.next_deadline() is None
    assert not made.observe(Outlook(sure=False), 5.0), "nothing is known during a resync"
    assert made.state is LatchState.BROKEN
    assert reason(made, sa()) is None
    assert made.state is LatchState.ESTABLISHED
    assert not made.observe(Outlook(sure=False), 5.0)
    assert made.state is LatchState.ESTABLISHED


def test_the_gravest_reason_is_told() -> None:
    made = latch(sa(), policies_in=(demand(),))
    assert reason(made) is LatchReason.POLICY
    assert reason(made, sa(aead=GCM_SHORT)) is LatchReason.QUALITY
    assert reason(made, sa(aead=GCM_SHORT), policies_in=(demand(reqid=0),)) is LatchReason.QUALITY
    assert reason(made, sa(reqid=3), policies_in=(demand(reqid=0),)) is LatchReason.PEER


def test_a_break_that_lasts_too_long_closes_it() -> None:
    made = latch(sa(), options=Latch(on_break="pause", timeout=30.0))
    assert made.next_deadline() is None
    made.observe(Outlook(), 100.0)
    made.observe(Outlook(inbound=see(sa(reqid=2))), 110.0)
    assert made.reason is LatchReason.PEER
    assert made.next_deadline() == 130.0
    assert not made.advance(129.9)
    assert made.advance(130.0)
    assert (made.state, made.reason) == (LatchState.CLOSED, LatchReason.TIMEOUT)
    assert made.next_deadline() is None


def test_lost_evidence_and_release_are_final() -> None:
    made = latch(old := sa())
    assert made.void()
    assert not made.void()
    assert (made.state, made.reason) == (LatchState.CLOSED, LatchReason.EVIDENCE)
    assert not made.observe(Outlook(inbound=see(old)), 1.0)
    made = latch(old, options=Latch(timeout=1.0))
    made.observe(Outlook(), 1.0)
    made.release()
    assert made.state is LatchState.CLOSED
    assert made.next_deadline() is None


# -- what the kernel lets in -----------------------------------------------------------------


def test_where_the_kernel_holds_it_other_channels_cannot_carry_it() -> None:
    old = sa()
    made = latch(old, kernel=True)
    assert reason(made, old, sa(reqid=2)) is None
    assert reason(made, sa(reqid=2)) is LatchReason.LOST
    assert reason(made, old, sa(source=GATE, reqid=2)) is None
    # No kernel compares where a packet without a tunnel came from with its SA's source.
    assert reason(made, old, sa(source=GATE)) is LatchReason.PEER
    assert reason(made, old, sa(aead=GCM_SHORT)) is LatchReason.QUALITY


def test_policies_tell_which_sas_may_carry_it() -> None:
    old, other = sa(), sa(reqid=2)
    made = latch(old, policies_in=(demand(),))
    assert reason(made, old, other, policies_in=(demand(),)) is None
    assert reason(made, old, other, policies_in=(demand(reqid=0),)) is LatchReason.PEER
    assert reason(made, old, other, policies_in=(demand(reqid=2),)) is LatchReason.PEER
    assert reason(made, old, policies_in=(demand(reqid=2),)) is LatchReason.POLICY


def test_tunnels_of_other_gateways_need_a_policy_to_carry_it() -> None:
    old = sa(mode=Mode.TUNNEL)
    other = sa(mode=Mode.TUNNEL, source=GATE)
    assert reason(latch(old), old, other) is None
    assert reason(latch(old, kernel=True), old, other) is None
    tight = (demand(mode=Mode.TUNNEL, source=ALICE, reqid=0),)
    loose = (demand(mode=Mode.TUNNEL, source=bytes(4), reqid=0),)
    assert reason(latch(old, policies_in=tight), old, other, policies_in=tight) is None
    assert reason(latch(old, policies_in=loose), old, other, policies_in=loose) is LatchReason.PEER


@pytest.mark.parametrize("way", ["in", "out"])
@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({}, None),
        ({"reqid": 2}, LatchReason.POLICY),
        ({"proto": IPPROTO_AH}, LatchReason.POLICY),
        ({"mode": Mode.TUNNEL}, LatchReason.POLICY),
        (None, LatchReason.POLICY),
        (PolicyAction.BLOCK, LatchReason.POLICY),
        ("default", LatchReason.POLICY),
    ],
    ids=str,
)
def test_a_change_of_policy(way, policy, expected) -> None:
    direction = Direction.IN if way == "in" else Direction.OUT
    old = sa()
    before = {f"policies_{way}": (demand(direction),)}
    made = latch(old, **before)
    if policy is None:
        after = {}
    elif policy == "default":
        after = {**before, f"blocked_{way}": True}
    elif isinstance(policy, dict):
        after = {f"policies_{way}": (demand(direction, **policy),)}
    else:
        after = {f"policies_{way}": (Policy(selector=Selector(), action=policy),)}
    assert reason(made, old, **after) is expected
    assert reason(made, old, **before) is None


def test_outer_addresses_of_an_outbound_policy() -> None:
    old = sa(mode=Mode.TUNNEL)
    made = latch(old)
    for right in ({}, {"source": BOB}, {"destination": ALICE}, {"source": BOB, "reqid": 1}):
        policy = demand(Direction.OUT, mode=Mode.TUNNEL, **right)
        assert reason(made, old, policies_out=(policy,)) is None
    for wrong in ({"source": GATE}, {"destination": GATE}, {"reqid": 0}):
        policy = demand(Direction.OUT, mode=Mode.TUNNEL, **wrong)
        assert reason(made, old, policies_out=(policy,)) is LatchReason.POLICY


def test_policies_that_say_nothing_of_protection() -> None:
    old = sa()
    plain = Policy(selector=Selector())
    compress = Policy(
        selector=Selector(),
        templates=(Template(proto=IPPROTO_COMP), Template(reqid=9, optional=True)),
    )
    made = latch(old)
    assert reason(made, old, policies_in=(plain, compress)) is None
    assert reason(made, old, policies_in=(demand(), plain)) is None
    made = latch(old, policies_in=(demand(),))
    assert reason(made, old, policies_in=(demand(), plain)) is LatchReason.POLICY, "may be first"


# -- identities ------------------------------------------------------------------------------


def test_an_identity_is_latched_once_and_then_demanded() -> None:
    old, new = sa(), sa()
    made = latch(old, inbound=see(old, pending=True))
    assert made.parameters.peer is None
    assert not made.waiting, "nothing is demanded of it yet"
    assert reason(made, inbound=see(old, peer=ANN, local=EVE)) is None
    assert (made.parameters.peer, made.parameters.local) == (ANN, EVE)
    assert reason(made, inbound=(*see(old, peer=ANN), *see(new, pending=True))) is None
    assert made.waiting
    assert reason(made, inbound=(*see(old, peer=ANN), *see(new, peer=ANN))) is None
    assert not made.waiting
    assert reason(made, inbound=see(old, new)) is None, "who told us is gone, what it told stands"
    assert reason(made, inbound=see(old, new, sa())) is LatchReason.PEER, "nobody knows whose"
    assert reason(made, inbound=see(old, peer=ANN, local=ANN)) is LatchReason.PEER
    assert reason(made, inbound=see(new, peer=EVE)) is LatchReason.PEER
    assert reason(made, inbound=see(sa(reqid=2), peer=ANN)) is None, "it is she, under another id"


@pytest.mark.parametrize("kernel", [False, True])
def test_a_known_peer_may_move(kernel) -> None:
    old = sa(mode=Mode.TUNNEL)
    made = latch(old, kernel=kernel, inbound=see(old, peer=ANN), policies_in=TUNNELLED)
    new = sa(mode=Mode.TUNNEL, source=GATE, reqid=2)
    both = (*see(old, peer=ANN), *see(new, peer=ANN))
    assert reason(made, inbound=both, policies_in=TUNNELLED) is None
    assert made.channels == (Channel.of(old),)
    assert reason(made, inbound=see(new, peer=EVE), policies_in=TUNNELLED)
    fresh = sa(mode=Mode.TUNNEL, source=GATE, reqid=2)
    awaited = reason(made, inbound=see(fresh, pending=True), policies_in=TUNNELLED)
    assert awaited is (LatchReason.LOST if kernel else None)
    assert made.waiting is not kernel
    weak = replace(new, aead=GCM_SHORT)
    assert reason(made, inbound=see(weak, peer=ANN), policies_in=TUNNELLED)
    assert made.channels == (Channel.of(old),)
    assert reason(made, inbound=see(new, peer=ANN), policies_in=TUNNELLED) is None
    assert made.channels == (Channel.of(new),)
    third = sa(mode=Mode.TUNNEL, source=GATE, reqid=3)
    fourth = sa(mode=Mode.TUNNEL, source=GATE, reqid=4)
    reason(made, inbound=see(third, fourth, peer=ANN), policies_in=TUNNELLED)
    assert made.channels == (Channel.of(new),), "which of them is not known"


def test_an_unknown_peer_may_not_move() -> None:
    made = latch(sa(mode=Mode.TUNNEL), kernel=True)
    assert reason(made, sa(mode=Mode.TUNNEL, source=GATE)) is LatchReason.LOST


def test_a_key_that_is_used_again_is_another_sa() -> None:
    old = sa()
    made = latch(old, inbound=see(old, peer=ANN, born=1.0))
    assert reason(made, inbound=see(old, born=1.0)) is None
    assert reason(made, inbound=see(old, born=2.0)) is LatchReason.PEER


def test_only_what_the_connection_came_with_tells_whose_it_is() -> None:
    old, new = sa(), sa()
    made = latch(old)
    assert reason(made, inbound=see(new, peer=EVE)) is None
    assert made.parameters.peer is None
    both = (*see(old, peer=ANN), *see(new, peer=EVE))
    assert reason(made, inbound=both) is LatchReason.PEER, "they contradict each other"
    assert made.parameters.peer is None
    assert reason(made, inbound=see(old, peer=ANN)) is None
    assert made.parameters.peer == ANN


def test_identities_outwards() -> None:
    old = sa()
    made = latch(old, inbound=see(old, peer=ANN))
    mine = see(old, peer=ANN)
    assert reason(made, inbound=mine, outbound=see(out())) is None, "the source tells no outbound"
    assert reason(made, inbound=mine, outbound=see(out(), peer=ANN)) is None
    assert reason(made, inbound=mine, outbound=see(out(), peer=EVE)) is LatchReason.PEER


def ann(method=None, ca="CN=CA", key=b"first") -> IToken:
    """Ann, as she proved it."""
    certificate = {}
    if method is PKIX:
        certificate = {"certificate_authority_dn": ca, "pub_key_id": key}
    return IToken(ANN.kind, ANN.value, authentication_method=method, **certificate)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        # Up before the program started, and authenticated anew; loaded anew, and authenticated.
        (ann(), ann(PSK), None),
        (ann(PSK), ann(), None),
        (ann(), ann(PKIX), None),
        (ann(PKIX), ann(), None),
        # Renewed.
        (ann(PKIX), ann(PKIX, key=b"second"), None),
        (ann(PKIX), ann(PKIX, ca="CN=Other"), LatchReason.PEER),
        (ann(PKIX), ann(PSK), LatchReason.PEER),
        (ann(PKIX), ann(GROUP), LatchReason.PEER),
        (ann(PKIX), ann(AuthenticationMethod.BTNS), LatchReason.PEER),
        (ann(PKIX), ann(AuthenticationMethod.NONE), LatchReason.PEER),
        (ann(), ann(GROUP), LatchReason.PEER),
        (ann(GROUP), ann(GROUP), None),
    ],
)
def test_a_peer_that_authenticates_anew(before, after, expected) -> None:
    old, new = sa(), sa()
    made = latch(old, inbound=see(old, peer=before, local=EVE))
    both = (*see(old, peer=before, local=EVE), *see(new, peer=after, local=EVE))
    assert reason(made, inbound=both) is expected
    assert reason(made, inbound=see(new, peer=after, local=EVE)) is expected
    assert reason(
        made, inbound=see(new, peer=after, local=EVE), outbound=see(out(), peer=after)
    ) is (expected)
    latched = made.parameters.peer
    assert latched == (before if expected else before.completed(after))
    assert reason(made, inbound=see(old, peer=before, local=EVE)) is None


def test_how_it_was_proved_is_latched_once() -> None:
    old, new = sa(), sa()
    made = latch(old, inbound=see(old, peer=ann()))
    contrary = (*see(new, peer=ann(PSK)), *see(sa(), peer=ann(PKIX)))
    assert reason(made, inbound=contrary) is None
    assert made.parameters.peer == ann(), "which of them is not known"
    assert reason(made, inbound=see(new, peer=ann(PSK))) is None
    assert made.parameters.peer == ann(PSK)
    assert reason(made, inbound=see(sa(), peer=ann())) is None
    assert made.parameters.peer == ann(PSK)
    assert reason(made, inbound=see(sa(), peer=ann(PKIX))) is LatchReason.PEER


def test_several_that_the_connection_may_have_come_with() -> None:
    one, two = sa(), sa()
    made = latch(one, two, inbound=(*see(one, peer=ann()), *see(two, peer=ann(PSK))))
    assert made.parameters.peer == ann(PSK)
    for other in (EVE, ann(GROUP)):
        both = (*see(one, peer=ann()), *see(two, peer=other))
        assert latch(one, two, inbound=both).reason is LatchReason.PEER
        assert latch(one, two, inbound=both[::-1]).reason is LatchReason.PEER
    made = latch(one, two, inbound=(*see(one, peer=ann()), *see(two, pending=True)))
    assert made.parameters.peer is None


@pytest.mark.parametrize(
    ("wanted", "shown", "expected"),
    [
        (ann(), ann(PSK), None),
        (ann(PSK), ann(PSK), None),
        (ann(PSK), ann(), LatchReason.PEER),
        (ann(PKIX), ann(PKIX, key=b"second"), None),
        (ann(PKIX), ann(PKIX, ca="CN=Other"), LatchReason.PEER),
        (ann(), ann(GROUP), LatchReason.PEER),
    ],
)
def test_who_is_demanded_must_be_shown_with_all_that_is_demanded(wanted, shown, expected) -> None:
    one = sa()
    options = Latch(like=LatchParameters(peer=wanted))
    assert latch(one, options=options, inbound=see(one, peer=shown)).reason is expected
    made = latch(one, options=options, inbound=see(one, pending=True))
    assert made.waiting
    assert reason(made, inbound=see(one, peer=shown)) is expected
    if expected is None:
        # Once it was, it is enough that nothing speaks against it.
        assert reason(made, inbound=see(sa(), peer=ann())) is None


def test_a_peer_that_moved_may_have_authenticated_anew() -> None:
    old = sa(mode=Mode.TUNNEL)
    made = latch(old, inbound=see(old, peer=ann()), policies_in=TUNNELLED)
    new = sa(mode=Mode.TUNNEL, source=GATE, reqid=2)
    assert reason(made, inbound=see(new, peer=ann(GROUP)), policies_in=TUNNELLED)
    assert made.channels == (Channel.of(old),)
    assert reason(made, inbound=see(new, peer=ann(PSK)), policies_in=TUNNELLED) is None
    assert made.channels == (Channel.of(new),)


def test_an_sa_of_two_unknown_ends_under_a_demand_for_this_end() -> None:
    one = sa()
    made = latch(
        one, options=Latch(like=LatchParameters(local=ANN)), inbound=see(one, pending=True)
    )
    assert made.state is LatchState.ESTABLISHED
    assert made.waiting
    assert reason(made, inbound=see(one, local=ANN)) is None
    assert not made.waiting
    assert reason(made, inbound=see(one, local=EVE)) is LatchReason.PEER


def test_channels() -> None:
    channel = Channel.of(sa())
    assert channel.carries(sa(), inbound=True)
    assert channel.carries(out(mark=Mark(1, 1)), inbound=False)
    assert not channel.carries(sa(), inbound=False)
    assert not channel.carries(out(), inbound=True)


# -- the machine -----------------------------------------------------------------------------

KINDS = st.sampled_from(["good", "strong", "weak", "foreign"])
CONFLICTS = {
    "weak": {"aead": GCM_SHORT},
    "foreign": {"reqid": 2},
    "strong": {"aead": GCM_256},
    "good": {},
}


class Life(RuleBasedStateMachine):
    """SAs of four kinds come and go in any order; a simple count says what must be."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        first = sa()
        self.sas: list[tuple[str, SA]] = [("good", first)]
        self.demanded = True
        self.sure = True
        self.kernel = False
        self.latch = latch(
            first, options=Latch(on_break="pause", timeout=10.0), policies_in=(demand(reqid=0),)
        )
        self.closed = False
        self.before = self.latch.state
        self.broken_at: float | None = None

    def look(self) -> None:
        self.now += 1.0
        moved = self.latch.observe(
            Outlook(
                inbound=see(*(one for _, one in self.sas)),
                policies_in=(demand(reqid=0),) if self.demanded else (),
                sure=self.sure,
            ),
            self.now,
        )
        assert moved == (self.latch.state is not self.before)
        if self.closed:
            assert not moved
        elif self.sure:
            kinds = [kind for kind, _ in self.sas]
            good = (
                "weak" not in kinds
                and (self.kernel or "foreign" not in kinds)
                and bool({"good", "strong"} & {*kinds})
                and self.demanded
            )
            assert (self.latch.state is LatchState.ESTABLISHED) == good
            assert (self.latch.reason is None) == good
        self.check()

    def check(self) -> None:
        after = self.latch.state
        if after is LatchState.BROKEN and self.broken_at is None:
            self.broken_at = self.now
        elif after is not LatchState.BROKEN:
            self.broken_at = None
        if after is not self.before:
            assert any((t.source, t.target) == (self.before, after) for t in TRANSITIONS)
        self.before = after

    @rule(kind=KINDS)
    def add(self, kind) -> None:
        self.sas.append((kind, sa(**CONFLICTS[kind])))
        self.look()

    @rule(kind=KINDS)
    def add_unseen(self, kind) -> None:
        self.sas.append((kind, sa(**CONFLICTS[kind])))

    @precondition(lambda self: self.sas)
    @rule(data=st.data())
    def delete(self, data) -> None:
        self.sas.remove(data.draw(st.sampled_from(self.sas)))
        self.look()

    @rule(kept=KINDS)
    def flush(self, kept) -> None:
        self.sas = [one for one in self.sas if one[0] == kept]
        self.look()

    @rule()
    def change_policy(self) -> None:
        self.demanded = not self.demanded
        self.look()

    @rule()
    def resync(self) -> None:
        self.sure = not self.sure
        self.look()

    @rule()
    def change_who_holds_it(self) -> None:
        self.kernel = self.latch.kernel = not self.kernel
        self.look()

    @rule(seconds=st.floats(0, 20))
    def wait(self, seconds) -> None:
        self.now += seconds
        late = self.broken_at is not None and self.now - self.broken_at >= 10.0
        assert self.latch.advance(self.now) == late
        self.closed = self.closed or late
        self.check()

    @precondition(lambda self: not self.closed)
    @rule(how=st.sampled_from(["void", "release"]))
    def end(self, how) -> None:
        getattr(self.latch, how)()
        self.closed = True
        self.check()

    @invariant()
    def closed_is_closed(self) -> None:
        assert (self.latch.state is LatchState.CLOSED) == self.closed
        assert (self.latch.next_deadline() is None) == (self.broken_at is None)


TestLife = Life.TestCase

METHODS = st.sampled_from([None, PSK, PKIX, GROUP])


class Names(RuleBasedStateMachine):
    """SAs of one channel come and go, of Ann and of Eve, proved in several ways."""

    def __init__(self) -> None:
        super().__init__()
        first = sa()
        self.sas = [(first, ANN)]
        self.method = None
        self.latch = latch(first, inbound=see(first, peer=ANN))

    def conflicts(self, token: IToken) -> bool:
        method = token.authentication_method
        if token.value != ANN.value:
            return True
        return method is GROUP or (None not in (method, self.method) and method is not self.method)

    def look(self) -> None:
        seen = tuple(Sighting(one, 0.0, None, token) for one, token in self.sas)
        self.latch.observe(Outlook(inbound=seen), 0.0)
        good = bool(self.sas) and not any(self.conflicts(token) for _, token in self.sas)
        assert (self.latch.state is LatchState.ESTABLISHED) == good
        if good and self.method is None:
            methods = {token.authentication_method for _, token in self.sas} - {None}
            self.method = methods.pop() if len(methods) == 1 else None
        assert self.latch.parameters.peer.authentication_method is self.method

    @rule(method=METHODS, key=st.sampled_from([b"first", b"second"]))
    def authenticate(self, method, key) -> None:
        self.sas.append((sa(), ann(method, key=key)))
        self.look()

    @rule()
    def be_eve(self) -> None:
        self.sas.append((sa(), EVE))
        self.look()

    @precondition(lambda self: self.sas)
    @rule(data=st.data())
    def delete(self, data) -> None:
        self.sas.remove(data.draw(st.sampled_from(self.sas)))
        self.look()

    @precondition(lambda self: len(self.sas) > 1)
    @rule()
    def retire(self) -> None:
        del self.sas[:-1]
        self.look()


TestNames = Names.TestCase

ALGORITHMS = st.sampled_from([None, GCM, GCM_256, GCM_SHORT, CBC, SHA1, SHA256])
GRADES = st.builds(
    Grade,
    st.sampled_from([IPPROTO_ESP, IPPROTO_AH]),
    st.sampled_from([Mode.TRANSPORT, Mode.TUNNEL]),
    ALGORITHMS,
    ALGORITHMS,
    ALGORITHMS,
    st.booleans(),
)


@given(GRADES, GRADES, GRADES)
def test_grades_are_ordered_in_part(a: Grade, b: Grade, c: Grade) -> None:
    assert a.serves(a)
    if a.serves(b) and b.serves(a):
        assert a == b
    if a.serves(b) and b.serves(c):
        assert a.serves(c)
