"""Which plots a run gets, each with the words that say what it shows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..metrics import Column
from .figures import NAMES, drawing, plot_lines, plot_trade, to_svg
from .record import RunRecord
from .score_table import number_text
from .series import (
    SECONDS,
    VARIED,
    Point,
    Series,
    mean_of,
    series_over,
    trade_pairs,
    varied,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_COLUMNS = 8


@dataclass(frozen=True)
class Plot:
    """
    Attributes:
        svg: an element.
        alt: all its numbers, in words.
    """

    title: str
    svg: str
    alt: str


@dataclass(frozen=True)
class PlotGroup:
    """Plots that belong together."""

    key: str
    title: str
    text: str
    plots: tuple[Plot, ...]


def all_plots(run: RunRecord, split: str = "") -> list[PlotGroup]:
    """Plots over the groups of a split, empty for all: how scores depend on what was varied, and
    how identity and prompt trade off.

    Raises:
        ImportError: there is no matplotlib.
    """
    with drawing():
        groups = [_trade_offs(run, split), *(_over(run, field, split) for field in VARIED)]
    return [group for group in groups if group.plots]


def trade_field(run: RunRecord) -> str:
    """What the curves of a trade-off follow: the weight where it was varied."""
    fields = varied(run.summaries)
    return next((name for name in ("weight", *VARIED) if name in fields), "weight")


def trade_lines(
    run: RunRecord, identity: Column, prompt: Column, split: str = ""
) -> list[tuple[Series, list[Point]]]:
    """The series of a trade-off in the identity column, with the same variants' prompt scores;
    variants of which nothing was varied are a point each.
    """
    found = []
    for one in series_over(run, trade_field(run), identity, split, single=True):
        pairs = [
            (point, Point(point.at, mean, point.summary))
            for point in one.points
            if (mean := mean_of(point.summary, prompt)) is not None
        ]
        if pairs:
            points = tuple(point for point, _ in pairs)
            found.append((replace(one, points=points), [prompt for _, prompt in pairs]))
    return found


def _trade_offs(run: RunRecord, split: str) -> PlotGroup:
    plots = []
    field = trade_field(run)
    for identity, prompt in trade_pairs(run):
        lines = trade_lines(run, identity, prompt, split)
        if sum(len(prompts) for _, prompts in lines) > 1:
            figure = plot_trade(lines, identity, prompt)
            plots.append(
                _plot(
                    f"{identity.title} against {prompt.title}",
                    *(figure, f"trade-{split}-{identity.name}"),
                    alt="; ".join(
                        f"{one.label}: "
                        + ", ".join(
                            f"{y.at:g}: {_number(x.mean.value)} and {_number(y.mean.value)}"
                            for x, y in zip(prompts, one.points, strict=True)
                        )
                        for one, prompts in lines
                    ),
                )
            )
    text = (
        "Up is more like the target, right is closer to the prompt. Filled marks are worth "
        "choosing: no other is better in both. Thin lines are 95% intervals."
    )
    if field in varied(run.summaries):
        text += f" Numbers beside the marks: {NAMES[field]}."
    return PlotGroup("trade", "Identity against prompt", text, tuple(plots))


def _over(run: RunRecord, field: str, split: str) -> PlotGroup:
    plots, dashed = [], False
    for column in (*run.columns[:_MOST_COLUMNS], SECONDS):
        series = series_over(run, field, column, split)
        if series:
            dashed = dashed or any(one.level for one in series)
            figure = plot_lines(series, column, field)
            alt = "; ".join(
                f"{one.label}: "
                + ", ".join(f"{p.at:g}: {_number(p.mean.value)}" for p in one.points)
                for one in series
            )
            title = f"{column.title} against {field.replace('_', ' ')}"
            plots.append(_plot(title, figure, f"{field}-{split}-{column.name}", alt))
    text = "Means over groups; thin lines are 95% intervals."
    if dashed:
        text += " Dashed: measured at one setting only."
    return PlotGroup(field, f"Against the {NAMES[field]}", text, tuple(plots))


def _plot(title: str, figure: Figure, name: str, alt: str) -> Plot:
    digest = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]
    return Plot(title, to_svg(figure, f"p{digest}-"), f"{title}. {alt}")


def _number(value: float) -> str:
    return number_text(value, abs(value))
