"""Who else could write the mark after the stamp, or move a packet: chains that are not ours.

Rules:

* Only hook input at the stamp's priority or later counts: earlier marks are overwritten, and
  nothing but input lies between the stamp and a socket. netdev ingress is earlier.
* What is not known to leave marks alone is taken for a writer: ``meta mark set``, extensions like
  MARK, CONNMARK, TPROXY and HMARK, queues (user space may give a verdict with a mark), and any
  expression that this list does not know.
* What writes into a packet counts as well: a rule that changes the port moves a packet that the
  stamp left alone, mark and all, to a port that is served.
* What looks at the mark of packets that leave sees the SPI on those of accepted connections.
  Whether that matters only its owner can say: it is shown, and nothing else comes of it.
* A chain that can be jumped to is judged with the base chains of its table, reached or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ipsec_aio.errors import CodecError

from .nfnetlink import Message, cells, named, nft, number, schema, text
from .stamp_rules import HOOK_INPUT, INPUT_PRIORITY, TABLE

__all__ = [
    "ForeignTable",
    "is_late",
    "is_leaving",
    "own_table",
    "readers",
    "tables_with",
    "writers",
]

_FAMILIES = {1: "inet", 2: "ip", 10: "ip6"}
_Expression, _Hook = nft.nft_contains_expr.nft_expr, nft.nft_chain_msg.hook
_Data = nft.nft_data.nfta_data
_MARK = nft.Meta.NFT_META_MARK
_NF_QUEUE = 3
_HOOKS_OUT = (3, 4)
_REWRITING = ("payload", "exthdr")

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
class ForeignTable:
    """A table that is not the stamp's."""

    family: int
    name: str

    def __str__(self) -> str:
        return f"{_FAMILIES[self.family]} {self.name}"


def own_table(message: Message) -> bool:
    """Say whether an object or event is of the stamp's own table."""
    return message.family == 1 and message.table == TABLE


def is_late(chain: Message) -> bool:
    """Say whether a chain is a foreign base chain after the stamp."""
    place, priority = _place(chain)
    return place == HOOK_INPUT and priority >= INPUT_PRIORITY


def is_leaving(chain: Message) -> bool:
    """Say whether a chain is a foreign base chain that sees what this host sends."""
    return _place(chain)[0] in _HOOKS_OUT


def _place(chain: Message) -> tuple[int, int]:
    """Return hook and priority of a foreign base chain, else a hook that is none."""
    hook = chain.attributes.get("NFTA_CHAIN_HOOK")
    if hook is None or chain.family not in _FAMILIES or own_table(chain):
        return -1, 0
    values = named(_Hook, hook)
    priority = int.from_bytes(values.get("NFTA_HOOK_PRIORITY", b"\0"), "big", signed=True)
    return number(values.get("NFTA_HOOK_HOOKNUM"), HOOK_INPUT), priority


def tables_with(
    which: Callable[[Message], bool], chains: Iterable[Message]
) -> frozenset[ForeignTable]:
    """Return the tables that have a chain of a kind."""
    return frozenset(ForeignTable(chain.family, chain.table) for chain in chains if which(chain))


def writers(chains: Iterable[Message], rules: Iterable[Message]) -> tuple[str, ...]:
    """Name the rules after the stamp that could write mark or packet, in the kernel's order."""
    return _suspects(chains, rules, is_late, _writes)


def readers(chains: Iterable[Message], rules: Iterable[Message]) -> tuple[str, ...]:
    """Name the rules that look at the mark of what this host sends, in the kernel's order."""
    return _suspects(chains, rules, is_leaving, _reads)


_Judge = Callable[[str, bytes], str]


def _suspects(
    chains: Iterable[Message],
    rules: Iterable[Message],
    which: Callable[[Message], bool],
    judge: _Judge,
) -> tuple[str, ...]:
    chains = list(chains)
    tables = tables_with(which, chains)
    elsewhere = {
        _chain_of(chain, "NFTA_CHAIN_NAME")
        for chain in chains
        if "NFTA_CHAIN_HOOK" in chain.attributes and not which(chain)
    }
    found: list[str] = []
    for rule in rules:
        table, chain = where = _chain_of(rule, "NFTA_RULE_CHAIN")
        if table not in tables or where in elsewhere:
            continue
        if reason := _judged(rule.attributes.get("NFTA_RULE_EXPRESSIONS", b""), judge):
            handle = number(rule.attributes.get("NFTA_RULE_HANDLE"))
            found.append(f"table {table} chain {chain} rule handle {handle}: {reason}")
    return tuple(found)


def _chain_of(message: Message, name: str) -> tuple[ForeignTable, str]:
    return ForeignTable(message.family, message.table), text(message.attributes.get(name))


def _judged(expressions: bytes, judge: _Judge) -> str:
    try:
        for cell in cells(expressions):
            parts = named(_Expression, cell)
            name = text(parts.get("NFTA_EXPR_NAME"))
            if reason := judge(name, parts.get("NFTA_EXPR_DATA", b"")):
                return reason
    except CodecError:
        return "a rule that cannot be read"
    return ""


def _reads(name: str, data: bytes) -> str:
    if name not in ("meta", "match"):
        return ""
    values = named(schema(name), data)
    if name == "match":
        return "looks at the mark" if text(values.get("NFTA_MATCH_NAME")) == "mark" else ""
    key = number(values.get("NFTA_META_KEY"), _MARK)
    return "looks at the mark" if "NFTA_META_DREG" in values and key == _MARK else ""


def _writes(name: str, data: bytes) -> str:
    if name in _HARMLESS:
        return ""
    values = named(schema(name), data)
    if name == "meta":
        key = number(values.get("NFTA_META_KEY"), _MARK)
        return "sets the mark" if "NFTA_META_SREG" in values and key == _MARK else ""
    if name in _REWRITING:
        return "rewrites packets" if f"NFTA_{name}_SREG".upper() in values else ""
    if name == "immediate":
        value = named(_Data, values.get("NFTA_IMMEDIATE_DATA", b""))
        verdict = named(_Data.verdict, value.get("NFTA_DATA_VERDICT", b""))
        code = number(verdict.get("NFTA_VERDICT_CODE"))
        return "queues to user space" if code & 0xFF == _NF_QUEUE and code < 1 << 31 else ""
    if name == "target":
        target = text(values.get("NFTA_TARGET_NAME"))
        return "" if target in _HARMLESS_TARGETS else f"target {target or '?'}"
    return f"expression {name or '?'}"
