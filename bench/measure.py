"""Paired rounds: every variant is measured once per round, in an order that changes."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Mapping
from statistics import median, quantiles
from typing import Any

Sample = Callable[[], float]


def paired(samples: Mapping[str, Sample], rounds: int, what: str) -> dict[str, list[float]]:
    """Take every sample once per round; return what came, by name, in order of the rounds."""
    order = list(samples)
    found: dict[str, list[float]] = {name: [] for name in order}
    chooser = random.Random(1)
    for name in order:
        samples[name]()
    gc.collect()
    for turn in range(rounds):
        chooser.shuffle(order)
        for name in order:
            found[name].append(samples[name]())
        if sys.stderr.isatty() or turn + 1 == rounds:
            end = "\n" if turn + 1 == rounds else ""
            print(f"\r  {what}: round {turn + 1} of {rounds} ", end=end, file=sys.stderr)
            sys.stderr.flush()
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, _, high = quantiles(values, n=4)
    return {"median": median(values), "low": low, "high": high}


def against(base: list[float], values: list[float]) -> dict[str, float]:
    """How many times cheaper than the base: of each round, then the median of these."""
    return spread([one / other for one, other in zip(base, values, strict=True)])


def table(found: Mapping[str, list[float]], base: str, count: int = 1) -> list[dict[str, Any]]:
    """Rows with the cost per item, and what it is against the base."""
    return [
        {
            "variant": name,
            "cost": spread([value / count for value in values]),
            "times": against(found[base], values),
        }
        for name, values in found.items()
    ]
