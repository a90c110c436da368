"""The plot: shares and amounts as parts of their bars, and time against tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from easyref_core.evaluation.page.figures import COLOURS, INK, MUTED, PAPER, drawing
from easyref_core.files import write_atomically, writing

from .encoding import straight_line
from .table import shown
from .timing import Amount, Row

_ROW, _ABOVE, _BELOW = 0.26, 0.4, 0.5  # inches


def draw(
    rows: Sequence[Row],
    amounts: Sequence[Amount],
    counts: Mapping[int, tuple[int, float]],
    path: Path,
) -> Path:
    from matplotlib.figure import Figure

    barred = [one for one in amounts if one.bar is not None]
    upper, lower = len(rows) * _ROW, len(barred) * _ROW
    height = upper + lower + 2 * (_ABOVE + _BELOW)
    with drawing():
        figure = Figure(figsize=(13, height), facecolor=PAPER)
        shares = figure.add_axes((0.4, 1 - (_ABOVE + upper) / height, 0.3, upper / height))
        _draw_shares(shares, rows)
        parts = figure.add_axes((0.4, _BELOW / height, 0.3, lower / height))
        _draw_amounts(parts, barred)
        line = figure.add_axes((0.79, 1 - (_ABOVE + 2.4) / height, 0.19, 2.4 / height))
        _draw_counts(line, counts)
        for axes in (shares, parts, line):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(length=0, labelsize=8, colors=INK)
        with writing(path):
            write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=160))
    return path


def _draw_shares(axes: Any, rows: Sequence[Row]) -> None:
    _title(axes, "share of a first encoding, or of a step")
    colours = [COLOURS[6] if row.bar is None else COLOURS[0] for row in rows]
    axes.barh(range(len(rows)), [row.share for row in rows], height=0.5, color=colours)
    for place, row in enumerate(rows):
        if row.bar is not None:
            axes.plot([row.bar] * 2, [place - 0.34, place + 0.34], color=INK, linewidth=1.5)
        text = f"{row.share:.3f}" + ("" if row.bar is None else f", bar {row.bar:g}")
        _note(axes, text, max(row.bar or 0, row.share), place)
    axes.locator_params(axis="x", nbins=4)
    _names(axes, [row.measure for row in rows])


def _draw_amounts(axes: Any, amounts: Sequence[Amount]) -> None:
    _title(axes, "other measures, as shares of their bars")
    shares = [one.value / one.bar for one in amounts]
    axes.barh(range(len(amounts)), shares, height=0.5, color=COLOURS[0])
    axes.axvline(1, color=INK, linewidth=1.5)
    for place, (one, share) in enumerate(zip(amounts, shares, strict=True)):
        _note(axes, f"{shown(one)}, bar {one.bar:g}", max(share, 1), place)
    axes.locator_params(axis="x", nbins=4)
    _names(axes, [one.measure for one in amounts])


def _draw_counts(axes: Any, counts: Mapping[int, tuple[int, float]]) -> None:
    _title(axes, "seconds by references")
    start, slope, _ = straight_line(counts)
    tokens = [read for read, _ in counts.values()]
    line = [start + slope * read for read in tokens]
    axes.plot([*counts], line, color=MUTED, linewidth=1, linestyle="--")
    seconds = [taken for _, taken in counts.values()]
    axes.plot([*counts], seconds, color=COLOURS[0], marker="o", markersize=4, linestyle="")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.locator_params(nbins=5, integer=True)
    axes.set_xlabel("dots: measured; line: straight in tokens", fontsize=8)


def _title(axes: Any, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, fontweight="bold")


def _note(axes: Any, text: str, right: float, place: int) -> None:
    where = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(text, (right, place), fontsize=7, color=MUTED, **where)


def _names(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
