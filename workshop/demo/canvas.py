"""A surface for smooth flat shapes: drawn larger, then downscaled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

_OVERSAMPLING = 3


class Canvas:
    """An image to draw on in its own pixels, with oversampling inside."""

    def __init__(self, width: int, height: int, top: Colour, bottom: Colour) -> None:
        self.size = (width, height)
        strip = Image.new("RGB", (1, 256))
        for y in range(256):
            strip.putpixel((0, y), mixed(top, bottom, y / 255))
        large = (width * _OVERSAMPLING, height * _OVERSAMPLING)
        self._image = strip.resize(large, Image.Resampling.BILINEAR)
        self._draw = ImageDraw.Draw(self._image)

    def ellipse(self, centre: Point, rx: float, ry: float, colour: Colour) -> None:
        x, y = centre
        self._draw.ellipse(_scaled([(x - rx, y - ry), (x + rx, y + ry)]), fill=colour)

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        self._draw.polygon(_scaled(points), fill=colour)

    def curve(self, points: Sequence[Point], radii: Sequence[float], colour: Colour) -> None:
        """A round brush along a Bezier curve of the points, with changing radius."""
        length = sum(math.dist(a, b) for a, b in pairwise(points))
        steps = max(1, math.ceil(length / max(0.5, 0.25 * min(radii))))
        for step in range(steps + 1):
            share = step / steps
            r = _along([(radius, 0.0) for radius in radii], share)[0]
            self.ellipse(_along(points, share), r, r, colour)

    def hills(self, level: float, swing: float, waves: float, phase: float, colour: Colour) -> None:
        """Fill everything below a wavy line."""
        width, height = self.size
        line = [
            (float(x), level + swing * math.sin(phase + waves * 2 * math.pi * x / width))
            for x in range(0, width + 8, 8)
        ]
        self.polygon([*line, (width + 8.0, float(height)), (0.0, float(height))], colour)

    def finished(self) -> Image.Image:
        return self._image.resize(self.size, Image.Resampling.LANCZOS)


def mixed(first: Colour, second: Colour, share: float) -> Colour:
    """A colour between two, `share` of the way to the second."""
    r, g, b = (round(a + (z - a) * share) for a, z in zip(first, second, strict=True))
    return r, g, b


def _along(points: Sequence[Point], share: float) -> Point:
    """A point on the Bezier curve that the given points control."""
    current = list(points)
    while len(current) > 1:
        current = [
            (a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share)
            for a, b in pairwise(current)
        ]
    return current[0]


def _scaled(points: Sequence[Point]) -> list[Point]:
    return [(x * _OVERSAMPLING, y * _OVERSAMPLING) for x, y in points]
