"""What a socket's own policy proves."""

from __future__ import annotations

import pytest
from sas import CBC, FAR, GATE, LOCAL, OTHER, PEER, ah, esp, larval, null, seen, tunnel
from test_truth import Bench

from ipsec_aio.enums import Assurance, Direction, Mode
from ipsec_aio.flow import Mark, Selector
from ipsec_aio.mirror import TOMBSTONE_SECONDS
from ipsec_aio.policy import Template
from ipsec_aio.sa import IPPROTO_AH

ANY = Template()


def tied(spi, source=PEER, **fields):
    """An SA whose selector admits its own peer alone, as charon's in transport mode do."""
    selector = Selector(source=source, source_prefix=32, family=2)
    return esp(spi, source, selector=selector, **fields)


def under(bench, template=ANY, **fields):
    fields = {"generation": 0, "mark": None} | fields
    return bench.judge(seen(enforced=template, **fields))


def test_it_proves_what_all_sas_that_satisfy_it_do():
    verdict = under(Bench(esp()))
    assert verdict.assurance is Assurance.ENFORCED
    assert verdict.protection.privacy is True
    assert verdict.protection.integrity is True
    assert verdict.protection.tunnel is False


def test_without_any_sa_it_proves_no_property():
    verdict = under(Bench())
    assert verdict.assurance is Assurance.ENFORCED
    assert verdict.protection.integrity is None
    assert verdict.protection.privacy is None


@pytest.mark.parametrize(
    "weak",
    [
        null(0x1002),
        null(0x1002, OTHER),
        null(0x1002, bytes(4)),
    ],
)
def test_the_weakest_counts_whoever_s_it_is(weak):
    assert under(Bench(esp(), weak)).protection.privacy is False


@pytest.mark.parametrize(
    ("other", "template"),
    [
        (tied(0x1002, OTHER, encryption=CBC), ANY),
        (null(0x1002, reqid=2), Template(reqid=1)),
        (ah(0x1002), ANY),
        (tunnel(0x1002, encryption=CBC), ANY),
        (null(0x1002, destination=OTHER), ANY),
        (larval(0x1002), ANY),
        (null(0x1002, direction=Direction.OUT), ANY),
        (null(0x1002, set_mark=Mark(5, 0xFFFFFFFF)), ANY),
    ],
)
def test_what_cannot_have_carried_it_does_not_count(other, template):
    alone = under(Bench(esp(reqid=1)), template, mark=7)
    assert alone.protection.privacy is True
    assert under(Bench(esp(reqid=1), other), template, mark=7) == alone


def test_a_removed_one_counts_while_packets_may_wait():
    weak = null(0x1002)
    bench = Bench(esp(), weak)
    bench.remove(weak)
    assert under(bench).protection.privacy is False
    bench.wait(TOMBSTONE_SECONDS)
    assert under(bench).protection.privacy is True


def test_one_s_own_sas_to_others_do_not_count():
    bench = Bench(tunnel())
    bench.table.is_own = {FAR, LOCAL}.__contains__
    template = Template(mode=Mode.TUNNEL)
    assert under(bench, template).protection.integrity is None
    bench.table.is_own = {GATE, LOCAL}.__contains__
    assert under(bench, template).protection.integrity is True


def test_nat_between_own_addresses_does_not_hide_one():
    bench = Bench(esp(), null(0x1002, destination=OTHER))
    bench.table.is_own = {LOCAL, OTHER}.__contains__
    assert under(bench).protection.privacy is False


def test_interfaces_that_hide_security_paths_spoil_it():
    bench = Bench(esp())
    bench.table.opaque_interfaces = True
    assert under(bench).assurance is Assurance.UNKNOWN


def test_doubt_spoils_it():
    assert under(Bench(esp()), doubt="cut off").assurance is Assurance.UNKNOWN


@pytest.mark.parametrize("template", [Template(optional=True), Template(proto=108)])
def test_a_template_that_demands_no_protection_is_none(template):
    assert under(Bench(), template).assurance is Assurance.NONE


def test_the_stamp_comes_first():
    bench = Bench(esp(), null(0x1002))
    verdict = bench.judge(seen(0x1001, enforced=ANY))
    assert (verdict.assurance, verdict.protection.privacy) == (Assurance.EXACT, True)


def test_such_a_conclusion_is_drawn_anew_after_an_addition():
    bench = Bench(esp())
    under(bench)
    epoch = bench.mirror.epoch
    bench.tell(esp(0x1002))
    assert bench.mirror.epoch != epoch


def test_ports_belong_to_the_channel_where_a_selector_names_them():
    selector = Selector(destination_port=5000, destination_port_mask=0xFFFF)
    assert under(Bench(esp(selector=selector))).ports == (17, 5000, 0)


def test_of_ah_the_template_is_met_by_ah():
    assert under(Bench(ah()), Template(proto=IPPROTO_AH)).protection.integrity is True
