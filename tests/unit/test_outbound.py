"""Whether a reply would be protected as what it answers was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import test_ike as ike
from sas import (
    CBC,
    FAR,
    GATE,
    LOCAL,
    OTHER,
    PEER,
    SHA,
    ah,
    esp,
    larval,
    null,
    protect,
    seen,
    tunnel,
)
from test_tokens import Bench

from ipsec_aio.enums import Direction, Mode, PolicyAction
from ipsec_aio.events import DefaultActions, PolicyAdded, SADeleted
from ipsec_aio.evidence import IPPROTO_UDP
from ipsec_aio.flow import Flow, Mark, Selector
from ipsec_aio.identities import Awaited, Identities
from ipsec_aio.identity import IdentityKind, IToken
from ipsec_aio.join import Join
from ipsec_aio.outbound import objection
from ipsec_aio.policy import Template
from ipsec_aio.sa import IPPROTO_AH, IPPROTO_COMP

FLOW = Flow(LOCAL, PEER, IPPROTO_UDP, 5000, 40000)
UDP = Selector(
    source=LOCAL, source_prefix=32, destination=PEER, destination_prefix=32, proto=17, family=2
)
MOON = IToken(IdentityKind.FQDN, "moon.example.org")
SUN = IToken(IdentityKind.FQDN, "sun.example.org")


def out(*templates, **fields):
    return protect(*templates, direction=Direction.OUT, index=fields.pop("index", 9), **fields)


def reply(spi=0x2001, **fields):
    """The SA of the other direction."""
    return esp(spi, LOCAL, PEER, **fields)


def bench(*facts, **options):
    """SAs and policies, and a peer whose SA is 0x1001."""
    made = Bench(**options)
    for fact in facts:
        made.add(fact) if hasattr(fact, "spi") else made.mirror.apply(PolicyAdded(fact), 0)
    made.now += 10
    return made


def ask(made, ptoken=None, flow=FLOW, assumed=()):
    ptoken = made.resolve(0x1001) if ptoken is None else ptoken
    return objection(made.resolver, ptoken, flow, assumed)


GOOD = (esp(), reply(), out())


def test_a_reply_under_the_same_protection_goes_out():
    assert ask(bench(*GOOD)) == ""
    assert ask(bench(esp(reqid=5), reply(reqid=5), out(Template(reqid=5), selector=UDP))) == ""
    assert ask(bench(null(), null(0x2001, LOCAL, PEER), out())) == ""
    ah_out = out(Template(proto=IPPROTO_AH))
    assert ask(bench(ah(), ah(0x2001, LOCAL, PEER), ah_out)) == ""


def test_what_is_demanded_besides_does_no_harm():
    more = out(Template(proto=IPPROTO_COMP, optional=True), Template(), Template(proto=IPPROTO_AH))
    assert ask(bench(esp(), reply(), more)) == ""


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ((esp(), reply()), "no policy demands protection"),
        ((esp(), reply(), protect()), "no policy demands protection"),
        ((esp(), reply(), out(selector=Selector(proto=6, family=2))), "no policy demands"),
        ((esp(), reply(), out(Template(optional=True))), "does not demand protection of what"),
        (
            (esp(), reply(), out(), replace(out(), templates=(), priority=5, selector=UDP)),
            "does not demand protection of what",
        ),
        (
            (esp(), reply(), out(), replace(out(), templates=(), selector=UDP, index=17)),
            "does not demand protection of what",
        ),
        ((esp(), reply(), out(action=PolicyAction.BLOCK)), "a policy blocks what is sent"),
        ((esp(), reply(), out(mark=Mark(1, 1))), "look at marks"),
        ((esp(), reply(), out(selector=Selector(ifindex=3))), "look at marks or interfaces"),
        ((esp(), reply(), out(Template(proto=IPPROTO_AH))), "does not demand esp/transport"),
        ((esp(), reply(), out(Template(mode=Mode.TUNNEL))), "does not demand esp/transport"),
        (
            (esp(), reply(), out(Template(optional=True), Template(proto=IPPROTO_AH))),
            "does not demand esp/transport",
        ),
        ((esp(reqid=1), reply(reqid=2), out(Template(reqid=2))), "does not demand esp"),
        # No SA that the kernel would take.
        ((esp(), out()), "there is no SA to send under"),
        ((esp(), reply(direction=Direction.IN), out()), "there is no SA"),
        ((esp(), reply(reqid=7), out()), "there is no SA"),
        ((esp(), reply(if_id=7), out()), "there is no SA"),
        ((esp(), reply(mark=Mark(1, 1)), out()), "there is no SA"),
        ((esp(), reply(selector=Selector(proto=6)), out()), "there is no SA"),
        ((esp(), reply(), out(Template(spi=0x3001))), "there is no SA"),
        ((esp(), esp(0x2001, LOCAL, OTHER), out()), "there is no SA"),
        ((esp(), larval(0x2001, source=LOCAL, destination=PEER), out()), "there is no SA"),
        ((esp(), reply(mode=Mode.TUNNEL), out()), "there is no SA"),
        # One that it might take.
        ((esp(), reply(encryption=CBC, authentication=SHA), out()), "might be sent under esp"),
        ((esp(), reply(), null(0x2002, LOCAL, PEER), out()), "might be sent under esp"),
        ((esp(), null(0x2002, bytes(4), PEER), reply(), out()), "might be sent under esp"),
        ((esp(), reply(), reply(0x2002, encryption=CBC), out()), "might be sent under esp"),
    ],
)
def test_any_other_does_not(facts, reason):
    assert reason in ask(bench(*facts))


def test_the_reqid_of_an_sa_counts_where_the_template_leaves_it_open():
    """The kernel compares it anyway."""
    assert "does not demand" not in ask(bench(esp(reqid=1), reply(reqid=1), out()))
    assert "there is no SA" in ask(bench(esp(reqid=1), reply(reqid=1), out()))
    assert "might be sent under" in ask(bench(esp(reqid=1), reply(), out()))


# Tunnels

TUNNELLED = Template(mode=Mode.TUNNEL, source=GATE, destination=FAR)


def back(spi=0x2001, source=GATE, destination=FAR, **fields):
    return esp(spi, source, destination, mode=Mode.TUNNEL, **fields)


@pytest.mark.parametrize("template", [TUNNELLED, Template(mode=Mode.TUNNEL)])
def test_a_tunnel_leads_back_to_the_same_gateway(template):
    made = bench(tunnel(direction=Direction.IN), back(), out(template))
    assert ask(made) == ""


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ((back(destination=OTHER), out(Template(mode=Mode.TUNNEL))), "to another gateway"),
        ((back(source=OTHER), out(Template(mode=Mode.TUNNEL))), "to another gateway"),
        ((back(destination=OTHER), out(TUNNELLED)), "there is no SA"),
        ((back(source=OTHER), out(TUNNELLED)), "there is no SA"),
        ((reply(), out()), "does not demand"),
    ],
)
def test_a_tunnel_to_somewhere_else_does_not(facts, reason):
    assert reason in ask(bench(tunnel(direction=Direction.IN), *facts))


def test_an_inbound_tunnel_is_told_by_its_end():
    """Kernels before 6.10 do not tell the direction."""
    made = bench(tunnel(), back(), out(Template(mode=Mode.TUNNEL)))
    assert "another gateway" in ask(made)
    made.resolver.is_own = lambda address: address == GATE
    assert ask(made) == ""


# The token


def test_the_token_is_of_these_ends():
    made = bench(*GOOD)
    for changed in ({"destination": OTHER}, {"source": OTHER}, {"source": b""}):
        assert "other addresses" in ask(made, flow=replace(FLOW, **changed))


def test_ports_count_where_selectors_name_them():
    ported = Selector(destination_port=5000, destination_port_mask=0xFFFF)
    made = bench(esp(selector=ported), reply(), out())
    assert ask(made) == ""
    assert "other ports" in ask(made, flow=replace(FLOW, source_port=5001))
    assert "other ports" in ask(made, flow=replace(FLOW, proto=6))
    assert ask(made, flow=replace(FLOW, destination_port=40001)) == ""
    ported = Selector(source_port=40000, source_port_mask=0xFFFF)
    made = bench(esp(selector=ported), reply(), out())
    assert "other ports" in ask(made, flow=replace(FLOW, destination_port=40001))


@pytest.mark.parametrize(
    ("spi", "fields"),
    [(0, {}), (0x9999, {}), (0x1001, {"doubt": "x"}), (0, {"generation": 0, "mark": None})],
)
def test_a_token_that_is_not_protected_pins_nothing(spi, fields):
    made = bench(*GOOD)
    assert "the token is not protected" in ask(made, made.resolve(spi, **fields))


def test_another_backend_s_token_is_no_good():
    assert "another backend" in ask(bench(*GOOD), bench(*GOOD).resolve(0x1001))


def test_the_tables_must_be_sure():
    made = bench(*GOOD)
    ptoken = made.resolve(0x1001)
    made.mirror.begin_resync(0)
    assert "events were lost" in ask(made, ptoken)
    made = bench(*GOOD)
    ptoken = made.resolve(0x1001)
    made.resolver.close()
    assert "closed" in ask(made, ptoken)


def test_nothing_is_applied_to_what_stays_here():
    made = bench(*GOOD)
    made.resolver.is_own = lambda address: address in (PEER, LOCAL)
    assert "sends to itself" in ask(made)


def test_the_default_may_be_to_block():
    made = bench(esp(), reply())
    block, allow = PolicyAction.BLOCK, PolicyAction.ALLOW
    made.mirror.apply(DefaultActions(allow, allow, block), 0)
    assert "no policy lets out" in ask(made)


def test_what_is_assumed_stands_in_for_no_policy():
    assumed = [(Template(),)]
    assert ask(bench(esp(), reply()), assumed=assumed) == ""
    assert "no SA" in ask(bench(esp()), assumed=assumed)
    lax = bench(esp(), reply(), out(Template(optional=True)))
    assert "does not demand" in ask(lax, assumed=assumed)


def test_all_policies_that_may_be_the_first_must_agree():
    one, other = out(selector=Selector(family=2)), out(Template(reqid=3), selector=UDP, index=17)
    assert "there is no SA" in ask(bench(esp(), reply(), one, other))
    assert ask(bench(esp(), reply(), reply(0x2002, reqid=3), one, other)) == ""


def test_a_rekey_is_seen_at_once():
    made = bench(*GOOD)
    ptoken = made.resolve(0x1001)
    assert ask(made, ptoken) == ""
    epoch = made.mirror.epoch
    made.add(null(0x2002, LOCAL, PEER))
    assert made.mirror.epoch != epoch
    assert "might be sent" in ask(made, ptoken)
    made.mirror.apply(SADeleted(null(0x2002, LOCAL, PEER).key), made.now)
    assert ask(made, ptoken) == ""


# Identities


def identified(made, **ends):
    def identify(record, now, direction=Direction.IN):
        assert direction is (Direction.OUT if record.sa.source == LOCAL else Direction.IN)
        return ends.get(f"spi_{record.sa.spi:x}", Identities())

    made.resolver.identify = identify
    made.resolver.identified = True
    return made


MUTUAL = Identities(SUN, MOON)


def test_it_goes_to_the_one_whom_the_token_names():
    made = identified(bench(*GOOD), spi_1001=MUTUAL, spi_2001=MUTUAL)
    assert made.resolve(0x1001).peer == MOON
    assert ask(made) == ""


@pytest.mark.parametrize(
    ("ends", "reason"),
    [
        (Identities(SUN, SUN), "an SA of <IToken FQDN 'sun.example.org'>, not of"),
        (Identities(MOON, MOON), "an SA of <IToken FQDN 'moon.example.org'>, not of"),
        (Identities(), "an SA of somebody unknown"),
        (Identities(SUN, None), "an SA of somebody unknown"),
        (Awaited(1e9), "an SA of somebody unknown"),
    ],
)
def test_and_to_nobody_else(ends, reason):
    made = identified(bench(*GOOD), spi_1001=MUTUAL, spi_2001=ends)
    assert reason in ask(made)


def test_charon_s_word_on_both_sas_of_a_child():
    made = Bench()
    table = ike.synced()
    join = Join(made.mirror, table, lambda each: Identities(None, IToken.named(each.peer_id)))
    made.resolver.identify, made.resolver.identified = join.identities_of, True
    ends = {"local_host": b"192.0.2.1", "remote_host": b"192.0.2.2"}

    def key(number, *, of):
        made.add(esp(0x1000 + number, reqid=7))
        made.add(reply(0x2000 + number, reqid=7))
        made.now += 0.01
        told = ike.up(ike.ike(of, **ends), ike.child(number, reqid=7))
        table.apply("child-updown", told, made.now)

    made.mirror.apply(PolicyAdded(out(Template(reqid=7))), made.now)
    key(1, of=1)
    ptoken = made.resolve(0x1001)
    assert str(ptoken.peer) == "peer1"
    assert ask(made, ptoken) == ""
    key(2, of=1)
    assert ask(made, ptoken) == "", "he rekeyed"
    key(3, of=2)
    assert "an SA of <IToken FQDN 'peer2'>, not of" in ask(made, ptoken), "of the same address"
    assert "an SA of <IToken FQDN 'peer1'>, not of" in ask(made, made.resolve(0x1003))


def test_a_token_that_names_nobody_asks_for_nobody():
    assert ask(identified(bench(*GOOD), spi_2001=MUTUAL)) == ""
    made = identified(bench(*GOOD), spi_1001=Awaited(1e9), spi_2001=MUTUAL)
    assert made.resolve(0x1001).pending
    assert ask(made) == ""


def test_a_token_that_names_no_sa_of_its_addresses_pins_nothing():
    """A socket's policy lets in whoever has an SA, whatever source he writes."""
    made = bench(esp(0x1002, OTHER), null(0x2001, LOCAL, PEER), protect(), out())
    token = made.resolver.resolve(seen(enforced=Template(), generation=0, mark=None))
    assert token.protected
    assert "is not known" in ask(made, token)
    made.add(esp())
    made.now += 10
    token = made.resolver.resolve(seen(enforced=Template(), generation=0, mark=None))
    assert "might be sent under" in ask(made, token)


def test_nested_tokens_ask_for_every_group():
    made = bench(
        esp(),
        ah(0x1002),
        protect(Template(), Template(proto=IPPROTO_AH)),
        reply(),
        out(),
        trust_policy=True,
    )
    ptoken = made.resolver.resolve(seen(generation=0, mark=None))
    assert ptoken.protected
    assert "does not demand ah" in ask(made, ptoken)
