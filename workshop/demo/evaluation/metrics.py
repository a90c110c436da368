"""Means with confidence intervals, and table rows with their bars.

Each score belongs to one group, so resampling scores resamples groups; groups that look the same
are resampled together, as they say little more than one of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from operator import add

import numpy as np

Scores = Mapping[str, Sequence[float]]
"""Attribute -> one score per group, all in the same order."""

_RESAMPLES = 2000
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Estimate:
    """A mean over groups, or a difference of two, with its 95% confidence interval.

    Attributes:
        count: groups.
    """

    value: float
    low: float
    high: float
    count: int


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


def estimate(scores: Sequence[float], looks: Sequence[Hashable] | None = None) -> Estimate:
    """Mean of scores with a bootstrap interval; the same scores give the same interval.

    Args:
        looks: what each group shows; all differ by default.

    Raises:
        ValueError: no score.
    """
    if not scores:
        raise ValueError("there is no score to take the mean of")
    by_look: dict[Hashable, list[float]] = {}
    for look, score in zip(looks or range(len(scores)), scores, strict=True):
        by_look.setdefault(look, []).append(score)
    sums = np.array([sum(group) for group in by_look.values()], dtype=np.float64)
    counts = np.array([len(group) for group in by_look.values()])
    picks = np.random.default_rng(0).integers(len(sums), size=(_RESAMPLES, len(sums)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(sums.sum() / len(scores)), float(low), float(high), len(scores))


def difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean of the first scores minus the second, group by group."""
    return estimate([a - b for a, b in zip(first, second, strict=True)])


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
