"""Dot plots of the demo's tables: each line with its 95% interval, and hollow its control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from easyref_core.evaluation.page.figures import COLOURS, INK, MUTED, PAPER, drawing
from easyref_core.evaluation.page.record import RunRecord, SummaryRecord
from easyref_core.evaluation.statistics import Estimate
from easyref_core.files import write_atomically, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEP, ENCODING = "seconds a step", "seconds of encoding"
_WIDTH, _ROW, _HEAD = 2.5, 0.3, 0.75  # inches of a column, a line, and around the lines
_LEFT = 1.5  # inches for the names of lines
_OWN, _CONTROL = COLOURS[0], COLOURS[1]


Lines = Mapping[str, tuple[SummaryRecord | None, SummaryRecord | None]]


def save_dots(
    run: RunRecord,
    path: Path,
    lines: Lines,
    columns: Sequence[str],
) -> Path:
    """Write a plot of a run's columns side by side.

    Args:
        lines: name -> a line of the run, and its control; None where there is none.
        columns: names of the run's columns, `STEP` and `ENCODING`.
    """
    from matplotlib.figure import Figure

    titles = {column.name: column.title for column in run.columns}
    count, height = len(columns), _ROW * len(lines) + _HEAD
    metadata = {"Software": None}
    with drawing():
        figure = Figure(figsize=(_WIDTH * count + _LEFT, height), facecolor=PAPER)
        for number, column in enumerate(columns):
            width = _WIDTH / (_WIDTH * count + _LEFT)
            start = _LEFT / (_WIDTH * count + _LEFT) + number * width
            axes = figure.add_axes((start, 0.3 / height, 0.9 * width, 1 - _HEAD / height))
            axes.set_title(titles.get(column, column), loc="left", fontsize=10, fontweight="bold")
            _draw(axes, lines, column, named=not number)
        with writing(path):
            write_atomically(
                path, lambda file: figure.savefig(file, format="png", dpi=200, metadata=metadata)
            )
    return path


def _draw(axes: Axes, lines: Lines, column: str, named: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, labelsize=8.5)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    for place, (own, control) in enumerate(lines.values()):
        for row, colour, filled in ((control, _CONTROL, False), (own, _OWN, True)):
            mean = _mean(row, column)
            if mean is None or (column in (STEP, ENCODING) and not filled):
                continue
            axes.plot([mean.low, mean.high], [place] * 2, color=colour, lw=1.2, alpha=0.7)
            axes.plot(
                [mean.value],
                [place],
                linestyle="",
                marker="o",
                markersize=5.5,
                markeredgecolor=colour,
                markeredgewidth=1.3,
                markerfacecolor=colour if filled else PAPER,
            )
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_yticks(range(len(lines)), list(lines) if named else [""] * len(lines), color=INK)
    axes.tick_params(axis="x", colors=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    if column in (STEP, ENCODING):
        axes.set_xlim(0, 1.1 * max(axes.get_xlim()[1], 1e-3))


def _mean(row: SummaryRecord | None, column: str) -> Estimate | None:
    if row is None:
        return None
    if column not in (STEP, ENCODING):
        return row.scores.get(column)
    time = row.seconds_a_step if column == STEP else row.seconds.get("encode")
    return None if time is None else Estimate(time, time, time, row.groups)
