"""How clauses are combined: a tree whose leaves are clauses, decided by Kleene's logic.

Rules:

* None is nothing that can be hoped for: a tree is met where the answer is True, and the negation
  of what cannot be told cannot be told.
* What a tree *demands* is what holds of every token that meets it, in whatever way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from .clauses import Clause, all_of, any_of
from .enums import Mode

if TYPE_CHECKING:
    from .tokens import PToken

__all__ = [
    "MAX_DEPTH",
    "Demands",
    "Either",
    "Every",
    "Node",
    "Not",
    "check_depth",
    "demands",
    "join",
    "negate",
    "refusal",
]

MAX_DEPTH = 32
"""How deep requirements may be nested."""


@dataclass(frozen=True, slots=True)
class Demands:
    """What holds of every token that meets a requirement, as far as a policy can enforce it.

    ``integrity`` is demanded wherever anything else is. ``mode`` is a Mode, ``protocol``
    IPPROTO_ESP or IPPROTO_AH, each None where more than one will do.
    """

    encrypted: bool = False
    integrity: bool = False
    mode: Mode | None = None
    protocol: int | None = None


_NOTHING = Demands()
# Of these nothing follows for what IPsec did.
_UNDEMANDING = frozenset({"assurance"})


@dataclass(frozen=True, slots=True)
class Not:
    """A negation."""

    node: Clause | Every | Either

    def decide(self, ptoken: PToken) -> bool | None:
        """Return the answer."""
        answer = self.node.decide(ptoken)
        return None if answer is None else not answer


@dataclass(frozen=True, slots=True)
class Every:
    """A conjunction of two or more, which are compared as a set."""

    nodes: tuple[Clause | Not | Either, ...] = field(compare=False)
    _compared: frozenset[Node] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_compared", frozenset(self.nodes))

    def decide(self, ptoken: PToken) -> bool | None:
        """Return the answer."""
        return all_of(node.decide(ptoken) for node in self.nodes)


@dataclass(frozen=True, slots=True)
class Either:
    """A disjunction of two or more, which are compared as a set."""

    nodes: tuple[Clause | Not | Every, ...] = field(compare=False)
    _compared: frozenset[Node] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_compared", frozenset(self.nodes))

    def decide(self, ptoken: PToken) -> bool | None:
        """Return the answer."""
        return any_of(node.decide(ptoken) for node in self.nodes)


Node: TypeAlias = Clause | Not | Every | Either


def join(kind: type[Every] | type[Either], nodes: Iterable[Node]) -> Node:
    """Combine nodes; those of the same kind are taken apart, and each counts once."""
    flat: dict[Node, None] = {}
    for node in nodes:
        flat.update(dict.fromkeys(node.nodes if isinstance(node, kind) else (node,)))
    only = tuple(flat)
    return only[0] if len(only) == 1 else kind(only)  # type: ignore[arg-type]


def negate(node: Node) -> Node:
    """Return the negation."""
    return node.node if isinstance(node, Not) else Not(node)


def check_depth(node: Node, room: int = MAX_DEPTH) -> None:
    """Raise ValueError where nodes are nested too deep."""
    if room < 0:
        raise ValueError(f"a requirement is nested more than {MAX_DEPTH} deep")
    for child in _children(node):
        check_depth(child, room - 1)


def _children(node: Node) -> tuple[Node, ...]:
    if isinstance(node, Clause):
        return ()
    return (node.node,) if isinstance(node, Not) else node.nodes


def label(node: Node) -> str:
    """Name the clauses of a node, without values: few different ones, fit for counting."""
    if isinstance(node, Clause):
        return node.name
    if isinstance(node, Not):
        text = label(node.node)
        return f"not {text}" if isinstance(node.node, Clause) else f"not ({text})"
    word = " and " if isinstance(node, Every) else " or "
    return word.join(
        dict.fromkeys(
            label(child) if isinstance(child, Clause | Not) else f"({label(child)})"
            for child in node.nodes
        )
    )


def refusal(node: Node, ptoken: PToken) -> tuple[str, str] | None:
    """Return the label of the first node that is not met, and why; None where all is."""
    if node.decide(ptoken) is True:
        return None
    if isinstance(node, Every):
        return next(filter(None, (refusal(child, ptoken) for child in node.nodes)), None)
    return label(node), _why(node, ptoken)


def _why(node: Node, ptoken: PToken) -> str:
    if isinstance(node, Clause):
        return node.explain(ptoken)
    if isinstance(node, Not):
        found = f"this is {ptoken.assurance.name} ({ptoken.information_string})"
        told = "it holds" if node.decide(ptoken) is False else "it cannot be told"
        return f"{told}: {found}"
    failed = (refusal(child, ptoken) for child in node.nodes)
    return "; ".join(f"{name}: {why}" for name, why in filter(None, failed))


def demands(node: Node, *, negated: bool = False) -> Demands:
    """Return what a node demands; what its negation does, where ``negated``."""
    if isinstance(node, Not):
        return demands(node.node, negated=not negated)
    if isinstance(node, Clause):
        return _NOTHING if negated or node.name in _UNDEMANDING else _of_clause(node)
    parts = [demands(child, negated=negated) for child in node.nodes]
    # De Morgan: the negation of a disjunction is a conjunction.
    return _every(parts) if isinstance(node, Every) is not negated else _common(parts)


def _of_clause(clause: Clause) -> Demands:
    return Demands(
        encrypted=clause.name == "encrypted",
        integrity=True,
        mode=clause.value if clause.name == "mode" else None,
        protocol=clause.value if clause.name == "protocol" else None,
    )


def _every(parts: list[Demands]) -> Demands:
    return Demands(
        any(part.encrypted for part in parts),
        any(part.integrity for part in parts),
        next((part.mode for part in parts if part.mode is not None), None),
        next((part.protocol for part in parts if part.protocol is not None), None),
    )


def _common(parts: list[Demands]) -> Demands:
    modes, protocols = {part.mode for part in parts}, {part.protocol for part in parts}
    return Demands(
        all(part.encrypted for part in parts),
        all(part.integrity for part in parts),
        modes.pop() if len(modes) == 1 else None,
        protocols.pop() if len(protocols) == 1 else None,
    )
