"""The table: variants by columns, for all groups and for each split and kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..metrics import Column
from ..statistics import Estimate, by_group, paired_difference
from .record import RunRecord, SummaryRecord
from .series import colours

SPLITS = {"held_in": "held-in", "held_out": "held-out"}
_MOST_KINDS = 12
MISSING = "–"


@dataclass(frozen=True)
class ScoreView:
    """One way to print the scores.

    Attributes:
        factors: column's name -> what its scores are multiplied with, and the scale's name; others
            are printed as they are stored.
    """

    key: str
    title: str
    factors: Mapping[str, tuple[float, str]]


@dataclass(frozen=True)
class Printed:
    """A number with its interval, as text."""

    value: str
    interval: str = ""


@dataclass(frozen=True)
class Cell:
    """A variant's score in one column.

    Attributes:
        order: to sort by; None where there is no score.
        printed: one a view.
        difference: to the first variant, group by group; None where there is none.
        differs: the difference's interval lies on one side of 0.
        bar: where low, mean and high lie between the column's extremes, percent.
    """

    order: float | None
    printed: tuple[Printed, ...]
    best: bool = False
    difference: Printed | None = None
    differs: bool = False
    bar: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class TableRow:
    """
    Attributes:
        stages: of the seconds, such as "encode 0.4 + sample 2.1".
        seconds_a_step: of the sampling.
    """

    label: str
    colour: int
    cells: tuple[Cell, ...]
    seconds: float | None
    stages: str
    seconds_a_step: float | None
    groups: int
    images: int
    failed: int


@dataclass(frozen=True)
class ScoreTable:
    """The rows over the groups of one scope.

    Attributes:
        key: "all", or one of a split or kind.
        groups: the most that a row has.
    """

    key: str
    title: str
    rows: tuple[TableRow, ...]
    groups: int


def views(run: RunRecord) -> list[ScoreView]:
    """As stored, then every other scale that a column asks for."""
    printed = sorted((p for column in run.columns for p in column.printed), key=lambda p: p[1])
    names = dict.fromkeys(name for name, _ in printed)
    found = [ScoreView("stored", "as stored", {})]
    for number, name in enumerate(names):
        factors = {c.name: (f, name) for c in run.columns for n, f in c.printed if n == name}
        found.append(ScoreView(f"scale{number}", name.replace(" x ", " × "), factors))
    return found


def score_tables(run: RunRecord) -> list[ScoreTable]:
    """One for all groups, then one for each split and kind; at most `_MOST_KINDS` kinds."""
    scopes = list(dict.fromkeys((s.split, s.kind) for s in run.summaries))
    splits = sorted(((s, k) for s, k in scopes if not k), key=lambda scope: scope[0])
    kinds = sorted((s, k) for s, k in scopes if k and not s)[:_MOST_KINDS]
    tables = [_table(run, *scope) for scope in (*splits, *kinds)]
    alike = len(splits) == 2 and splits[0] == ("", "")  # all groups are of one split
    return [table for table in tables if not (alike and table.key == f"split {splits[1][0]}")]


def scope_title(split: str, kind: str) -> str:
    name = SPLITS.get(split, split) or kind
    return name or "all groups"


def number_text(value: float, largest: float) -> str:
    """A number of a column with the digits that suit its largest."""
    digits = 3 if largest < 10 else 1 if largest < 1000 else 0
    return f"{value:.{digits}f}"


def seconds_text(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def best_of(column: Column, summaries: Sequence[SummaryRecord]) -> float | None:
    """The best score of a column; None where neither higher nor lower is better."""
    values = [s.scores[column.name].value for s in summaries if column.name in s.scores]
    if column.higher_is_better is None or not values:
        return None
    return max(values) if column.higher_is_better else min(values)


def _table(run: RunRecord, split: str, kind: str) -> ScoreTable:
    summaries = run.scope(split, kind)
    present = {s.label for s in summaries}
    if not split and not kind:  # a variant of which nothing has become still has its row
        summaries += [_empty(run, label) for label in run.labels if label not in present]
    columns = [_cells(run, column, summaries, split, kind) for column in run.columns]
    palette = colours(run)
    rows = [
        TableRow(
            label=summary.label,
            colour=palette.get(summary.method, len(palette) % 8),
            cells=tuple(column[number] for column in columns),
            seconds=sum(summary.seconds.values()) if summary.seconds else None,
            stages=" + ".join(f"{k} {seconds_text(v)}" for k, v in summary.seconds.items()),
            seconds_a_step=summary.seconds_a_step,
            groups=summary.groups,
            images=summary.images,
            failed=summary.failed,
        )
        for number, summary in enumerate(summaries)
    ]
    key = f"kind {kind}" if kind else f"split {split}" if split else "all"
    most = max((row.groups for row in rows), default=0)
    return ScoreTable(key, scope_title(split, kind), tuple(rows), most)


def _empty(run: RunRecord, label: str) -> SummaryRecord:
    own = [trial for trial in run.trials if trial.label == label]
    failed = sum(bool(trial.failed) for trial in own)
    method = own[0].method if own else label
    return SummaryRecord(label, {"method": method}, "", "", 0, 0, failed, 0.0, {}, {})


def _cells(
    run: RunRecord, column: Column, summaries: Sequence[SummaryRecord], split: str, kind: str
) -> list[Cell]:
    """A column's cells, in the order of the rows."""
    means = [summary.scores.get(column.name) for summary in summaries]
    found = [mean for mean in means if mean is not None]
    low, high = min((m.low for m in found), default=0), max((m.high for m in found), default=0)
    largest = max(abs(low), abs(high))
    best = best_of(column, summaries)
    differences = _differences(run, column, summaries, split, kind)
    shown = views(run)
    cells = []
    for mean, difference in zip(means, differences, strict=True):
        if mean is None:
            cells.append(Cell(None, (Printed(MISSING),) * len(shown)))
            continue
        width = high - low
        cells.append(
            Cell(
                order=mean.value,
                printed=tuple(_printed(mean, column, view, largest) for view in shown),
                best=len(found) > 1 and mean.value == best,
                difference=difference and _signed(difference, largest),
                differs=difference is not None and not difference.low <= 0 <= difference.high,
                bar=tuple(100 * (v - low) / width for v in (mean.low, mean.value, mean.high))
                if width > 0
                else None,
            )
        )
    return cells


def _printed(mean: Estimate, column: Column, view: ScoreView, largest: float) -> Printed:
    factor, _ = view.factors.get(column.name, (1.0, ""))
    value, low, high = (
        number_text(factor * v, factor * largest) for v in (mean.value, mean.low, mean.high)
    )
    return Printed(value, f"{low}–{high}" if mean.high > mean.low else "")


def _signed(difference: Estimate, largest: float) -> Printed:
    value, low, high = (
        _plus(number_text(v, largest)) for v in (difference.value, difference.low, difference.high)
    )
    return Printed(value, f"{low} to {high}")


def _plus(text: str) -> str:
    if not text.strip("-0."):
        return text.lstrip("-")
    return f"−{text[1:]}" if text.startswith("-") else f"+{text}"


def _differences(
    run: RunRecord, column: Column, summaries: Sequence[SummaryRecord], split: str, kind: str
) -> list[Estimate | None]:
    """Each row's difference to the first row over the groups that both have."""
    by_label: dict[str, tuple[list[str], list[float]]] = {}
    for trial in run.trials:
        inside = (not split or trial.split == split) and (not kind or trial.kind == kind)
        if inside and column.name in trial.scores:
            groups, scores = by_label.setdefault(trial.label, ([], []))
            groups.append(trial.group)
            scores.append(trial.scores[column.name])
    means = {label: by_group(*found) for label, found in by_label.items()}
    first = means.get(summaries[0].label, {}) if summaries else {}
    return [
        None if number == 0 else paired_difference(means.get(summary.label, {}), first)
        for number, summary in enumerate(summaries)
    ]
