"""A run's table and plot for documents: Markdown, PNG, SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import EasyRefError
from ...files import write_atomically, writing
from ..metrics import Column
from .figures import PAPER, add_axes, draw_lines, drawing, ends_width
from .record import RunRecord, SummaryRecord
from .score_table import MISSING, best_of, number_text, seconds_text
from .series import SECONDS, series_over

_INCHES = 3.1, 2.7  # of one plot beside others
_ARROWS = {True: " ↑", False: " ↓", None: ""}


def markdown_table(
    run: RunRecord,
    columns: Sequence[str] = (),
    split: str = "",
    seconds: bool = True,
    kind: str = "",
    name: Callable[[SummaryRecord], str] = lambda row: row.label,
) -> str:
    """A run's scores as a Markdown table; the best of each column is bold.

    Args:
        columns: names; empty for those of which higher is better.
        split: of the groups; empty for all.
        seconds: whether columns say how long an image, its encoding and a step of its sampling
            took.
        kind: of the groups; empty for all.
        name: of a line, in place of its label.

    Raises:
        EasyRefError: a column that the run does not have.
    """
    chosen = _columns(run, columns)
    rows = run.scope(split, kind)
    lines = [["method", *(column.title + _ARROWS[column.higher_is_better] for column in chosen)]]
    if seconds:
        lines[0] += ["seconds an image", "of encoding", "a step"]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for row in rows:
        lines.append([_escaped(name(row)), *(_cell(row, c, rows) for c in chosen)])
        if seconds:
            whole = sum(row.seconds.values()) if row.seconds else None
            times = (whole, row.seconds.get("encode"), row.seconds_a_step)
            lines[-1] += [MISSING if time is None else seconds_text(time) for time in times]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def save_plot(
    run: RunRecord,
    path: str | Path,
    field: str = "references",
    columns: Sequence[str] = (),
    split: str = "",
    seconds: bool = True,
) -> Path:
    """Write plots of columns against what was varied, side by side, as PNG or SVG on white.

    Args:
        path: its extension says which.
        field: of the variants.
        columns, split: see `markdown_table`.
        seconds: whether seconds an image are plotted, too.

    Raises:
        EasyRefError: a column that the run does not have; nothing was varied; the file cannot be
            written.
        ImportError: there is no matplotlib.
    """
    from matplotlib.figure import Figure

    path = Path(path)
    wanted = [*_columns(run, columns), *([SECONDS] if seconds else [])]
    series = {column: series_over(run, field, column, split) for column in wanted}
    plotted = [column for column in wanted if series[column]]
    if not plotted:
        raise EasyRefError(
            f"No method of the run was measured at two values of {field}. Vary it: "
            f"easyref bench --vary {field}=..."
        )
    with drawing():
        figure = Figure(figsize=(_INCHES[0] * len(plotted), _INCHES[1]), facecolor=PAPER)
        for number, column in enumerate(plotted):
            part = (number, len(plotted))
            axes = add_axes(figure, ends_width(series[column]), top=26, part=part)
            axes.set_title(column.title, loc="left", fontsize=10, fontweight="bold")
            draw_lines(axes, series[column], column, field)
        kind = path.suffix.removeprefix(".")
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        with writing(path):
            write_atomically(
                path, lambda file: figure.savefig(file, format=kind, dpi=200, metadata=metadata)
            )
    return path


def _columns(run: RunRecord, names: Sequence[str]) -> list[Column]:
    if not names:
        return [column for column in run.columns if column.higher_is_better]
    found = {column.name: column for column in run.columns}
    missing = [name for name in names if name not in found]
    if missing:
        raise EasyRefError(
            f"The run has no column {', '.join(missing)}; it has {', '.join(found)}."
        )
    return [found[name] for name in names]


def _cell(row: SummaryRecord, column: Column, rows: Sequence[SummaryRecord]) -> str:
    mean = row.scores.get(column.name)
    if mean is None:
        return MISSING
    value, low, high = (number_text(v, abs(mean.high)) for v in (mean.value, mean.low, mean.high))
    is_best = len(rows) > 1 and mean.value == best_of(column, rows)
    return f"{f'**{value}**' if is_best else value} [{low}, {high}]"


def _escaped(text: str) -> str:
    """A name as it may stand in a Markdown table."""
    for character in "\\`*_[]<>|":
        text = text.replace(character, f"\\{character}")
    return text
