"""Plots as SVG whose text is text, drawn by matplotlib, and as PNG for documents.

Colours are those of a light page. In a page's SVG each becomes one of the variables of page.css, so
that a dark page, and print, have their own.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..metrics import Column
from .placing import PlotLabel, label_ends, label_points
from .series import Point, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One of each method, by `series.colours`; told apart by those who do not see all colours, too.
COLOURS = (
    *("#1463d8", "#8a3c00", "#0a9a74", "#c2185b"),
    *("#3b0f70", "#b07d00", "#737a85", "#0e7490"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
INK, MUTED, RULE, PAPER = "#16181d", "#5a616d", "#e3e6ea", "#ffffff"
_VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper"}
_VARIABLES |= {colour: f"m{number}" for number, colour in enumerate(COLOURS)}
_SMALL, _APART = 8.5, 2.2  # points
_FAR = 0.6  # of the axis: how far off a level may lie that is drawn
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "easyref",
    "text.parse_math": False,  # names are names, whatever dollars they hold
    "axes.unicode_minus": False,
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
}


@contextmanager
def drawing() -> Iterator[None]:
    """matplotlib with the settings of the plots; its own are as before afterwards."""
    import matplotlib

    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # letters that its own font lacks
        yield


def plot_lines(
    series: Sequence[Series], column: Column, field: str, size: tuple[float, float] = (4.1, 2.9)
) -> Figure:
    """A column against what was varied, one line a series, labelled at its end.

    Args:
        field: of the variants, for the axis.
        size: inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    draw_lines(add_axes(figure, ends_width(series)), series, column, field)
    return figure


def add_axes(
    figure: Figure, right: float, left: float = 36, top: float = 10, part: tuple[int, int] = (0, 1)
) -> Axes:
    """Axes with room around them. matplotlib's layouts would draw everything twice.

    Args:
        right, left, top: points around the axes.
        part: number of this one, and of all side by side.
    """
    number, count = part
    width, height = (72 * inches for inches in figure.get_size_inches())
    start, share = number * width / count, width / count
    bottom = 36.0
    return figure.add_axes(
        (
            (start + left) / width,
            bottom / height,
            (share - left - right) / width,
            (height - bottom - top) / height,
        )
    )


def ends_width(series: Sequence[Series]) -> float:
    """Points that the labels at the ends of lines need."""
    return 18 + 5.2 * max(len(one.label) + (8 if one.level else 0) for one in series)


def draw_lines(axes: Axes, series: Sequence[Series], column: Column, field: str) -> None:
    """See `plot_lines`."""
    lines = [one for one in series if not one.level]
    _scale(axes, sorted({point.at for one in lines for point in one.points}))
    _plain(axes)
    axes.set_xlabel(NAMES.get(field, field))
    axes.set_xmargin(0.09)  # lines are drawn apart, beyond their values
    labels = []
    for number, one in enumerate(lines):
        _draw_line(axes, one, number - (len(lines) - 1) / 2)
        end = one.points[-1].mean.value
        labels.append(PlotLabel(one.label, (one.points[-1].at, end), COLOURS[one.colour]))
    if column.scale == "seconds":
        _start_at_zero(axes, [p.mean.value for one in series for p in one.points])
    else:
        axes.autoscale_view()
    low, high = axes.get_ylim()
    for one in series:
        if one.level:
            labels.append(_draw_level(axes, one, low, high, column.scale == "seconds"))
    label_ends(axes, labels)


def _draw_line(axes: Axes, one: Series, place: float) -> None:
    """A series and its intervals.

    Args:
        place: among the others, which are drawn a little apart, as their intervals would cover
            each other.
    """
    from matplotlib.transforms import ScaledTranslation

    colour, at = COLOURS[one.colour], [point.at for point in one.points]
    axes.update_datalim([(p.at, y) for p in one.points for y in (p.mean.low, p.mean.high)])
    moved = ScaledTranslation(_APART * place / 72, 0, axes.figure.dpi_scale_trans)
    apart = axes.transData + moved
    for x, mean in ((point.at, point.mean) for point in one.points):
        if mean.high > mean.low:
            axes.plot(
                [x, x], [mean.low, mean.high], color=colour, lw=0.8, alpha=0.7, transform=apart
            )
    axes.plot(
        at,
        [point.mean.value for point in one.points],
        transform=apart,
        color=colour,
        linewidth=1.8,
        marker=MARKERS[one.colour],
        markersize=4.5,
        markeredgecolor=PAPER,
        markeredgewidth=0.7,
    )


def _draw_level(axes: Axes, one: Series, low: float, high: float, always: bool) -> PlotLabel:
    """A line across for what was measured once; one that would flatten all others is only named.

    Args:
        low, high: ends of the axis as the others need it.
    """
    colour, value = COLOURS[one.colour], one.points[0].mean.value
    reach = _FAR * (high - low)
    if always or low - reach <= value <= high + reach:
        axes.axhline(value, color=colour, linewidth=1.2, linestyle=(0, (4, 3)))
        return PlotLabel(one.label, (0, value), colour)
    arrow, edge = ("↓", low) if value < low else ("↑", high)
    axes.set_ylim(low, high)
    return PlotLabel(f"{one.label} {value:.3g} {arrow}", (0, edge), colour)


def plot_trade(
    lines: Sequence[tuple[Series, Sequence[Point]]],
    identity: Column,
    prompt: Column,
    size: tuple[float, float] = (4.9, 3.9),
) -> Figure:
    """Identity against prompt: a curve for each series, its points labelled with what was varied.

    Args:
        lines: series of the identity column, with the same variants' points of the prompt column.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    axes = add_axes(figure, 8, left=52)
    _plain(axes)
    axes.grid(axis="x")
    axes.set_xlabel(f"{prompt.title} (prompt) →")
    axes.set_ylabel(f"{identity.title} (identity) →")
    curves = [
        [(x.mean.value, y.mean.value) for x, y in zip(prompts, one.points, strict=True)]
        for one, prompts in lines
    ]
    everything = [place for curve in curves for place in curve]
    names, values = [], []
    for (one, prompts), curve in zip(lines, curves, strict=True):
        colour = COLOURS[one.colour]
        axes.plot(*zip(*curve, strict=True), color=colour, linewidth=1.4, alpha=0.75, zorder=2)
        for x, y, place in zip(prompts, one.points, curve, strict=True):
            _draw_point(axes, x, y, one.colour, filled=not _is_beaten(place, everything))
        if len(curve) > 1:
            values += [
                PlotLabel(f"{point.at:g}", place, colour)
                for point, place in zip(one.points, curve, strict=True)
            ]
        names.append(PlotLabel(one.label, max(curve, key=lambda p: p[1]), colour, "bold"))
    axes.margins(0.14)
    label_points(axes, [*values, *names], curves)
    return figure


def _draw_point(axes: Axes, x: Point, y: Point, colour: int, filled: bool) -> None:
    """A variant, with a thin cross for its intervals."""
    thin = {"color": COLOURS[colour], "linewidth": 0.8, "alpha": 0.35, "zorder": 1}
    axes.plot([x.mean.low, x.mean.high], [y.mean.value] * 2, **thin)
    axes.plot([x.mean.value] * 2, [y.mean.low, y.mean.high], **thin)
    axes.plot(
        [x.mean.value],
        [y.mean.value],
        linestyle="",
        marker=MARKERS[colour],
        markersize=6,
        markeredgecolor=COLOURS[colour],
        markeredgewidth=1.4,
        markerfacecolor=COLOURS[colour] if filled else PAPER,
        zorder=3,
    )


def _is_beaten(place: tuple[float, float], others: Sequence[tuple[float, float]]) -> bool:
    """Whether another point is better in one and not worse in the other."""
    x, y = place
    return any(a >= x and b >= y and (a, b) != place for a, b in others)


NAMES = {
    "references": "number of references",
    "weight": "weight of the references",
    "insert_before": "reference tokens enter before this many last layers",
    "image_size": "size at which references are encoded (pixels)",
    "steps": "sampling steps",
    "guidance": "guidance scale",
    "identity": "weight of identity",
}


def to_svg(figure: Figure, prefix: str) -> str:
    """An SVG element for a page: colours are CSS variables, the font is the page's.

    Args:
        prefix: of its ids, which are unique in a page.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 aria-hidden="true"', svg, count=1)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r"font: (?:(bold|\d+) )?([\d.]+px) [^;\"]+", _font, svg)  # matplotlib up to 3.10
    svg = re.sub(r"font-family: [^;\"]+;? ?", "", svg)
    return re.sub(r"#[0-9a-f]{6}\b", lambda m: _variable(m[0]), svg)


def _font(found: re.Match[str]) -> str:
    weight = f"font-weight: {found[1]}; " if found[1] else ""
    return f"{weight}font-size: {found[2]}"


def _variable(colour: str) -> str:
    name = _VARIABLES.get(colour)
    return f"var(--{name})" if name else colour


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, labelsize=_SMALL)
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Ticks where something was measured, and doubling steps side by side."""
    from matplotlib.ticker import NullLocator

    if len(values) > 2 and values[0] > 0 and values[-1] >= 8 * values[0]:
        axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    shown = values if len(values) <= 9 else [values[0], values[len(values) // 2], values[-1]]
    axes.set_xticks(shown, [f"{value:g}" for value in shown])


def _start_at_zero(axes: Axes, values: Sequence[float]) -> None:
    """An axis of times: from 0, or doubling where they differ by more than twenty times."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.autoscale_view()
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(which="both", length=0)
    elif min(values) >= 0:
        axes.set_ylim(bottom=0)
