"""Whose rules could write the mark after the stamp."""

from __future__ import annotations

import pytest

from ipsec_aio.kernel.nfnetlink import (
    Attributes,
    Expression,
    Message,
    Request,
    data,
    expression,
    nft,
    sent,
    verdict,
)
from ipsec_aio.kernel.stamp_foreign import (
    ForeignTable,
    is_late,
    is_leaving,
    own_table,
    readers,
    tables_with,
    writers,
)
from ipsec_aio.kernel.stamp_rules import CHAINS, INPUT_PRIORITY

INET, IP, NETDEV = 1, 2, 5
MARK = 3


def message(kind: int, table: str, attributes: Attributes, family: int = INET) -> Message:
    return Message(kind, family, 7, table, sent(Request(kind, attributes)))


def chain(
    name: str = "c",
    hook: int | None = 1,
    priority: int = INPUT_PRIORITY,
    table: str = "t",
    family: int = INET,
) -> Message:
    attributes: list[tuple[str, object]] = [("NFTA_CHAIN_NAME", name)]
    if hook is not None:
        place = [("NFTA_HOOK_HOOKNUM", hook), ("NFTA_HOOK_PRIORITY", priority)]
        attributes.append(("NFTA_CHAIN_HOOK", {"attrs": place}))
    return message(nft.NFT_MSG_NEWCHAIN, table, attributes, family)


def rule(*expressions: Expression, name: str = "c") -> Message:
    attributes = [
        ("NFTA_RULE_CHAIN", name),
        ("NFTA_RULE_HANDLE", 9),
        ("NFTA_RULE_EXPRESSIONS", expressions),
    ]
    return message(nft.NFT_MSG_NEWRULE, "t", attributes)


def queue(number: int) -> Expression:
    """A verdict of iptables' NFQUEUE."""
    return verdict(3 | number << 16)


def bare(name: str) -> Expression:
    """An expression without data."""
    return {"attrs": [("NFTA_EXPR_NAME", name)]}


SETS = expression("meta", key=MARK, sreg=1)


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
    assert bool(tables_with(is_late, [found])) is late


def test_our_own_table_is_of_family_inet() -> None:
    assert own_table(chain(table="ipsec_aio"))
    assert not own_table(chain(table="ipsec_aio", family=IP))
    assert str(ForeignTable(10, "x")) == "ip6 x"


@pytest.mark.parametrize(
    ("expressions", "reason"),
    [
        ([SETS], "sets the mark"),
        ([expression("meta", sreg=1)], "sets the mark"),
        ([expression("meta", key=MARK, dreg=1)], ""),
        ([expression("meta", key=2, sreg=1)], ""),
        ([bare("counter"), SETS], "sets the mark"),
        ([expression("ct", key=MARK, sreg=1)], ""),
        ([expression("ct", key=MARK, dreg=1), SETS], "sets"),
        ([expression("payload", sreg=1, base=2, offset=2, len=2)], "rewrites packets"),
        ([expression("payload", dreg=1, base=2, offset=2, len=2)], ""),
        ([expression("exthdr", sreg=1, type=2, offset=2, len=2, op=1)], "rewrites packets"),
        ([expression("exthdr", dreg=1, type=2, offset=2, len=2, op=1)], ""),
        ([verdict(0)], ""),
        ([verdict(1)], ""),
        ([verdict(-3)], ""),
        ([verdict(-5)], ""),
        ([queue(0)], "queues to user space"),
        ([queue(5)], "queues to user space"),
        ([expression("immediate", dreg=1, data=data(bytes((0, 0, 0, 5))))], ""),
        ([bare("queue")], "expression queue"),
        ([expression("target", name="MARK")], "target MARK"),
        ([expression("target", name="CONNMARK")], "target CONNMARK"),
        ([expression("target", name="TPROXY")], "target TPROXY"),
        ([expression("target", name="NEWER")], "target NEWER"),
        ([bare("target")], "target ?"),
        ([expression("target", name="LOG")], ""),
        ([expression("match", name="connmark")], ""),
        ([bare("something_new")], "expression something_new"),
        ([{"attrs": []}], "expression ?"),
        ([], ""),
    ],
)
def test_what_writes_the_mark(expressions: list[Expression], reason: str) -> None:
    found = writers([chain()], [rule(*expressions)])
    assert len(found) == bool(reason)
    for text_ in found:
        assert text_.startswith("table inet t chain c rule handle 9: ")
        assert reason in text_


@pytest.mark.parametrize("body", [b"\x01", b"\x03\x00\x01\x00", b"\x40\x00\x01\x00"])
def test_a_rule_that_cannot_be_read_counts_as_a_writer(body: bytes) -> None:
    told = {"NFTA_RULE_CHAIN": b"c\0", "NFTA_RULE_EXPRESSIONS": body}
    broken = Message(nft.NFT_MSG_NEWRULE, INET, 7, "t", told)
    assert "cannot be read" in writers([chain()], [broken])[0]


def test_chains_that_can_be_jumped_to_count_and_other_hooks_do_not() -> None:
    chains = [chain(), chain("jumped", hook=None), chain("out", hook=3), chain("soon", priority=0)]
    for name, counts in (("c", True), ("jumped", True), ("out", False), ("soon", False)):
        assert bool(writers(chains, [rule(SETS, name=name)])) is counts
    assert not writers([], [rule(SETS)])


def test_our_own_rules_would_be_seen() -> None:
    meant = next(
        rule for rule in CHAINS["input"].rules if rule.purpose == "clear the mark"
    ).expressions
    assert writers([chain()], [rule(*meant)])


READS = expression("meta", key=MARK, dreg=1)


@pytest.mark.parametrize(
    ("found", "seen"),
    [
        (chain(hook=3, priority=0), True),
        (chain(hook=4, priority=-150, family=IP), True),
        (chain(hook=2), False),
        (chain(hook=1), False),
        (chain(hook=None), False),
        (chain(hook=3, family=NETDEV), False),
        (chain(hook=3, table="ipsec_aio"), False),
    ],
)
def test_which_chains_see_what_leaves(found: Message, seen: bool) -> None:
    assert is_leaving(found) is seen


@pytest.mark.parametrize(
    ("expressions", "reads"),
    [
        ([READS], True),
        ([bare("counter"), expression("meta", dreg=1)], True),
        ([expression("match", name="mark")], True),
        ([expression("match", name="connmark")], False),
        ([expression("meta", key=2, dreg=1)], False),
        ([SETS], False),
        ([verdict(1)], False),
        ([], False),
    ],
)
def test_what_looks_at_the_mark(expressions: list[Expression], reads: bool) -> None:
    found = readers([chain(hook=4)], [rule(*expressions)])
    assert found == (("table inet t chain c rule handle 9: looks at the mark",) if reads else ())
    assert not readers([chain()], [rule(*expressions)])
