"""Means over groups with bootstrap confidence intervals.

Each score belongs to one group, so resampling scores resamples groups; groups that look the same
are resampled together, as they say little more than one of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 2000


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


def by_group(groups: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    """Each group's mean over its images, in the order in which groups first appear.

    Args:
        groups: the group of each score.
    """
    found: dict[str, list[float]] = {}
    for group, score in zip(groups, scores, strict=True):
        found.setdefault(group, []).append(score)
    return {group: sum(values) / len(values) for group, values in found.items()}


def paired_difference(first: Mapping[str, float], second: Mapping[str, float]) -> Estimate | None:
    """Mean of the first scores minus the second over the groups that have both; None if none has.

    Args:
        first, second: group -> score, as `by_group` gives them.
    """
    both = [group for group in first if group in second]
    if not both:
        return None
    return difference([first[group] for group in both], [second[group] for group in both])
