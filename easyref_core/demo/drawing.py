"""The demo's reference pictures, drawn: one character in three scenes of different sizes.

Copyright-free and the same on every computer; nothing is downloaded.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from .canvas import Canvas, Colour, Point, mixed

_INK: Colour = (52, 38, 40)
_WHITE: Colour = (255, 255, 255)
_BLUSH: Colour = (236, 158, 152)


@dataclass(frozen=True)
class Character:
    """What stays the same in all pictures of one character."""

    fur: Colour
    light: Colour
    dark: Colour
    scarf: Colour
    stripe: Colour
    pointed_ears: bool
    bushy_tail: bool


FOX = Character(
    fur=(229, 120, 55),
    light=(253, 238, 217),
    dark=(110, 62, 46),
    scarf=(34, 139, 141),
    stripe=(240, 200, 96),
    pointed_ears=True,
    bushy_tail=True,
)
MOUSE = Character(
    fur=(138, 148, 172),
    light=(232, 226, 232),
    dark=(84, 88, 114),
    scarf=(196, 52, 66),
    stripe=(250, 232, 210),
    pointed_ears=False,
    bushy_tail=False,
)


@dataclass(frozen=True)
class Pose:
    """Where a character stands and what its arms do.

    Attributes:
        feet: between the feet, in pixels.
        height: from the feet to the top of the head, in pixels.
        left, right: where the hands are, in heights, seen from the feet.
        mirrored: tail and scarf on the other side.
    """

    feet: Point
    height: float
    left: Point = (-0.25, -0.24)
    right: Point = (0.25, -0.24)
    mirrored: bool = False


def draw_references(character: Character) -> list[Image.Image]:
    """The character on a meadow (640x448), in a winter night (448x640), at the sea (512x512)."""
    return [meadow(character), winter_night(character), sea(character)]


def meadow(character: Character, width: int = 640, height: int = 448) -> Image.Image:
    canvas = Canvas(width, height, (132, 196, 236), (250, 241, 214))
    canvas.ellipse((width * 0.8, height * 0.2), 40, 40, (255, 214, 110))
    for x, y, size in ((0.16, 0.17, 30), (0.52, 0.11, 22)):
        for dx, dy, part in ((-1.0, 0.2, 0.7), (0.0, 0.0, 1.0), (1.1, 0.25, 0.65)):
            centre = (width * x + dx * size, height * y + dy * size)
            canvas.ellipse(centre, size * part * 1.2, size * part * 0.8, _WHITE)
    canvas.hills(height * 0.62, 26, 1.1, 0.4, (158, 200, 138))
    canvas.hills(height * 0.72, 18, 1.6, 2.2, (118, 178, 106))
    canvas.hills(height * 0.82, 8, 1.0, 1.0, (90, 156, 88))
    dice = random.Random(7)
    for _ in range(34):
        centre = (dice.uniform(0, width), dice.uniform(height * 0.86, height))
        petals = dice.choice([(252, 226, 120), (244, 150, 170), _WHITE])
        canvas.ellipse(centre, 3.4, 3.4, petals)
        canvas.ellipse(centre, 1.3, 1.3, (214, 140, 50))
    pose = Pose((width * 0.4, height * 0.93), height * 0.7, right=(0.33, -0.58))
    draw_character(canvas, character, pose)
    return canvas.finished()


def winter_night(character: Character, width: int = 448, height: int = 640) -> Image.Image:
    canvas = Canvas(width, height, (22, 30, 66), (96, 116, 168))
    dice = random.Random(3)
    for _ in range(60):
        radius = dice.uniform(0.6, 1.8)
        star = (dice.uniform(0, width), dice.uniform(0, height * 0.5))
        canvas.ellipse(star, radius, radius, (250, 244, 214))
    canvas.ellipse((width * 0.24, height * 0.15), 42, 42, (250, 240, 206))
    canvas.ellipse((width * 0.285, height * 0.135), 36, 36, (32, 41, 80))
    canvas.hills(height * 0.66, 22, 0.9, 1.2, (150, 172, 212))
    for x, size in ((0.1, 150), (0.28, 105), (0.75, 125), (0.93, 175)):
        _pine(canvas, (width * x, height * 0.72), size)
    canvas.hills(height * 0.75, 14, 1.2, 2.8, (216, 228, 244))
    canvas.hills(height * 0.86, 10, 0.8, 0.2, (240, 245, 252))
    pose = Pose((width * 0.52, height * 0.92), height * 0.46, mirrored=True)
    draw_character(canvas, character, pose)
    for _ in range(70):
        radius = dice.uniform(1.2, 3.4)
        flake = (dice.uniform(0, width), dice.uniform(0, height))
        canvas.ellipse(flake, radius, radius, _WHITE)
    return canvas.finished()


def sea(character: Character, width: int = 512, height: int = 512) -> Image.Image:
    canvas = Canvas(width, height, (250, 150, 120), (255, 226, 178))
    sun = (width * 0.24, height * 0.5)
    canvas.ellipse(sun, 74, 74, (255, 236, 190))
    canvas.ellipse(sun, 52, 52, (255, 250, 226))
    canvas.hills(height * 0.52, 2, 3.0, 0.0, (72, 134, 168))
    for index, shade in enumerate(((88, 152, 182), (110, 172, 194), (150, 200, 208))):
        canvas.hills(height * (0.58 + 0.06 * index), 3, 3.0 + index, index * 1.3, shade)
    canvas.hills(height * 0.75, 8, 0.7, 0.6, (240, 214, 164))
    canvas.hills(height * 0.88, 6, 0.9, 2.0, (230, 198, 142))
    pose = Pose((width * 0.56, height * 0.92), height * 0.56, left=(-0.3, -0.52))
    hand = (pose.feet[0] - 0.3 * pose.height, pose.feet[1] - 0.52 * pose.height)
    balloon = (width * 0.3, height * 0.2)
    canvas.curve([hand, (hand[0] - 14, height * 0.45), balloon], [1.2, 1.2], _INK)
    canvas.ellipse(balloon, 42, 50, (206, 66, 88))
    canvas.ellipse((balloon[0] - 15, balloon[1] - 18), 9, 13, (238, 150, 160))
    draw_character(canvas, character, pose)
    return canvas.finished()


class _Puppet:
    """Draws in a pose's own units: one is the character's height, the origin its feet."""

    def __init__(self, canvas: Canvas, pose: Pose) -> None:
        self._canvas = canvas
        self._pose = pose

    def at(self, x: float, y: float) -> Point:
        feet, height = self._pose.feet, self._pose.height
        return feet[0] + x * height, feet[1] + y * height

    def blob(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        height = self._pose.height
        self._canvas.ellipse(self.at(x, y), rx * height, ry * height, colour)

    def brush(self, points: Sequence[Point], radii: Sequence[float], colour: Colour) -> None:
        height = self._pose.height
        self._canvas.curve([self.at(*p) for p in points], [r * height for r in radii], colour)

    def shape(self, points: Sequence[Point], colour: Colour) -> None:
        self._canvas.polygon([self.at(*p) for p in points], colour)


def draw_character(canvas: Canvas, who: Character, pose: Pose) -> None:
    """Paint a character from back to front."""
    puppet = _Puppet(canvas, pose)
    side = -1.0 if pose.mirrored else 1.0
    _tail(puppet, who, side)
    shade = mixed(who.fur, who.dark, 0.28)
    for x in (-0.09, 0.09):
        puppet.brush([(x, -0.2), (x * 1.15, -0.05)], [0.07, 0.06], shade)
        puppet.blob(x * 1.35, -0.03, 0.085, 0.042, who.dark)
    puppet.brush([(0.0, -0.42), (0.0, -0.24)], [0.13, 0.185], who.fur)
    puppet.blob(0.0, -0.22, 0.115, 0.14, who.light)
    for shoulder, hand in ((-0.13, pose.left), (0.13, pose.right)):
        arm = [(shoulder, -0.42), (shoulder * 1.6, -0.36), hand]
        puppet.brush(arm, [0.055, 0.05, 0.045], shade)
        puppet.blob(*hand, 0.055, 0.055, who.dark)
    _head(puppet, who)
    _scarf(puppet, who, side)


def _tail(puppet: _Puppet, who: Character, side: float) -> None:
    if who.bushy_tail:
        points = [(0.08 * side, -0.14), (0.5 * side, -0.06), (0.42 * side, -0.5)]
        puppet.brush(points, [0.04, 0.13, 0.06], who.fur)
        # The same curve's last fifth, a little wider.
        puppet.brush([(0.432 * side, -0.35), (0.42 * side, -0.5)], [0.083, 0.063], who.light)
    else:
        points = [(0.1 * side, -0.1), (0.45 * side, 0.0), (0.34 * side, -0.34), (0.5 * side, -0.4)]
        puppet.brush(points, [0.025, 0.02, 0.012], who.dark)


def _head(puppet: _Puppet, who: Character) -> None:
    for side in (-1, 1):
        if who.pointed_ears:
            puppet.shape([(0.27 * side, -1.0), (0.05 * side, -0.86), (0.255 * side, -0.7)], who.fur)
            inner = [(0.247 * side, -0.945), (0.11 * side, -0.85), (0.235 * side, -0.77)]
            puppet.shape(inner, who.dark)
        else:
            puppet.blob(0.21 * side, -0.88, 0.125, 0.125, who.fur)
            puppet.blob(0.21 * side, -0.88, 0.08, 0.08, _BLUSH)
    puppet.blob(0.0, -0.68, 0.275, 0.225, who.fur)
    for x, y, rx, ry in ((-0.125, -0.585, 0.13, 0.105), (0.125, -0.585, 0.13, 0.105)):
        puppet.blob(x, y, rx, ry, who.light)
    puppet.blob(0.0, -0.575, 0.12, 0.1, who.light)
    puppet.blob(0.0, -0.625, 0.036, 0.026, _INK)
    for side in (-1, 1):
        puppet.blob(0.115 * side, -0.695, 0.036, 0.05, _INK)
        puppet.blob(0.115 * side + 0.012, -0.712, 0.013, 0.016, _WHITE)
        puppet.blob(0.19 * side, -0.62, 0.04, 0.024, mixed(who.light, _BLUSH, 0.75))
        mouth = [(0.0, -0.6), (0.022 * side, -0.55), (0.06 * side, -0.568)]
        puppet.brush(mouth, [0.007, 0.007], _INK)


def _scarf(puppet: _Puppet, who: Character, side: float) -> None:
    around = [(-0.17, -0.455), (0.0, -0.4), (0.17, -0.455)]
    puppet.brush(around, [0.05, 0.056, 0.05], who.scarf)
    end = [(0.1 * side, -0.42), (0.17 * side, -0.32), (0.15 * side, -0.22)]
    puppet.brush(end, [0.042, 0.042], who.scarf)
    for x, y in ((0.115, -0.265), (0.11, -0.225)):
        stripe = [(x * side, y), ((x + 0.08) * side, y + 0.003)]
        puppet.brush(stripe, [0.012, 0.012], who.stripe)


def _pine(canvas: Canvas, foot: Point, size: float) -> None:
    x, y = foot
    canvas.polygon([(x - 5, y + 12), (x + 5, y + 12), (x, y - size * 0.5)], (70, 52, 50))
    for level in range(3):
        top, half = y - size + level * size * 0.25, size * (0.2 + 0.07 * level)
        bottom = top + size * 0.42
        canvas.polygon([(x, top), (x + half, bottom), (x - half, bottom)], (38, 84, 88))
        cap = size * 0.16
        edge = half * cap / (size * 0.42)
        canvas.polygon([(x, top), (x + edge, top + cap), (x - edge, top + cap)], (226, 236, 248))
