"""Whether the paper's ordering is found: what must be better than what, and by how much it is."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyref_core.errors import EasyRefError
from easyref_core.evaluation.statistics import Estimate, by_group, paired_difference

from .judge import IDENTITY

Row = Mapping[str, str]
Line = Mapping[str, Any]
"""Columns of scores.csv -> the values that choose a line of the table."""


@dataclass(frozen=True)
class Verdict:
    """One expectation.

    Attributes:
        claim: such as "EasyRef >= average on held-out identity".
        found: the difference between both means, in shares; None where an image is missing.
        strict: a difference of 0 is not enough.
    """

    claim: str
    found: Estimate | None
    strict: bool = False

    @property
    def holds(self) -> bool:
        if self.found is None:
            return False
        return self.found.value > 0 if self.strict else self.found.value >= 0

    @property
    def is_clear(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.found is not None and not self.found.low <= 0 <= self.found.high

    @property
    def sentence(self) -> str:
        if self.found is None:
            return f"not measured: {self.claim}"
        value, low, high = (100 * v for v in (self.found.value, self.found.low, self.found.high))
        doubt = "" if self.is_clear else ", within chance"
        return (
            f"{'holds' if self.holds else 'DOES NOT HOLD'}: {self.claim} "
            f"({value:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}{doubt})"
        )


def verdicts(scores: Path, methods: Sequence[str]) -> list[Verdict]:
    """Each expectation about methods that were run, on groups that nothing was trained on.

    Differences are taken group by group, over all numbers of references from two up, as one
    reference leaves nothing to combine; IP-Adapter's over all numbers, LoRA's where it was trained.

    Args:
        scores: scores.csv of the run.

    Raises:
        EasyRefError: the file cannot be read.
    """
    rows = [row for row in read_scores(scores) if row["split"] == "held_out" and row[IDENTITY]]
    found = []
    for other, least in (("average", 2), ("concatenate", 2), ("ip-adapter", 1)):
        if {"easyref", other} <= set(methods):
            chosen = [row for row in rows if int(row["references"]) >= least]
            claim = f"EasyRef >= {other} on held-out identity"
            found.append(Verdict(claim, _between(chosen, "easyref", other)))
    if {"easyref", "lora", "lora-other"} <= set(methods):
        counts = {row["references"] for row in rows if row["method"].startswith("lora")}
        same = [row for row in rows if row["references"] in counts]
        claim = "a LoRA of the group > a LoRA of another group"
        found.append(Verdict(claim, _between(same, "lora", "lora-other"), strict=True))
        claim = "EasyRef > a LoRA of another group"
        found.append(Verdict(claim, _between(same, "easyref", "lora-other"), strict=True))
    if {"easyref", "none"} <= set(methods):
        claim = "EasyRef > no reference"
        found.append(Verdict(claim, _between(rows, "easyref", "none"), strict=True))
    return found


def _between(rows: Sequence[Row], first: str, second: str) -> Estimate | None:
    return difference(rows, {"method": first}, {"method": second})


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


def read_scores(path: Path) -> list[Row]:
    """The rows of a run's scores.csv.

    Raises:
        EasyRefError: the file cannot be read.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise EasyRefError(f"{path} cannot be read ({error.strerror}). Run it again.") from error
