"""Differences between lines of a run's scores, and sentences on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from easyref_core.evaluation.statistics import Estimate

from .ordering import Line, Row, Verdict, difference

OWN, OTHER, NONE = {"method": "easyref"}, {"method": "easyref-other"}, {"method": "none"}
CONTROL_COUNT = 4
"""References of the controls."""


def controls(
    rows: Sequence[Row], methods: Sequence[str], lines: Mapping[str, tuple[Line, Line]]
) -> list[Verdict]:
    """Whether each line's images follow their own group, and not another one's; none if no controls
    were run.

    Args:
        lines: name -> a line, and the same with the references of another group.
    """
    if not {one["method"] for one in (OWN, OTHER, NONE)} <= set(methods):
        return []
    found: list[Verdict] = []
    for name, (own, other) in lines.items():
        claim = f"{name}: own group > another group on identity"
        found.append(Verdict(claim, difference(rows, own, other), strict=True))
        claim = f"{name} of another group: identity no higher than without references"
        found.append(ChanceVerdict(claim, difference(rows, other, NONE)))
    return found


@dataclass(frozen=True)
class ChanceVerdict(Verdict):
    """A difference that must not lie clearly above 0: the upper half of its interval may lie there
    by chance."""

    @property
    def holds(self) -> bool:
        return self.found is not None and self.found.low <= 0


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
