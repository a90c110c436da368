"""Where labels of a plot go, so that they cover neither each other nor what is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SMALL = 8.5  # points, the letters
_GAP, _AWAY, _MARK = 11.0, 8.0, 5.0  # points between lines of text, from a mark, of its radius
_LETTER_WIDTH, _LETTER_HEIGHT = 5.4, 9.0
_STEPS = 12  # along a line, by which it is kept free
_SIDES = ((1, 0), (0, 1), (-1, 0), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))

_Place = tuple[float, float]
_Box = tuple[float, float, float, float]  # left, bottom, right, top


@dataclass(frozen=True)
class PlotLabel:
    """A text at a point of a plot, in the units of its axes."""

    text: str
    place: _Place
    colour: str
    weight: str = "normal"


def label_ends(axes: Axes, labels: Sequence[PlotLabel]) -> None:
    """Write labels right of the axes at the height of the lines' ends, moved apart as needed."""
    from matplotlib.transforms import blended_transform_factory

    labels = sorted(labels, key=lambda label: label.place[1])
    heights = [y for _, y in _in_points(axes, [label.place for label in labels])]
    right = blended_transform_factory(axes.transAxes, axes.transData)
    for label, height, moved in zip(labels, heights, spread(heights, _GAP), strict=True):
        line = {"arrowstyle": "-", "color": label.colour, "lw": 0.6, "alpha": 0.6}
        axes.annotate(
            label.text,
            (1.0, label.place[1]),
            xycoords=right,
            xytext=(10, moved - height),
            textcoords="offset points",
            va="center",
            color=label.colour,
            fontsize=_SMALL,
            annotation_clip=False,
            arrowprops=line | {"shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)},
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights, moved as little as needed to lie `gap` apart."""
    blocks: list[tuple[float, int]] = []  # the middle of labels that touch, and their number
    for height in heights:
        middle, count = height, 1
        while blocks and middle - blocks[-1][0] < gap * (count + blocks[-1][1]) / 2:
            other, more = blocks.pop()
            middle = (middle * count + other * more) / (count + more)
            count += more
        blocks.append((middle, count))
    return [
        middle + gap * (number - (count - 1) / 2)
        for middle, count in blocks
        for number in range(count)
    ]


def label_points(
    axes: Axes, labels: Sequence[PlotLabel], lines: Sequence[Sequence[_Place]]
) -> None:
    """Write each label beside its point, on the side where least lies in the way.

    Args:
        lines: what else is drawn, as points joined by lines, in the units of the axes.
    """
    frame, unit = axes.bbox.frozen(), 72 / axes.figure.dpi
    limits = (frame.x0 * unit, frame.y0 * unit, frame.x1 * unit, frame.y1 * unit)
    taken: list[_Box] = []
    for line in lines:
        points = _in_points(axes, line)
        taken += [_around(point, _MARK) for point in points]
        taken += [_around(point, 1.0) for pair in pairwise(points) for point in _between(*pair)]
    places = _in_points(axes, [label.place for label in labels])
    for label, place in zip(labels, places, strict=True):
        boxes = {side: _beside(place, len(label.text), side) for side in _SIDES}
        across, up = min(_SIDES, key=lambda side: _cost(boxes[side], taken, limits))
        taken.append(boxes[across, up])
        axes.annotate(
            label.text,
            label.place,
            xytext=(_AWAY * across, _AWAY * up),
            textcoords="offset points",
            ha={-1: "right", 0: "center", 1: "left"}[across],
            va={-1: "top", 0: "center", 1: "bottom"}[up],
            color=label.colour,
            fontsize=_SMALL,
            fontweight=label.weight,
        )


def _in_points(axes: Axes, places: Sequence[_Place]) -> list[_Place]:
    """Where places lie in the figure, in points."""
    axes.autoscale_view()  # else the limits are computed when it is drawn
    unit = 72 / axes.figure.dpi
    found = (axes.transData.transform(place) for place in places)
    return [(float(x) * unit, float(y) * unit) for x, y in found]


def _around(place: _Place, radius: float) -> _Box:
    x, y = place
    return x - radius, y - radius, x + radius, y + radius


def _between(first: _Place, last: _Place) -> list[_Place]:
    parts = [number / _STEPS for number in range(1, _STEPS)]
    return [
        (first[0] + part * (last[0] - first[0]), first[1] + part * (last[1] - first[1]))
        for part in parts
    ]


def _beside(place: _Place, letters: int, side: tuple[int, int]) -> _Box:
    """The box of a text beside a place."""
    width, before = _LETTER_WIDTH * letters, {-1: 1.0, 0: 0.5, 1: 0.0}
    left = place[0] + _AWAY * side[0] - width * before[side[0]]
    bottom = place[1] + _AWAY * side[1] - _LETTER_HEIGHT * before[side[1]]
    return left, bottom, left + width, bottom + _LETTER_HEIGHT


def _cost(box: _Box, taken: Sequence[_Box], limits: _Box) -> float:
    """How much of a text lies over something, in square points; outside the axes counts more."""
    outside = (limits[0] - box[0], limits[1] - box[1], box[2] - limits[2], box[3] - limits[3])
    over = (
        max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
        * max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
        for other in taken
    )
    return math.fsum(over) + 20 * sum(max(0.0, length) for length in outside)
