"""Table rows with their bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from operator import add

from easyref_core.evaluation.statistics import Estimate, difference

Scores = Mapping[str, Sequence[float]]
"""Attribute -> one score per group, all in the same order."""

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        found: None where there is nothing to measure; `note` says why.
        bar: in words; empty if the number is only reported.
        met: whether the bar was reached; None without a bar.
        points: the number is a difference.
    """

    measure: str
    found: Estimate | None
    bar: str = ""
    met: bool | None = None
    points: bool = False
    note: str = ""


def mean_of(scores: Scores, attributes: Sequence[str]) -> list[float]:
    """Each group's mean over some attributes."""
    columns = [scores[name] for name in attributes]
    return [reduce(add, row) / len(row) for row in zip(*columns, strict=True)]


def chance_of(values: Mapping[str, Sequence[str]], attributes: Sequence[str]) -> float:
    """Mean accuracy of guessing: for each attribute one divided by its number of values."""
    return sum(1 / len(values[name]) for name in attributes) / len(attributes)


def reported(measure: str, found: Estimate, points: bool = False, note: str = "") -> Row:
    return Row(measure, found, points=points, note=note)


def at_least(measure: str, found: Estimate, bar: float, points: bool = False) -> Row:
    """The value, not its interval, must reach the bar."""
    unit = f"{100 * bar:g} points better" if points else f"{100 * bar:g}%"
    return Row(measure, found, f">= {unit}", found.value >= bar - _ROUNDING, points)


def not_below(measure: str, found: Estimate, margin: float) -> Row:
    """A difference that may be negative by the margin."""
    bar = f">= -{100 * margin:g} points"
    return Row(measure, found, bar, found.value >= -margin - _ROUNDING, True)


def within(measure: str, found: Estimate, margin: float) -> Row:
    """A difference that may be as large as the margin either way."""
    bar = f"within {100 * margin:g} points"
    return Row(measure, found, bar, abs(found.value) <= margin + _ROUNDING, True)


def at_chance(measure: str, found: Estimate, chance: float, margin: float = 0.05) -> Row:
    """Chance must lie in the interval, or within the margin of the value."""
    inside = found.low <= chance <= found.high
    near = abs(found.value - chance) <= margin + _ROUNDING
    return Row(measure, found, f"chance ({100 * chance:.1f}%)", inside or near)


def no_better_than_chance(
    measure: str, found: Estimate, chance: float, margin: float = 0.05
) -> Row:
    bar = f"<= chance ({100 * chance:.1f}%) + {100 * margin:g}"
    return Row(measure, found, bar, found.value <= chance + margin + _ROUNDING)


def rises(measure: str, steps: Sequence[Sequence[float]], slack: float = 0.01) -> Row:
    """The mean must rise from each step to the next, and significantly from first to last.

    A step may fall by `slack`, which is less than the means' uncertainty; the interval of the whole
    rise, which is the row's number, must lie above 0.
    """
    means = [sum(scores) / len(scores) for scores in steps]
    whole = difference(steps[-1], steps[0])
    up = all(b >= a - slack - _ROUNDING for a, b in pairwise(means))
    note = " ".join(f"{100 * mean:.1f}" for mean in means)
    return Row(measure, whole, "rises at each step", up and whole.low > 0, True, note)


def missing(measure: str, why: str, bar: str = "") -> Row:
    """A row without a number; if it has a bar, that is missed."""
    return Row(measure, None, bar, False if bar else None, note=why)
