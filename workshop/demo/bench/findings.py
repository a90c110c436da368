"""Differences between lines of a run's scores, and sentences on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from easyref_core.evaluation.statistics import Estimate, by_group, paired_difference

from .judge import IDENTITY
from .ordering import Row, Verdict

Line = Mapping[str, Any]
"""Columns of scores.csv -> the values that choose a line of the table."""

OWN, OTHER, NONE = {"method": "easyref"}, {"method": "easyref-other"}, {"method": "none"}


def difference(
    rows: Sequence[Row], first: Line, second: Line, column: str = IDENTITY
) -> Estimate | None:
    """Mean of the first line's scores minus the second's, group by group; None where one has none.

    A line may hold several settings; a group's scores are then averaged.
    """
    means = []
    for line in (first, second):
        own = [row for row in rows if row.get(column) and _matches(row, line)]
        means.append(by_group([r["group"] for r in own], [float(r[column]) for r in own]))
    return paired_difference(*means)


def _matches(row: Row, line: Line) -> bool:
    return all(
        row[name] == value if isinstance(value, str) else float(row[name]) == value
        for name, value in line.items()
    )


def falls_to_chance(name: str, found: Estimate | None) -> Verdict:
    """Whether images made of another group's references look like a group no more than those made
    without any.

    Args:
        found: their identity, minus that of images without references.
    """
    # Not clearly above: the upper half of the interval may lie there by chance.
    above = found is not None and found.low > 0
    claim = f"{name} of another group: identity no higher than without references"
    return ChanceVerdict(claim, found, above=above)


@dataclass(frozen=True)
class ChanceVerdict(Verdict):
    """A difference that must not lie clearly above 0."""

    above: bool = False

    @property
    def holds(self) -> bool:
        return self.found is not None and not self.above


@dataclass(frozen=True)
class Finding:
    """Something the paper found, or may be asked for.

    Attributes:
        claim: such as "DLA above the last layer on identity".
        found: the difference that it speaks of.
        paper: what is known of it; empty where nothing is.
    """

    claim: str
    found: Estimate | None
    paper: str = ""

    @property
    def sentence(self) -> str:
        said = f"; in the paper: {self.paper}" if self.paper else ""
        if self.found is None:
            return f"not measured: {self.claim}{said}"
        value, low, high = (100 * v for v in (self.found.value, self.found.low, self.found.high))
        numbers = f"{value:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}"
        if self.found.low <= 0 <= self.found.high:
            return f"does not show at this size: {self.claim} ({numbers}){said}"
        state = "shows" if value > 0 else "THE OPPOSITE shows"
        return f"{state}: {self.claim} ({numbers}){said}"
