"""What a declaration in TOML may hold; errors name the table and the key."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from ipsec_aio.sa import IPPROTO_AH, IPPROTO_COMP, IPPROTO_ESP

__all__ = [
    "IDENTITY",
    "POLICY",
    "PROTOS",
    "SA",
    "SELECTOR",
    "TOP",
    "at",
    "checked",
    "number_of",
    "tables",
    "within",
]

PROTOS: Mapping[str, int] = {"esp": IPPROTO_ESP, "ah": IPPROTO_AH, "comp": IPPROTO_COMP}

# Keys and the TOML types that they take.
_TEXT = (str,)
_NUMBER = (int,)
_EITHER = (str, int)
_FLAG = (bool,)
_PAIR = (list,)

TOP: Mapping[str, tuple[type, ...]] = {
    "sa": (list,),
    "policy": (list,),
    "identity": (list,),
    "default_action": _TEXT,
    "trust_policy": _FLAG,
}
SELECTOR: Mapping[str, tuple[type, ...]] = {
    "src": _TEXT,
    "dst": _TEXT,
    "proto": _EITHER,
    "src_port": _NUMBER,
    "dst_port": _NUMBER,
    "ifindex": _NUMBER,
}
SA: Mapping[str, tuple[type, ...]] = {
    "src": _TEXT,
    "dst": _TEXT,
    "spi": _NUMBER,
    "proto": _EITHER,
    "mode": _EITHER,
    "reqid": _NUMBER,
    "aead": _TEXT,
    "encryption": _TEXT,
    "authentication": _TEXT,
    "compression": _TEXT,
    "key_bits": _NUMBER,
    "icv_bits": _NUMBER,
    "auth_key_bits": _NUMBER,
    "selector": (dict,),
    "direction": _EITHER,
    "mark": _PAIR,
    "set_mark": _PAIR,
    "if_id": _NUMBER,
    "replay_window": _NUMBER,
    "esn": _FLAG,
    "peer": _TEXT,
    "local": _TEXT,
    "identity_pending": _FLAG,
}
_SA_DEMANDS = ("src", "dst")
POLICY: Mapping[str, tuple[type, ...]] = {
    **SELECTOR,
    "direction": _EITHER,
    "priority": _NUMBER,
    "action": _EITHER,
    "template": _EITHER,
    "mode": _EITHER,
    "reqid": _NUMBER,
    "tunnel_src": _TEXT,
    "tunnel_dst": _TEXT,
    "optional": _FLAG,
    "mark": _PAIR,
    "if_id": _NUMBER,
    "kind": _NUMBER,
}
IDENTITY: Mapping[str, tuple[type, ...]] = {
    "peer": _TEXT,
    "local": _TEXT,
    "spi": _NUMBER,
    "proto": _EITHER,
    "src": _TEXT,
    "dst": _TEXT,
    "reqid": _NUMBER,
    "if_id": _NUMBER,
}


@contextmanager
def at(place: str) -> Generator[None, None, None]:
    """Put a place in front of the ValueErrors raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def checked(
    table: Mapping[str, Any], keys: Mapping[str, tuple[type, ...]], demands: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the table with its values' types checked. Raises ValueError that names the key."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in keys:
            raise ValueError(f"unknown key {key!r}; there are {', '.join(keys)}")
        kinds = keys[key]
        # A TOML boolean is a Python int too.
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{key} is a {type(value).__name__}, not a {names}")
        values[key] = _pair(key, cast("list[object]", value)) if kinds is _PAIR else value
    for key in demands:
        if key not in values:
            raise ValueError(f"{key} is missing")
    return values


def tables(
    document: Mapping[str, Any], name: str, keys: Mapping[str, tuple[type, ...]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what the array of tables with this name holds, each with its place."""
    for number, table in enumerate(document.get(name, ()), 1):
        place = f"[[{name}]] number {number}"
        with at(place):
            if not isinstance(table, dict):
                raise ValueError("not a table")
            values = checked(cast("dict[str, Any]", table), keys, _SA_DEMANDS if keys is SA else ())
        yield place, values


def number_of(names: Mapping[str, int], value: str | int, what: str, limit: int) -> int:
    """Return the number that a name stands for, or a number as it is. Raises ValueError."""
    if isinstance(value, int):
        return within(value, what, limit)
    if value not in names:
        raise ValueError(f"unknown {what} {value!r}; there are {', '.join(sorted(names))}")
    return int(names[value])


def within(value: int, what: str, limit: int) -> int:
    """Return a number. Raises ValueError where it is negative or beyond the limit."""
    if not 0 <= value <= limit:
        raise ValueError(f"{what} {value} is not between 0 and {limit}")
    return int(value)


def _pair(key: str, value: list[object]) -> tuple[int, int]:
    match value:
        case [int(number), int(mask)]:
            return number, mask
        case _:
            raise ValueError(f"{key} is [value, mask], not {value!r}")
