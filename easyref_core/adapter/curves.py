"""Weights that change over the sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from ..errors import EasyRefError
from ..untrusted import number, shown
from ..untrusted import text as checked_text

Points = tuple[tuple[float, float], ...]

CUSTOM = "custom points"
MAX_FACTOR = 10.0  # of more, attention overflows in half precision
_SAMPLES = 17  # of an eased shape; the straight lines between are within 0.003 of it
_EASES: Mapping[str, Callable[[float], float]] = {
    "ease in": lambda p: p * p,
    "ease out": lambda p: p * (2 - p),
    "ease in-out": lambda p: p * p * (3 - 2 * p),
}
SHAPES = ("linear", *_EASES, CUSTOM)


@dataclass(frozen=True)
class WeightCurve:
    """Factors of the weight: straight lines between points, level before the first and after the
    last.

    Attributes:
        points: (part of the sampling done 0..1, factor -10..10), in rising order.

    Raises:
        EasyRefError: no point, places out of order, or numbers out of their range.
    """

    points: Points

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", _checked(self.points))

    def at(self, progress: float) -> float:
        """The factor where this part of the sampling is done."""
        return _between(self.points, progress)

    @property
    def constant(self) -> float | None:
        """The factor if it is the same during the whole sampling."""
        value = self.points[0][1]
        return value if all(other == value for _, other in self.points) else None


def curve_points(shape: str, start_value: float, end_value: float, text: str) -> Points:
    """The points of a named shape.

    Args:
        shape: one of `SHAPES`.
        start_value, end_value: factors at 0 and 1.
        text: the points of the shape `custom points`, as "0:1, 0.5:0.2, 1:0".

    Raises:
        EasyRefError: an unknown shape, a value out of its range, or points that cannot be read.
    """
    start_value = _factor(start_value, "start_value")
    end_value = _factor(end_value, "end_value")
    if shape == CUSTOM:
        return _parse_points(text)
    if shape == "linear":
        return ((0.0, start_value), (1.0, end_value))
    if shape not in _EASES:
        raise EasyRefError(
            f"There is no curve shape called {shown(shape)}. Choose one of {', '.join(SHAPES)}."
        )
    places = (number / (_SAMPLES - 1) for number in range(_SAMPLES))
    return tuple(
        (place, start_value + (end_value - start_value) * _EASES[shape](place)) for place in places
    )


def _parse_points(text: str) -> Points:
    """Read "0:1, 0.5:0.2, 1:0"."""
    pieces = [piece.strip() for piece in checked_text(text, "points").replace("\n", ",").split(",")]
    return tuple(_parse_point(piece) for piece in pieces if piece)


def _parse_point(piece: str) -> tuple[float, float]:
    place, colon, value = piece.partition(":")
    try:
        if not colon:
            raise ValueError(piece)
        return float(place), float(value)
    except ValueError:
        raise EasyRefError(
            f"points: {shown(piece)} is not a point. Write place:factor with numbers, points "
            "separated by commas, such as 0:1, 0.5:0.2, 1:0."
        ) from None


def _factor(value: float, name: str) -> float:
    return number(value, name, -MAX_FACTOR, MAX_FACTOR)


def _checked(points: Points) -> Points:
    if not isinstance(points, (tuple, list)) or not all(
        isinstance(point, (tuple, list)) and len(point) == 2 for point in points
    ):
        raise EasyRefError(f"points are {shown(points)}; pairs of a place and a factor are needed.")
    if not points:
        raise EasyRefError("points: there is no point. Write at least one, such as 0:1.")
    hint = "0 is the start of the sampling and 1 its end."
    places = [number(place, "points: a place", 0, 1, hint) for place, _ in points]
    factors = [
        _factor(value, f"points: the factor at {place:g}")
        for place, (_, value) in zip(places, points, strict=True)
    ]
    points = tuple(zip(places, factors, strict=True))
    for (before, _), (place, _) in pairwise(points):
        if place <= before:
            raise EasyRefError(
                f"points: the point at {place:g} comes after the one at {before:g}. Write the "
                "points in rising order, each place once."
            )
    return points


def _between(points: Points, place: float) -> float:
    if place <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if place <= right:
            return low + (high - low) * (place - left) / (right - left)
    return points[-1][1]
