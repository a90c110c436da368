"""Summaries as plots want them: a series for each method and setting, along what was varied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...errors import EasyRefError
from ...untrusted import number
from ..methods import METHODS
from ..metrics import Column
from ..statistics import Estimate
from ..trials import Variant
from .record import RunRecord, SummaryRecord, text_of

SECONDS = Column("seconds", "Seconds an image", "seconds", higher_is_better=False)
VARIED = ("references", "weight", "insert_before", "image_size", "steps", "guidance", "identity")
_TEXTS = ("adapter", "aggregation", "stages")
_DEFAULTS = asdict(Variant(""))
_WORDS = {"insert_before": "inserted before layer -{}", "image_size": "size {}"}
_TRADES = (
    *(("clip_i", "clip_t"), ("dino_i", "clip_t"), ("dinov2_i", "clip_t"), ("face_same", "clip_t")),
    ("identity", "scene"),
)
_MOST_SERIES = 8
_COLOURS, GREY = 8, 6


@dataclass(frozen=True)
class Point:
    """
    Attributes:
        at: the value that was varied.
        mean: with its interval; an interval of no width is not drawn.
    """

    at: float
    mean: Estimate
    summary: SummaryRecord


@dataclass(frozen=True)
class Series:
    """Points of one method, in the order of what was varied.

    Attributes:
        colour: index of the palette.
        level: it was measured at one setting, to be drawn as a line across.
    """

    label: str
    colour: int
    points: tuple[Point, ...]
    level: bool = False


def colours(run: RunRecord) -> dict[str, int]:
    """Method -> index of its colour: always the same for those that are built in."""
    names = dict.fromkeys([*(s.method for s in run.summaries), *(t.method for t in run.trials)])
    others = [name for name in names if name not in METHODS]
    found = {name: number for number, name in enumerate(METHODS)}
    used = {found[name] for name in names if name in found}
    free = [n for n in reversed(range(_COLOURS)) if n not in used] or [_COLOURS - 1]
    return found | {name: free[i % len(free)] for i, name in enumerate(others)}


def varied(summaries: Sequence[SummaryRecord]) -> list[str]:
    """The fields that take several values within one method."""
    return [
        field
        for field in (*VARIED, *_TEXTS)
        if any(
            len({_setting(s, field) for s in summaries if s.method == method}) > 1
            for method in {s.method for s in summaries}
        )
    ]


def mean_of(summary: SummaryRecord, column: Column) -> Estimate | None:
    """A variant's score, or its seconds an image; None where there is none."""
    if column is not SECONDS:
        return summary.scores.get(column.name)
    total = sum(summary.seconds.values())
    return Estimate(total, total, total, summary.groups) if summary.seconds else None


def series_over(
    run: RunRecord, field: str, column: Column, split: str = "", single: bool = False
) -> list[Series]:
    """How a column depends on a field; empty where no method was measured at two values of it,
    unless `single` points are wanted.

    Where several fields were varied, only the series at the others' usual values are kept if there
    were more than fit into a plot.
    """
    summaries = run.scope(split)
    others = [name for name in varied(summaries) if name != field]
    groups: dict[tuple[Any, ...], list[Point]] = {}
    for summary in summaries:
        mean, at = mean_of(summary, column), value_of(summary, field)
        if mean is not None and at is not None:
            key = (summary.method, *(_setting(summary, name) for name in others))
            groups.setdefault(key, []).append(Point(at, mean, summary))
    if len(groups) > _MOST_SERIES:
        groups = _usual(groups, others)
    found = []
    for points in list(groups.values())[: 2 * _MOST_SERIES]:
        points = sorted({point.at: point for point in points}.values(), key=lambda p: p.at)
        first = points[0].summary
        own = len(points) == 1 and _setting(first, field) == _plain(_DEFAULTS[field])
        found.append(
            Series(_label(first, others), colours(run)[first.method], tuple(points), level=own)
        )
    return found if single or any(len(s.points) > 1 for s in found) else []


def value_of(summary: SummaryRecord, field: str) -> float | None:
    """The value of a variant's field; where all references are used, their number."""
    try:
        value = number(summary.variant.get(field, _DEFAULTS[field]), field)
    except EasyRefError:
        return None
    if field == "references" and value == 0:
        return summary.references
    return value


def trade_pairs(run: RunRecord) -> list[tuple[Column, Column]]:
    """The columns between which a choice of the weight trades: likeness, and the prompt."""
    found = {column.name: column for column in run.columns}
    return [(found[a], found[b]) for a, b in _TRADES if a in found and b in found]


def _usual(groups: dict[Any, list[Point]], others: Sequence[str]) -> dict[Any, list[Point]]:
    """Each method's series at the usual values of the other fields, else its first one."""
    kept: dict[str, Any] = {}
    usual = tuple(_plain(_DEFAULTS[name]) for name in others)
    for method, *values in groups:
        if method not in kept or tuple(values) == usual:
            kept[method] = (method, *values)
    return {key: groups[key] for key in kept.values()}


def _label(summary: SummaryRecord, others: Sequence[str]) -> str:
    parts = [summary.method]
    for name in others:
        value = _setting(summary, name)
        if value != _plain(_DEFAULTS[name]):
            parts.append(_WORDS.get(name, f"{name} {{}}").format(value))
    return text_of(", ".join(parts), 40)


def _setting(summary: SummaryRecord, name: str) -> str:
    """A field's value as text; of a path its name."""
    value = _plain(summary.variant.get(name, _DEFAULTS[name]))
    return value.replace("\\", "/").rsplit("/", 1)[-1] if name == "adapter" else value


def _plain(value: Any) -> str:
    """A value as text: numbers alike whether whole or not."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:g}"
    return text_of(value, 200)
