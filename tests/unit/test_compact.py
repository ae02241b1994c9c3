"""Compact dataclasses are what they were declared to be; they only take less room."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipsec_aio.compact import blank, compact, own, shared, sharing
from ipsec_aio.flow import Selector
from ipsec_aio.policy import Policy, Template
from ipsec_aio.sa import SA


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain:
    """A thing."""

    name: str
    size: int = 3
    color: str = "red"

    @property
    def loud(self) -> str:
        return self.name.upper()

    def __str__(self) -> str:
        return f"{self.name} of {self.size}"


Thing: Any = compact("name")(Plain)
VALUES = st.fixed_dictionaries(
    {"name": st.sampled_from("ab")},
    optional={"size": st.integers(0, 2), "color": st.sampled_from(["red", "blue"])},
)


def twin(**values: Any) -> Any:
    """Make one as a decoder does."""
    made = blank(Thing)()
    made.name = values.pop("name")
    made._shared = sharing(Thing, **{"size": 3, "color": "red"} | values)
    made.__class__ = Thing
    return made


@given(VALUES, VALUES, st.booleans(), st.booleans())
def test_it_is_the_declared_dataclass(
    one: dict[str, Any], other: dict[str, Any], filled: bool, others_filled: bool
) -> None:
    a, b = (twin if filled else Thing)(**one), (twin if others_filled else Thing)(**other)
    plain_a, plain_b = Plain(**one), Plain(**other)
    assert (a == b) is (plain_a == plain_b)
    assert a != b or hash(a) == hash(b)
    assert repr(a) == repr(plain_a)
    assert (str(a), a.loud) == (str(plain_a), plain_a.loud)
    assert dataclasses.asdict(a) == dataclasses.asdict(plain_a)
    assert dataclasses.replace(a, **other) == Thing(**dataclasses.asdict(plain_a) | other)
    assert copy.copy(a) == a
    assert copy.deepcopy(a) == a
    assert a != plain_a


def test_construction_demands_what_was_declared() -> None:
    assert inspect.signature(Thing) == inspect.signature(Plain)
    assert Thing.__doc__ == "A thing."
    with pytest.raises(TypeError, match="unexpected keyword argument 'weight'"):
        Thing(name="a", weight=3)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'name'"):
        Thing()


@pytest.mark.parametrize("made", [Thing(name="a"), twin(name="a")])
@pytest.mark.parametrize("field", ["name", "size", "_shared", "weight"])
def test_it_is_frozen(made: Any, field: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, field, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        delattr(made, field)
    assert made == Thing(name="a")
    assert not hasattr(made, "__dict__")


def test_what_is_shared() -> None:
    assert own(Thing) == ("name",)
    assert sharing(Thing, color="blue", size=1) == (1, "blue")
    with pytest.raises(KeyError):
        sharing(Thing, size=1)
    one = Thing(name="a")
    other = twin(name="b")
    assert not shared(one, other)
    other = blank(Thing)()
    other._shared = one._shared
    assert shared(one, other)


@pytest.mark.parametrize(
    "fact",
    [SA(destination=b"4444", proto=50, spi=7), Policy(selector=Selector()), Template(reqid=3)],
)
def test_facts_are_compact(fact: Any) -> None:
    names = [field.name for field in dataclasses.fields(fact)]
    assert set(own(type(fact))) < set(names)
    assert pickle.loads(pickle.dumps(fact)) == fact
    assert sys.getsizeof(fact) < 8 * len(names)
    assert repr(fact).startswith(f"{type(fact).__name__}({names[0]}=")
    assert dataclasses.replace(fact) == fact
