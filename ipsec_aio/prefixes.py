"""What selectors name, found by a pair of addresses.

Rules:

* There is one dictionary for each pair of prefix lengths that is in use. Its keys are the
  interface id and the two masked addresses as one integer, so a look-up takes as many steps as
  there are such pairs, however many selectors there are.
* A selector of any family is in the dictionaries of both; one whose addresses contradict each other
  or its family is in none, as it matches nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from .flow import Selector

__all__ = ["Place", "Prefixes", "places"]

_V = TypeVar("_V")

# Address length, and the prefix lengths of both ends.
_Shape = tuple[int, int, int]
Place = tuple[_Shape, int]
"""Where a selector is kept: its prefix lengths, and its masked addresses."""

_SIZES = {0: (4, 16), 2: (4,), 10: (16,)}


class Prefixes(Generic[_V]):
    """Values by place."""

    __slots__ = ("_shapes",)

    def __init__(self) -> None:
        self._shapes: dict[_Shape, dict[int, _V]] = {}

    def __bool__(self) -> bool:
        return bool(self._shapes)

    def get(self, place: Place) -> _V | None:
        """Return what is kept at a place."""
        shape, key = place
        values = self._shapes.get(shape)
        return None if values is None else values.get(key)

    def at(self, shape: _Shape) -> dict[int, _V]:
        """Return what there is of these prefix lengths, to put something in or take it out."""
        return self._shapes.setdefault(shape, {})

    def prune(self, shape: _Shape) -> None:
        """Forget prefix lengths that are no longer in use, after taking something out."""
        if not self._shapes[shape]:
            del self._shapes[shape]

    def matching(self, source: bytes, destination: bytes, if_id: int = 0) -> Iterator[_V]:
        """Yield what is kept for all prefixes of two addresses."""
        size = len(destination)
        bits = size * 8
        from_, to = int.from_bytes(source), int.from_bytes(destination)
        for (shape_size, s, d), values in self._shapes.items():
            if shape_size == size:
                ends = from_ >> (bits - s) << bits | to >> (bits - d)
                value = values.get(if_id << 2 * bits | ends)
                if value is not None:
                    yield value

    def __iter__(self) -> Iterator[_V]:
        for values in self._shapes.values():
            yield from values.values()


def places(selector: Selector, if_id: int = 0) -> list[Place]:
    """Return where a selector is kept."""
    source, destination, s, d, _, _, _, _, _, family, _, _ = selector
    found: list[Place] = []
    for size in _SIZES.get(family, ()):
        if (not s or len(source) == size) and (not d or len(destination) == size):
            bits = size * 8
            from_ = int.from_bytes(source) >> (bits - s) if s else 0
            to = int.from_bytes(destination) >> (bits - d) if d else 0
            found.append(((size, s, d), if_id << 2 * bits | from_ << bits | to))
    return found
