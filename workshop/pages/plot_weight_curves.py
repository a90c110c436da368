"""Plots the shapes of EasyRef Weight Curve for its help page.

python -m workshop.pages.plot_weight_curves
"""

from __future__ import annotations

from matplotlib.figure import Figure

from easyref_core.adapter.curves import CUSTOM, SHAPES, curve_points

from ..comfyui.find_comfyui import PACK

PICTURE = PACK / "web" / "docs" / "images" / "weight_curve.webp"
POINTS = "0:1, 0.3:0.8, 0.4:0.2, 1:0"
BACKGROUND, GRID, TEXT = "#1d1f26", "#3a3f4b", "#c9cdd8"
COLOURS = ("#64b5f6", "#5fd6a4", "#ffc857", "#f48fb1", "#b39ddb")


def plot_weight_curves() -> Figure:
    """All shapes from 1 to 0, in the colours of ComfyUI's dark theme."""
    figure = Figure(figsize=(4.3, 2.5), layout="constrained", facecolor=BACKGROUND)
    axes = figure.subplots()
    axes.set_facecolor(BACKGROUND)
    for shape, colour in zip(SHAPES, COLOURS, strict=True):
        positions, factors = zip(*curve_points(shape, 1.0, 0.0, POINTS), strict=True)
        label = f"{shape}: {POINTS}" if shape == CUSTOM else shape
        axes.plot(positions, factors, color=colour, linewidth=2, label=label)
    axes.set_xlabel("position in the sampling (0: noise, 1: done)", color=TEXT, fontsize=8)
    axes.set_ylabel("factor of the weight", color=TEXT, fontsize=8)
    axes.tick_params(colors=TEXT, labelsize=8, length=0)
    axes.grid(color=GRID, linewidth=0.7)
    axes.spines[:].set_visible(False)
    figure.legend(
        loc="outside upper center",
        ncols=2,
        frameon=False,
        labelcolor=TEXT,
        fontsize=8,
        borderaxespad=0.3,
    )
    return figure


if __name__ == "__main__":
    plot_weight_curves().savefig(PICTURE, dpi=200)
    print(PICTURE)
