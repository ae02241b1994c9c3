"""Who else could write the mark after the stamp: chains that are not ours.

Rules:

* Only hook input at the stamp's priority or later counts: earlier marks are overwritten, and
  nothing but input lies between the stamp and a socket. netdev ingress is earlier.
* What is not known to leave marks alone is taken for a writer: ``meta mark set``, extensions like
  MARK, CONNMARK, TPROXY and HMARK, queues (user space may give a verdict with a mark), and any
  expression that this list does not know.
* A chain that can be jumped to is judged with the base chains of its table, reached or not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ipsec_aio.errors import CodecError

from .nfnetlink import Message, number, parse, unpack_text
from .stamp_rules import HOOK_INPUT, INPUT_PRIORITY, TABLE

__all__ = ["LateTable", "is_late", "late_tables", "own_table", "writers"]

_FAMILIES = {1: "inet", 2: "ip", 10: "ip6"}
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK = 1, 3, 4
_RULE_TABLE, _RULE_CHAIN, _RULE_HANDLE, _RULE_EXPRESSIONS = 1, 2, 3, 4
_META_KEY, _META_SREG, _MARK = 2, 3, 3
_NF_QUEUE = 3

_HARMLESS = frozenset(
    (
        "bitwise",
        "byteorder",
        "cmp",
        "connlimit",
        "counter",
        "ct",
        "dup",
        "dynset",
        "exthdr",
        "fib",
        "flow_offload",
        "fwd",
        "hash",
        "last",
        "limit",
        "log",
        "lookup",
        "masq",
        "match",
        "nat",
        "notrack",
        "numgen",
        "objref",
        "osf",
        "payload",
        "quota",
        "range",
        "redir",
        "reject",
        "rt",
        "socket",
        "synproxy",
        "tproxy",
        "tunnel",
        "xfrm",
    )
)
_HARMLESS_TARGETS = frozenset(
    (
        "AUDIT",
        "CLASSIFY",
        "CT",
        "DSCP",
        "ECN",
        "HL",
        "LED",
        "LOG",
        "NFLOG",
        "NOTRACK",
        "REJECT",
        "SECMARK",
        "TCPMSS",
        "TCPOPTSTRIP",
        "TOS",
        "TRACE",
        "TTL",
    )
)


@dataclass(frozen=True, slots=True)
class LateTable:
    """A foreign table with a base chain at input, at the stamp's priority or later."""

    family: int
    name: str

    def __str__(self) -> str:
        return f"{_FAMILIES[self.family]} {self.name}"


def own_table(message: Message) -> bool:
    """Say whether an object or event is of the stamp's own table."""
    return message.family == 1 and unpack_text(message.attributes.get(1)) == TABLE


def is_late(chain: Message) -> bool:
    """Say whether a chain is a foreign base chain after the stamp."""
    hook = chain.attributes.get(_CHAIN_HOOK)
    if hook is None or chain.family not in _FAMILIES or own_table(chain):
        return False
    values = dict(parse(hook))
    priority = int.from_bytes(values.get(2, b"\0"), "big", signed=True)
    return number(values.get(1), HOOK_INPUT) == HOOK_INPUT and priority >= INPUT_PRIORITY


def late_tables(chains: Iterable[Message]) -> frozenset[LateTable]:
    """Return the tables that have something to say after the stamp."""
    return frozenset(
        LateTable(chain.family, unpack_text(chain.attributes.get(_CHAIN_TABLE)))
        for chain in chains
        if is_late(chain)
    )


def writers(
    chains: Iterable[Message], rules: Iterable[Message], late: frozenset[LateTable]
) -> tuple[str, ...]:
    """Name the rules in late tables that could write the mark, in the kernel's order."""
    elsewhere = {
        _chain_of(chain, _CHAIN_TABLE, _CHAIN_NAME)
        for chain in chains
        if _CHAIN_HOOK in chain.attributes and not is_late(chain)
    }
    found: list[str] = []
    for rule in rules:
        table, chain = where = _chain_of(rule, _RULE_TABLE, _RULE_CHAIN)
        if table not in late or where in elsewhere:
            continue
        if reason := _writes(rule.attributes.get(_RULE_EXPRESSIONS, b"")):
            handle = number(rule.attributes.get(_RULE_HANDLE))
            found.append(f"table {table} chain {chain} rule handle {handle}: {reason}")
    return tuple(found)


def _chain_of(message: Message, table: int, chain: int) -> tuple[LateTable, str]:
    attributes = message.attributes
    return (
        LateTable(message.family, unpack_text(attributes.get(table))),
        unpack_text(attributes.get(chain)),
    )


def _writes(expressions: bytes) -> str:
    try:
        for _, element in parse(expressions):
            parts = dict(parse(element))
            data = parts.get(2, b"")
            if reason := _judge(unpack_text(parts.get(1)), data):
                return reason
    except CodecError:
        return "a rule that cannot be read"
    return ""


def _judge(name: str, data: bytes) -> str:
    if name in _HARMLESS:
        return ""
    values = dict(parse(data))
    if name == "meta":
        writes = _META_SREG in values and number(values.get(_META_KEY), _MARK) == _MARK
        return "sets the mark" if writes else ""
    if name == "immediate":
        verdict = dict(parse(dict(parse(values.get(2, b""))).get(2, b"")))
        queued = number(verdict.get(1)) & 0xFF == _NF_QUEUE and number(verdict.get(1)) < 1 << 31
        return "queues to user space" if queued else ""
    if name == "target":
        target = unpack_text(values.get(1))
        return "" if target in _HARMLESS_TARGETS else f"target {target or '?'}"
    return f"expression {name or '?'}"
