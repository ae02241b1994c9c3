"""Whose rules could write the mark after the stamp."""

from __future__ import annotations

import pytest

from ipsec_aio.kernel import nfnetlink as nft
from ipsec_aio.kernel.nfnetlink import Attributes, Message, be32, encode, parse, text
from ipsec_aio.kernel.stamp_foreign import LateTable, is_late, late_tables, own_table, writers
from ipsec_aio.kernel.stamp_rules import CHAINS, INPUT_PRIORITY

INET, IP, NETDEV = 1, 2, 5
LATE = LateTable(INET, "t")


def message(kind: int, attributes: Attributes, family: int = INET) -> Message:
    return Message(kind, family, 7, dict(parse(encode(attributes))))


def chain(
    name: str = "c",
    hook: int | None = 1,
    priority: int = INPUT_PRIORITY,
    table: str = "t",
    family: int = INET,
) -> Message:
    attributes: Attributes = ((1, text(table)), (3, text(name)))
    if hook is not None:
        attributes += ((4, ((1, be32(hook)), (2, be32(priority)))),)
    return message(nft.NEWCHAIN, attributes, family)


def rule(*expressions: tuple[str, Attributes], name: str = "c") -> Message:
    listed: Attributes = tuple((1, ((1, text(kind)), (2, data))) for kind, data in expressions)
    return message(
        nft.NEWRULE, ((1, text("t")), (2, text(name)), (3, (9).to_bytes(8, "big")), (4, listed))
    )


def verdict(code: int) -> Attributes:
    return (1, be32(0)), (2, ((2, ((1, be32(code)),)),))


@pytest.mark.parametrize(
    ("found", "late"),
    [
        (chain(), True),
        (chain(priority=INPUT_PRIORITY + 1), True),
        (chain(priority=INPUT_PRIORITY - 1), False),
        (chain(priority=-150), False),
        (chain(hook=0), False),
        (chain(hook=None), False),
        (chain(family=IP), True),
        (chain(family=10), True),
        (chain(family=NETDEV), False),
        (chain(table="ipsec_aio"), False),
        (chain(table="ipsec_aio", family=IP), True),
    ],
)
def test_which_chains_come_after_the_stamp(found: Message, late: bool) -> None:
    assert is_late(found) is late
    assert bool(late_tables([found])) is late


def test_our_own_table_is_of_family_inet() -> None:
    assert own_table(chain(table="ipsec_aio"))
    assert not own_table(chain(table="ipsec_aio", family=IP))
    assert str(LateTable(10, "x")) == "ip6 x"


@pytest.mark.parametrize(
    ("expressions", "reason"),
    [
        ([("meta", ((2, be32(3)), (3, be32(1))))], "sets the mark"),
        ([("meta", ((3, be32(1)),))], "sets the mark"),
        ([("meta", ((2, be32(3)), (1, be32(1))))], ""),
        ([("meta", ((2, be32(2)), (3, be32(1))))], ""),
        ([("counter", ()), ("meta", ((2, be32(3)), (3, be32(1))))], "sets the mark"),
        ([("ct", ((2, be32(3)), (4, be32(1))))], ""),
        ([("ct", ((2, be32(3)), (1, be32(1)))), ("meta", ((2, be32(3)), (3, be32(1))))], "sets"),
        ([("immediate", verdict(0))], ""),
        ([("immediate", verdict(1))], ""),
        ([("immediate", verdict(-3))], ""),
        ([("immediate", verdict(-5))], ""),
        ([("immediate", verdict(3))], "queues to user space"),
        ([("immediate", verdict(3 | 5 << 16))], "queues to user space"),
        ([("immediate", ((1, be32(1)), (2, ((1, be32(5)),))))], ""),
        ([("queue", ())], "expression queue"),
        ([("target", ((1, text("MARK")),))], "target MARK"),
        ([("target", ((1, text("CONNMARK")),))], "target CONNMARK"),
        ([("target", ((1, text("TPROXY")),))], "target TPROXY"),
        ([("target", ((1, text("NEWER")),))], "target NEWER"),
        ([("target", ())], "target ?"),
        ([("target", ((1, text("LOG")),))], ""),
        ([("match", ((1, text("connmark")),))], ""),
        ([("something_new", ())], "expression something_new"),
        ([], ""),
    ],
)
def test_what_writes_the_mark(expressions: list[tuple[str, Attributes]], reason: str) -> None:
    found = writers([chain()], [rule(*expressions)], frozenset([LATE]))
    assert len(found) == bool(reason)
    for text_ in found:
        assert text_.startswith("table inet t chain c rule handle 9: ")
        assert reason in text_


@pytest.mark.parametrize("body", [b"\x01", b"\x03\x00\x01\x00", b"\x40\x00\x01\x00"])
def test_a_rule_that_cannot_be_read_counts_as_a_writer(body: bytes) -> None:
    broken = Message(nft.NEWRULE, INET, 7, {1: text("t"), 2: text("c"), 4: body})
    assert "cannot be read" in writers([chain()], [broken], frozenset([LATE]))[0]


def test_chains_that_can_be_jumped_to_count_and_other_hooks_do_not() -> None:
    sets = ("meta", ((2, be32(3)), (3, be32(1))))
    chains = [chain(), chain("jumped", hook=None), chain("out", hook=3), chain("soon", priority=0)]
    late = late_tables(chains)
    for name, counts in (("c", True), ("jumped", True), ("out", False), ("soon", False)):
        assert bool(writers(chains, [rule(sets, name=name)], late)) is counts
    assert not writers([], [rule(sets)], frozenset())


def test_our_own_rules_would_be_seen() -> None:
    meant = next(
        rule for rule in CHAINS["input"].rules if rule.purpose == "clear the mark"
    ).expressions
    found = message(nft.NEWRULE, ((1, text("t")), (2, text("c")), (4, meant)))
    assert writers([chain()], [found], frozenset([LATE]))
