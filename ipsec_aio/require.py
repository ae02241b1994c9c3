"""What a program demands of a channel before it talks on it.

Rules:

* A clause that is None or False demands nothing; a requirement without a clause is an error.
* What a token cannot tell counts as not met, under ``~`` too.
* A requirement is a value: it never changes, and equals another that was put together alike.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, cast, final

from . import require_text
from .clauses import FLAGS, NAMES, Clause
from .errors import ProtectionError
from .require_logic import (
    Demands,
    Either,
    Every,
    Node,
    Not,
    check_depth,
    demands,
    join,
    negate,
    refusal,
)

if TYPE_CHECKING:
    from .enums import Assurance, Mode
    from .identity import AuthenticationMethod, IdentityPattern, IToken
    from .tokens import PToken

    Identity: TypeAlias = "str | IdentityPattern | IToken"

__all__ = ["Demands", "Require"]

_put = object.__setattr__


@final
class Require:
    """A requirement; immutable, comparable, hashable, picklable.

    ``encrypted``: the token is protected, and its payload was private. ``integrity``: it is
    protected, and its payload was authenticated. ``min_bits``: each algorithm that was used is
    worth that many bits (a key's length without salt; less for DES, and where a hash is shorter).
    ``protocol``: ``"esp"`` or ``"ah"``. ``mode``: ``"transport"``, ``"tunnel"``, ``"beet"``,
    ``"iptfs"`` or a Mode. ``algorithms``, ``forbidden_algorithms``: one or several kernel names;
    all that were used are, or are not, among them. ``end_to_end``: the SA ends at both hosts,
    not at a tunnel's gateway. ``assurance``: the token is at least that sure (an Assurance or its
    name). ``peer``, ``local``: one or several, of which one is the identity: a pattern's text
    (:class:`IdentityPattern`), or an IToken (or its export), whose name must be the same and
    whose proof, as far as it says any, too. ``authentication_method``: one or several, by one of
    which the peer proved its identity. ``policy_name``: the policy that let it in.

    All of them must be met. Requirements are combined with ``&``, ``|`` and ``~``.

    Raises ValueError where nothing is demanded or a value makes no sense, TypeError for a value of
    a wrong type.
    """

    __slots__ = ("_node",)

    _node: Node

    def __init__(
        self,
        *,
        encrypted: bool | None = None,
        integrity: bool | None = None,
        min_bits: int | None = None,
        protocol: str | int | None = None,
        mode: Mode | str | None = None,
        algorithms: str | Iterable[str] | None = None,
        forbidden_algorithms: str | Iterable[str] | None = None,
        end_to_end: bool | None = None,
        assurance: Assurance | str | None = None,
        peer: Identity | Iterable[Identity] | None = None,
        local: Identity | Iterable[Identity] | None = None,
        authentication_method: AuthenticationMethod
        | str
        | Iterable[AuthenticationMethod | str]
        | None = None,
        policy_name: str | None = None,
    ) -> None:
        given = {
            "encrypted": encrypted,
            "integrity": integrity,
            "min_bits": min_bits,
            "protocol": protocol,
            "mode": mode,
            "algorithms": algorithms,
            "forbidden_algorithms": forbidden_algorithms,
            "end_to_end": end_to_end,
            "assurance": assurance,
            "peer": peer,
            "local": local,
            "authentication_method": authentication_method,
            "policy_name": policy_name,
        }
        clauses = [Clause.read(name, value) for name, value in given.items()]
        _put(self, "_node", _conjunction(clause for clause in clauses if clause is not None))

    @classmethod
    def parse(cls, text: str) -> Require:
        """Read a requirement's text, as ``str()`` writes it.

        ``encrypted and (peer='*.example.org' or min_bits=256)``: clauses are written like the
        arguments, those that are True by their name alone, several values in brackets. Raises
        ValueError that tells the position.
        """
        return _require(require_text.parse(text))

    @classmethod
    def from_mapping(cls, table: Mapping[str, object], *, where: str = "require") -> Require:
        """Make a requirement of a table, such as TOML or JSON gives.

        Keys are the arguments' names, with the same values, and ``all`` and ``any``, each a list
        of tables or texts (:meth:`parse`), and ``not``, which is one of these. Every must be met.
        Raises ValueError that names the key, after ``where``.
        """
        return _require(_table(table, where))

    @classmethod
    def from_toml(cls, text: str, *keys: str) -> Require:
        """Make a requirement of the table or text under some keys of a TOML document.

        Raises ValueError that names the key, KeyError where it is missing.
        """
        found: Any = tomllib.loads(text)
        for key in keys:
            found = found[key]
        return _require(_item(found, ".".join(keys) or "require"))

    def decide(self, ptoken: PToken) -> bool | None:
        """Return whether the token meets it; None where that cannot be told (yet)."""
        return self._node.decide(ptoken)

    def check(self, ptoken: PToken) -> ProtectionError | None:
        """Return None where the token meets it, else the error that names the first clause that
        it does not meet, and what was found.
        """
        refused = refusal(self._node, ptoken)
        return None if refused is None else ProtectionError(*refused)

    @property
    def demands(self) -> Demands:
        """What holds of every token that meets it, as far as a policy can enforce it."""
        return demands(self._node)

    def __and__(self, other: Require) -> Require:
        if not isinstance(other, Require):  # pyright: ignore[reportUnnecessaryIsInstance]
            return NotImplemented
        return _require(join(Every, (self._node, other._node)))

    def __or__(self, other: Require) -> Require:
        if not isinstance(other, Require):  # pyright: ignore[reportUnnecessaryIsInstance]
            return NotImplemented
        return _require(join(Either, (self._node, other._node)))

    def __invert__(self) -> Require:
        return _require(negate(self._node))

    def __bool__(self) -> NoReturn:
        raise TypeError("a requirement is neither true nor false: combine with &, | and ~")

    def __eq__(self, other: object) -> bool:
        return self._node == other._node if isinstance(other, Require) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._node)

    def __str__(self) -> str:
        return require_text.write(self._node)

    def __repr__(self) -> str:
        return _code(self._node)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("a requirement does not change")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError("a requirement does not change")

    def __reduce__(self) -> tuple[Callable[[str], Require], tuple[str]]:
        return Require.parse, (str(self),)


def _require(node: Node) -> Require:
    check_depth(node)
    made = object.__new__(Require)
    _put(made, "_node", node)
    return made


def _conjunction(nodes: Iterable[Node]) -> Node:
    found = list(nodes)
    if not found:
        raise ValueError("a requirement needs a clause, such as encrypted=True")
    return join(Every, found)


# -- from tables


def _table(table: Mapping[str, object], where: str) -> Node:
    nodes: list[Node] = []
    for name in NAMES:
        try:
            clause = Clause.read(name, table.get(name))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}.{name}: {error}") from error
        nodes.extend([] if clause is None else [clause])
    for key, value in table.items():
        if key in ("all", "any"):
            nodes.append(_several(value, f"{where}.{key}", Every if key == "all" else Either))
        elif key == "not":
            nodes.append(negate(_item(value, f"{where}.not")))
        elif key not in NAMES:
            raise ValueError(f"{where}.{key}: there is no such clause")
    try:
        return _conjunction(nodes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _several(value: object, where: str, kind: type[Every] | type[Either]) -> Node:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: a list of requirements is expected, not {value!r}")
    items = cast("list[object]", value)
    return join(kind, [_item(item, f"{where}[{index}]") for index, item in enumerate(items)])


def _item(value: object, where: str) -> Node:
    if isinstance(value, str):
        try:
            return require_text.parse(value)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if isinstance(value, Mapping):
        return _table(cast("Mapping[str, object]", value), where)
    raise ValueError(f"{where}: a table or a text is expected, not {value!r}")


# -- as code


def _code(node: Node) -> str:
    if isinstance(node, Clause):
        return _call([node])
    if isinstance(node, Not):
        return f"~{_operand(node.node)}"
    if isinstance(node, Either):
        return " | ".join(_operand(child) for child in node.nodes)
    return " & ".join(_factors(node))


def _operand(node: Node) -> str:
    loose = isinstance(node, Either) or (isinstance(node, Every) and len(_factors(node)) > 1)
    return f"({_code(node)})" if loose else _code(node)


def _factors(node: Every) -> list[str]:
    """Return the calls and operands of a conjunction; a call takes clauses in its own order."""
    runs: list[list[Clause] | str] = []
    for child in node.nodes:
        if not isinstance(child, Clause):
            runs.append(_operand(child))
            continue
        last = runs[-1] if runs else ""
        if isinstance(last, list) and NAMES.index(last[-1].name) < NAMES.index(child.name):
            last.append(child)
        else:
            runs.append([child])
    return [run if isinstance(run, str) else _call(run) for run in runs]


def _call(clauses: list[Clause]) -> str:
    return f"Require({', '.join(f'{clause.name}={_value(clause)}' for clause in clauses)})"


def _value(clause: Clause) -> str:
    atoms = clause.atoms
    if clause.name in FLAGS:
        return "True"
    if clause.name == "assurance":
        return f"Assurance.{atoms[0]}"
    return repr(atoms[0] if len(atoms) == 1 else atoms)
