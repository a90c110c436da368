"""The plot: shares against their bars, and time against the number of references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from easyref_core.evaluation.page.figures import COLOURS, INK, MUTED, PAPER, drawing
from easyref_core.files import write_atomically, writing

from .timing import Row


def draw(rows: Sequence[Row], counts: Mapping[int, float], path: Path) -> Path:
    from matplotlib.figure import Figure

    with drawing():
        figure = Figure(figsize=(9, 0.32 * len(rows) + 0.9), facecolor=PAPER)
        shares = figure.add_axes((0.3, 0.16, 0.33, 0.7))
        _draw_shares(shares, rows)
        line = figure.add_axes((0.72, 0.16, 0.25, 0.7))
        line.set_title("seconds by references", loc="left", fontsize=10, fontweight="bold")
        line.plot([*counts], [*counts.values()], color=COLOURS[0], marker="o", markersize=4)
        line.set_xlim(left=0)
        line.set_ylim(bottom=0)
        line.locator_params(nbins=5, integer=True)
        for axes in (shares, line):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(length=0, labelsize=8, colors=INK)
        with writing(path):
            write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=160))
    return path


def _draw_shares(axes: object, rows: Sequence[Row]) -> None:
    title = "share of a first encoding, or of a step"
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    places = range(len(rows))
    axes.barh(places, [row.share for row in rows], height=0.5, color=COLOURS[0])
    for place, row in zip(places, rows, strict=True):
        axes.plot([row.bar] * 2, [place - 0.34, place + 0.34], color=INK, linewidth=1.5)
        right = max(row.bar, row.share)
        axes.annotate(
            f"bar {row.bar:g}",
            (right, place),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=7,
            color=MUTED,
            va="center",
        )
    axes.locator_params(axis="x", nbins=4)
    axes.set_yticks(places, [row.measure for row in rows])
    axes.invert_yaxis()
