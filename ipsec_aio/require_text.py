r"""Requirements as text: ``encrypted and (peer='*.example.org' or min_bits=256)``.

::

    requirement  one { "or" one }
    one          each { "and" each }
    each         "not" each | "(" requirement ")" | clause
    clause       flag | name "=" value | name "=" "[" value { "," value } "]"
    value        a number, a word (letters, digits and _, no digit in front), or text in single or
                 double quotes, in which the quote itself is doubled and a backslash is a backslash

Rules:

* ``flag`` and ``name`` are those of the clauses; ``and`` binds closer than ``or``, ``not`` closest.
* What is written is read as equal; what is read is written in one way.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple, NoReturn

from .clauses import FLAGS, NAMES, Atom, Clause
from .require_logic import MAX_DEPTH, Either, Every, Node, Not, join, negate

__all__ = ["TEXT_LIMIT", "parse", "write"]

TEXT_LIMIT: Final = 1 << 20
"""How many characters the text of a requirement may have."""

_TOKEN: Final = re.compile(
    r"""\s*(?:
        (?P<word>[A-Za-z_][A-Za-z0-9_]*)
      | (?P<number>[0-9]{1,9}(?![A-Za-z0-9_]))
      | '(?P<single>(?:[^']|'')*+)'
      | "(?P<double>(?:[^"]|"")*+)"
      | (?P<sign>[()=\[\],])
    )""",
    re.VERBOSE,
)
_WORD: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_RESERVED: Final = frozenset({"and", "or", "not"})


class _Token(NamedTuple):
    kind: str
    text: str
    position: int


class _Reader:
    """A text on its way through the grammar."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._tokens = _split(text)
        self._next = 0

    def peek(self, *words: str) -> bool:
        token = self._tokens[self._next]
        return token.kind in ("word", "sign") and token.text in words

    def take(self) -> _Token:
        token = self._tokens[self._next]
        self._next += token.kind != "end"
        return token

    def expect(self, sign: str) -> None:
        token = self.take()
        if token.kind != "sign" or token.text != sign:
            fail(token, f"{sign!r} is expected")


def parse(text: str) -> Node:
    """Read a requirement. Raises ValueError, which tells the position."""
    if len(text) > TEXT_LIMIT:
        raise ValueError(f"the text of a requirement has {len(text)} characters")
    reader = _Reader(text)
    node = _requirement(reader, 0)
    token = reader.take()
    if token.kind != "end":
        fail(token, "'and', 'or' or the end is expected")
    return node


def fail(token: _Token, problem: str) -> NoReturn:
    """Raise ValueError about a place in a text."""
    found = "the end" if token.kind == "end" else repr(token.text)
    raise ValueError(f"{problem} at position {token.position}, not {found}")


def _split(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    position, end = 0, len(text.rstrip())
    while position < end:
        found = _TOKEN.match(text, position)
        if not found or found.lastgroup is None:
            rest = text[position : position + 40]
            raise ValueError(f"no part of a requirement at position {position}: {rest!r}")
        kind, value = found.lastgroup, found[found.lastgroup]
        position = found.start(kind)
        if kind in ("single", "double"):
            quote = "'" if kind == "single" else '"'
            kind, value = "text", value.replace(2 * quote, quote)
        tokens.append(_Token(kind, value, position))
        position = found.end()
    tokens.append(_Token("end", "", len(text)))
    return tokens


def _requirement(reader: _Reader, depth: int) -> Node:
    nodes = [_one(reader, depth)]
    while reader.peek("or"):
        reader.take()
        nodes.append(_one(reader, depth))
    return join(Either, nodes)


def _one(reader: _Reader, depth: int) -> Node:
    nodes = [_each(reader, depth)]
    while reader.peek("and"):
        reader.take()
        nodes.append(_each(reader, depth))
    return join(Every, nodes)


def _each(reader: _Reader, depth: int) -> Node:
    token = reader.take()
    if depth > 2 * MAX_DEPTH:
        fail(token, "it is nested too deep")
    if token.kind == "word" and token.text == "not":
        return negate(_each(reader, depth + 1))
    if token.kind == "sign" and token.text == "(":
        node = _requirement(reader, depth + 1)
        reader.expect(")")
        return node
    if token.kind != "word" or token.text not in NAMES:
        fail(token, "a clause is expected")
    return _clause(reader, token)


def _clause(reader: _Reader, token: _Token) -> Clause:
    name = token.text
    value: Atom | list[Atom] | bool = True
    if name not in FLAGS:
        reader.expect("=")
        if reader.peek("["):
            value = []
            while not value or reader.peek(","):
                reader.take()
                value.append(_value(reader))
            reader.expect("]")
        else:
            value = _value(reader)
    try:
        clause = Clause.read(name, value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{error} (at position {token.position})") from error
    if clause is None:
        fail(token, "a clause that demands something is expected")
    return clause


def _value(reader: _Reader) -> Atom:
    token = reader.take()
    if token.kind == "number":
        return int(token.text)
    if token.kind not in ("word", "text"):
        fail(token, "a value is expected")
    return token.text


# -- writing


def write(node: Node) -> str:
    """Write a requirement."""
    if isinstance(node, Clause):
        return _write_clause(node)
    if isinstance(node, Not):
        return f"not {_within(node.node, Not)}"
    word = " and " if isinstance(node, Every) else " or "
    return word.join(_within(child, type(node)) for child in node.nodes)


def _within(node: Node, parent: type[Node]) -> str:
    loose = isinstance(node, Either) or (isinstance(node, Every) and parent is Not)
    return f"({write(node)})" if loose else write(node)


def _write_clause(clause: Clause) -> str:
    values = [_write_value(atom) for atom in clause.atoms]
    if not values:
        return clause.name
    return f"{clause.name}=" + (values[0] if len(values) == 1 else f"[{', '.join(values)}]")


def _write_value(atom: Atom) -> str:
    if isinstance(atom, int):
        return str(atom)
    if _WORD.fullmatch(atom) and atom not in _RESERVED:
        return atom
    return "'" + atom.replace("'", "''") + "'"
