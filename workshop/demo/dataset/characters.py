"""Drawn characters: an identity is five attributes; drawn upright on a transparent background."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import product

from PIL import Image, ImageChops, ImageDraw

from ..canvas import Colour, Point, mixed

SHAPES = ("round", "square", "triangle", "star", "flower", "drop")
COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink")
PATTERNS = ("plain", "stripes", "dots", "belly")
EYES = ("beady", "goggle", "sleepy", "single")
ACCESSORIES = ("top hat", "party hat", "crown", "bow", "antennae", "scarf")

PAINT: dict[str, Colour] = {
    "red": (214, 52, 48),
    "orange": (240, 136, 40),
    "yellow": (246, 208, 60),
    "green": (84, 168, 70),
    "teal": (40, 160, 160),
    "blue": (58, 98, 204),
    "purple": (132, 76, 178),
    "pink": (240, 136, 178),
}
_INK: Colour = (40, 32, 44)
_WHITE: Colour = (255, 255, 255)

# Characters are drawn in a square of this many units, the body around its middle.
_UNITS = 256
_MIDDLE = 128.0
_BODY = 70.0
_CENTRE = 142.0  # below the middle, so that tall hats fit
_FACE = 128.0  # height of the eyes, where all shapes are wide enough
_TOP: dict[str, float] = {
    "round": 72,
    "square": 76,
    "triangle": 68,
    "star": 66,
    "flower": 68,
    "drop": 62,
}


@dataclass(frozen=True, order=True)
class Identity:
    """The attributes that all images of a character share."""

    shape: str
    colour: str
    pattern: str
    eyes: str
    accessory: str

    @property
    def words(self) -> str:
        """The identity in a caption."""
        pattern = "" if self.pattern == "plain" else f" with {self.pattern}"
        return f"a {self.colour} {self.shape} creature{pattern}, {self.eyes} eyes, {self.accessory}"


ATTRIBUTES = tuple(f.name for f in fields(Identity))


@lru_cache(maxsize=1)
def all_identities() -> tuple[Identity, ...]:
    """All combinations of attributes, in a fixed order."""
    kinds = (SHAPES, COLOURS, PATTERNS, EYES, ACCESSORIES)
    return tuple(Identity(*values) for values in product(*kinds))


def draw_character(identity: Identity, side: int) -> Image.Image:
    """The character upright in the middle of a transparent RGBA square of `side` pixels."""
    scale = max(2, math.ceil(2 * side / _UNITS)) * 1.0
    brush = _Brush(scale)
    _accessory_behind(brush, identity)
    brush.body(identity)
    _eyes(brush, identity)
    _accessory_before(brush, identity)
    return brush.image.resize((side, side), Image.Resampling.LANCZOS)


def body_mask(shape: str, side: int) -> Image.Image:
    """The filled outline of a shape, [side, side] in mode L."""
    large = Image.new("L", (side * 2, side * 2))
    points = [(x * side * 2 / _UNITS, y * side * 2 / _UNITS) for x, y in outline(shape)]
    ImageDraw.Draw(large).polygon(points, fill=255)
    return large.resize((side, side), Image.Resampling.LANCZOS)


@lru_cache(maxsize=len(SHAPES))
def outline(shape: str) -> tuple[Point, ...]:
    """A body's outline in units, 240 points."""
    points = []
    for step in range(240):
        angle = 2 * math.pi * step / 240 - math.pi / 2
        radius = _BODY * _radius(shape, angle)
        x, y = math.cos(angle) * radius, math.sin(angle) * radius
        points.append((_MIDDLE + x, _CENTRE + y))
    return tuple(points)


def _radius(shape: str, angle: float) -> float:
    """Distance of a body's edge from its middle; 1 is a circle."""
    if shape == "square":
        power = 5.0
        bent = abs(math.cos(angle)) ** power + abs(math.sin(angle)) ** power
        return 0.92 * bent ** (-1 / power)
    if shape == "triangle":
        turn = (angle + math.pi / 2) % (2 * math.pi / 3) - math.pi / 3
        return 0.62 * min(1.62, 1 / math.cos(turn)) + 0.12
    if shape == "star":
        return 0.93 + 0.24 * math.cos(5 * (angle + math.pi / 2))
    if shape == "flower":
        return 0.98 + 0.10 * abs(math.cos(4 * (angle + math.pi / 2))) * 1.5 - 0.1
    if shape == "drop":
        up = max(0.0, math.cos(angle + math.pi / 2))
        return 0.92 + 0.36 * up**8
    return 1.0


class _Brush:
    """Draws in units on a large transparent square."""

    def __init__(self, scale: float) -> None:
        self._scale = scale
        side = round(_UNITS * scale)
        self.image = Image.new("RGBA", (side, side))
        self._draw = ImageDraw.Draw(self.image)

    def polygon(self, points: Sequence[Point], fill: Colour, edge: float = 4) -> None:
        scaled = [(x * self._scale, y * self._scale) for x, y in points]
        self._draw.polygon(scaled, fill=fill)
        if edge:
            width = round(edge * self._scale)
            self._draw.line([*scaled, *scaled[:2]], fill=_INK, width=width, joint="curve")

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, fill: Colour, edge: float = 0
    ) -> None:
        grown = [(x - rx - edge, y - ry - edge), (x + rx + edge, y + ry + edge)]
        inner = [(x - rx, y - ry), (x + rx, y + ry)]
        if edge:
            self._draw.ellipse(self._box(grown), fill=_INK)
        self._draw.ellipse(self._box(inner), fill=fill)

    def arc(
        self, x: float, y: float, radius: float, start: float, end: float, width: float
    ) -> None:
        box = self._box([(x - radius, y - radius), (x + radius, y + radius)])
        self._draw.arc(box, start, end, fill=_INK, width=round(width * self._scale))

    def line(self, points: Sequence[Point], width: float, colour: Colour = _INK) -> None:
        scaled = [(x * self._scale, y * self._scale) for x, y in points]
        self._draw.line(scaled, fill=colour, width=round(width * self._scale), joint="curve")

    def body(self, identity: Identity) -> None:
        """Body, pattern and outline."""
        paint = PAINT[identity.colour]
        self.polygon(outline(identity.shape), paint, edge=0)
        pattern = pattern_mask(identity.pattern, self.image.width)
        inside = body_mask(identity.shape, self.image.width)
        self.image.paste(_accent(paint), mask=ImageChops.multiply(pattern, inside))
        points = [(x * self._scale, y * self._scale) for x, y in outline(identity.shape)]
        width = round(5 * self._scale)
        self._draw.line([*points, *points[:2]], fill=_INK, width=width, joint="curve")

    def _box(self, corners: Sequence[Point]) -> list[Point]:
        return [(x * self._scale, y * self._scale) for x, y in corners]


def _accent(paint: Colour) -> Colour:
    """The pattern's colour: lighter or darker than the body, whichever has more contrast."""
    bright = sum(paint) / 3
    return mixed(paint, _INK if bright > 150 else _WHITE, 0.55)


def pattern_mask(pattern: str, side: int) -> Image.Image:
    """Mask of a pattern's accent, [side, side] in mode L, over the whole square."""
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    unit = side / _UNITS
    if pattern == "stripes":
        for x in range(-256, 512, 30):
            corners = [(x, 0), (x + 13, 0), (x + 141, 256), (x + 128, 256)]
            draw.polygon([(a * unit, b * unit) for a, b in corners], fill=255)
    elif pattern == "dots":
        for row, y in enumerate(range(8, 264, 25)):
            for x in range(8 + 14 * (row % 2), 280, 28):
                box = ((x - 6) * unit, (y - 6) * unit, (x + 6) * unit, (y + 6) * unit)
                draw.ellipse(box, fill=255)
    elif pattern == "belly":
        draw.ellipse((92 * unit, 154 * unit, 164 * unit, 222 * unit), fill=255)
    return mask


def _eyes(brush: _Brush, identity: Identity) -> None:
    y = _FACE
    if identity.eyes == "single":
        brush.ellipse(_MIDDLE, y, 21, 21, _WHITE, edge=4)
        brush.ellipse(_MIDDLE, y + 2, 10, 10, _INK)
    for x in (_MIDDLE - 24, _MIDDLE + 24):
        if identity.eyes == "goggle":
            brush.ellipse(x, y, 16, 16, _WHITE, edge=4)
            brush.ellipse(x, y + 2, 7, 7, _INK)
        elif identity.eyes == "beady":
            brush.ellipse(x, y, 9, 11, _INK)
            brush.ellipse(x + 3, y - 4, 3, 3, _WHITE)
        elif identity.eyes == "sleepy":
            brush.arc(x, y - 6, 14, 20, 160, 6)
    mouth = y + (26 if identity.eyes == "single" else 18)
    brush.arc(_MIDDLE, mouth, 12, 30, 150, 5)


def _accessory_behind(brush: _Brush, identity: Identity) -> None:
    top = _TOP[identity.shape]
    if identity.accessory == "antennae":
        for side in (-1, 1):
            tip = (_MIDDLE + side * 34, top - 34)
            stalk = [(_MIDDLE + side * 12, top + 14), tip]
            brush.line(stalk, 11)  # edge and stalk, visible on light and dark
            brush.line(stalk, 5, PAINT[identity.colour])
            brush.ellipse(*tip, 9, 9, (250, 214, 70), edge=4)


def _accessory_before(brush: _Brush, identity: Identity) -> None:
    x, top = _MIDDLE, _TOP[identity.shape]
    if identity.accessory == "top hat":
        hat: Colour = (62, 56, 72)
        brush.polygon(
            [(x - 27, top + 8), (x - 24, top - 42), (x + 24, top - 42), (x + 27, top + 8)], hat
        )
        brush.polygon(
            [(x - 26, top + 2), (x - 25, top - 8), (x + 25, top - 8), (x + 26, top + 2)],
            (206, 60, 66),
            0,
        )
        brush.polygon(
            [(x - 44, top + 4), (x + 44, top + 4), (x + 44, top + 14), (x - 44, top + 14)], hat
        )
    elif identity.accessory == "party hat":
        brush.polygon([(x - 30, top + 14), (x, top - 44), (x + 30, top + 14)], (250, 250, 250))
        brush.polygon(
            [(x - 22, top - 2), (x - 15, top - 18), (x + 15, top - 18), (x + 22, top - 2)],
            (70, 180, 214),
            0,
        )
        brush.ellipse(x, top - 44, 8, 8, (240, 80, 120), edge=4)
    elif identity.accessory == "crown":
        gold: Colour = (252, 204, 50)
        spikes = [(x - 36, top + 14), (x - 40, top - 30), (x - 18, top - 10), (x, top - 38)]
        spikes += [(2 * x - px, py) for px, py in reversed(spikes[:3])]
        brush.polygon(spikes, gold)
    elif identity.accessory == "bow":
        pink: Colour = (250, 96, 150)
        for side in (-1, 1):
            wing = [(x, top + 2), (x + side * 40, top - 24), (x + side * 40, top + 22)]
            brush.polygon(wing, pink)
        brush.ellipse(x, top + 2, 10, 10, pink, edge=4)
    elif identity.accessory == "scarf":
        knit: Colour = (236, 236, 240)
        band = [(x - 60, 174), (x, 186), (x + 60, 174), (x + 58, 192), (x, 206), (x - 58, 192)]
        brush.polygon(band, knit)
        brush.polygon([(x + 18, 194), (x + 42, 190), (x + 46, 236), (x + 24, 238)], knit)
