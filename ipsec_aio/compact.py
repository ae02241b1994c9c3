"""Dataclasses of which very many instances live, with few values that are their own.

Rules:

* What users see is the dataclass as it was declared: fields and their defaults, ``==``, hash, repr,
  ``dataclasses.replace()``, copies and pickles.
* Each instance holds some of its fields; the others are in one tuple, which those who make many
  instances at once let them share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from functools import wraps
from operator import attrgetter
from typing import Any, TypeVar

__all__ = ["blank", "compact", "own", "shared", "sharing"]

_T = TypeVar("_T")


def compact(*mine: str) -> Callable[[type[_T]], type[_T]]:
    """Have a frozen dataclass hold only these fields in each instance by itself."""

    def rebuild(plain: type[Any]) -> type[Any]:
        names = [f.name for f in fields(plain)]
        common = [name for name in names if name not in mine]
        told = attrgetter(*mine, "_shared")
        put = object.__setattr__

        @wraps(plain.__init__)
        def init(self: Any, **values: Any) -> None:
            made = plain(**values)
            for name in mine:
                put(self, name, getattr(made, name))
            put(self, "_shared", tuple(getattr(made, name) for name in common))

        def equal(self: Any, other: object) -> bool:
            return told(self) == told(other) if type(self) is type(other) else NotImplemented

        def hashed(self: Any) -> int:
            return hash(told(self))

        def reduce(self: Any) -> tuple[Any, ...]:
            return _revived, (type(self), {name: getattr(self, name) for name in names})

        space = {
            k: v for k, v in vars(plain).items() if k not in (*names, "__dict__", "__weakref__")
        }
        space |= {name: property(_getter(place)) for place, name in enumerate(common)}
        space |= {
            "__slots__": (*mine, "_shared"),
            "__init__": init,
            "__eq__": equal,
            "__hash__": hashed,
            "__setattr__": _refuse,
            "__delattr__": _refuse,
            "__reduce__": reduce,
            "_common": common,
            "_blank": type("_Blank", (), {"__slots__": (*mine, "_shared")}),
        }
        return type(plain.__name__, (), space)

    return rebuild


def own(cls: Any) -> tuple[str, ...]:
    """Return the names of the fields that each instance has by itself."""
    slots: tuple[str, ...] = cls.__slots__
    return slots[:-1]


def blank(cls: Any) -> Any:
    """Return what to make and fill before it becomes a ``cls`` by its ``__class__``.

    Its attributes are the own fields, and ``_shared``, which is what :func:`sharing` gives. Calling
    the class is several times slower.
    """
    return cls._blank


def sharing(cls: Any, **values: object) -> tuple[object, ...]:
    """Arrange the values of all fields that instances of a compact dataclass may share."""
    return tuple(map(values.__getitem__, cls._common))


def shared(one: Any, other: Any) -> bool:
    """Whether two instances of a compact dataclass share all but their own fields."""
    return one._shared is other._shared


def _getter(place: int) -> Callable[[Any], Any]:
    return lambda self: self._shared[place]


def _refuse(self: object, name: str, *value: object) -> None:
    del self, value
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _revived(cls: type[_T], values: dict[str, Any]) -> _T:
    return cls(**values)
