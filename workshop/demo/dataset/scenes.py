"""Backgrounds: a place and a time of day, which captions name."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image

from ..canvas import Canvas, Colour, mixed

PLACES = ("meadow", "beach", "snow", "desert", "city", "sea")
TIMES = ("day", "sunset", "night")

_SKY: dict[str, tuple[Colour, Colour]] = {
    "day": ((120, 190, 240), (214, 236, 250)),
    "sunset": ((238, 120, 100), (252, 214, 150)),
    "night": ((18, 22, 58), (52, 58, 112)),
}
_GROUND: dict[str, Colour] = {
    "meadow": (96, 170, 84),
    "beach": (238, 216, 160),
    "snow": (238, 244, 250),
    "desert": (220, 160, 92),
    "city": (120, 124, 136),
    "sea": (44, 110, 160),
}
_DARKER = {"day": 0.0, "sunset": 0.12, "night": 0.5}
_NIGHT: Colour = (16, 20, 52)


@dataclass(frozen=True, order=True)
class Scene:
    """Place and time of a caption."""

    place: str
    time: str

    @property
    def words(self) -> str:
        where = {"snow": "in the snow", "sea": "at sea"}.get(self.place)
        where = where or f"{'on' if self.place == 'beach' else 'in'} a {self.place}"
        return f"{where} {'by day' if self.time == 'day' else 'at ' + self.time}"


def random_scene(rng: random.Random) -> Scene:
    return Scene(rng.choice(PLACES), rng.choice(TIMES))


def draw_scene(scene: Scene, side: int, rng: random.Random) -> Image.Image:
    """A square RGB image of the scene, with random details."""
    canvas = Canvas(side, side, *_SKY[scene.time])
    unit = side / 128
    _sky(canvas, scene, unit, rng)
    horizon = side * rng.uniform(0.52, 0.66)
    if scene.place == "city":
        _houses(canvas, scene, horizon, unit, rng)
    ground = mixed(_GROUND[scene.place], _NIGHT, _DARKER[scene.time])
    swing = {"meadow": 5, "snow": 4, "desert": 6, "sea": 1.5}.get(scene.place, 0) * unit
    waves = 9 if scene.place == "sea" else rng.uniform(0.8, 1.6)
    phase = rng.uniform(0, 2 * math.pi)
    if scene.place == "beach":
        water = mixed(_GROUND["sea"], _NIGHT, _DARKER[scene.time])
        canvas.hills(horizon, 0, 1, 0, water)
        canvas.hills(horizon + 14 * unit, 2 * unit, 1.3, phase, ground)
    else:
        canvas.hills(horizon, swing, waves, phase, ground)
    _details(canvas, scene, horizon, unit, rng)
    return canvas.finished()


def _sky(canvas: Canvas, scene: Scene, unit: float, rng: random.Random) -> None:
    width, _ = canvas.size
    if scene.time == "night":
        for _ in range(24):
            star = (rng.uniform(0, width), rng.uniform(0, width * 0.5))
            canvas.ellipse(star, 0.7 * unit, 0.7 * unit, (232, 232, 250))
    x, y = rng.uniform(0.15, 0.85) * width, rng.uniform(0.12, 0.26) * width
    light: Colour = (250, 246, 214) if scene.time == "night" else (255, 222, 110)
    canvas.ellipse((x, y), 8 * unit, 8 * unit, light)
    if scene.time == "day":
        for _ in range(2):
            cx, cy = rng.uniform(0, width), rng.uniform(0.1, 0.35) * width
            for dx in (-7, 0, 7):
                canvas.ellipse((cx + dx * unit, cy), 7 * unit, 4.5 * unit, (250, 252, 255))


def _houses(canvas: Canvas, scene: Scene, horizon: float, unit: float, rng: random.Random) -> None:
    width, _ = canvas.size
    x = -4 * unit
    while x < width:
        wide, tall = rng.uniform(14, 24) * unit, rng.uniform(18, 48) * unit
        shade: Colour = (150, 140, 150) if rng.random() < 0.5 else (176, 150, 140)
        wall = mixed(shade, _NIGHT, _DARKER[scene.time])
        top = horizon - tall
        edge = x + wide
        canvas.polygon([(x, horizon + 4), (x, top), (edge, top), (edge, horizon + 4)], wall)
        lit: Colour = (252, 226, 130) if scene.time != "day" else (96, 106, 130)
        step = 6 * unit
        for row in range(int((tall - 4 * unit) // step)):
            for column in range(int((wide - 3 * unit) // step)):
                wx, wy = x + (2.5 + 6 * column) * unit, top + (3 + 6 * row) * unit
                corner = [(wx, wy), (wx + 2.6 * unit, wy)]
                corner += [(px, py + 3 * unit) for px, py in reversed(corner)]
                canvas.polygon(corner, lit)
        x += wide + rng.uniform(0, 3) * unit


def _details(canvas: Canvas, scene: Scene, horizon: float, unit: float, rng: random.Random) -> None:
    width, height = canvas.size

    def somewhere() -> tuple[float, float]:
        return rng.uniform(0, width), rng.uniform(horizon + 8 * unit, height)

    dark = _DARKER[scene.time]
    if scene.place == "meadow":
        for _ in range(14):
            flower = rng.choice([(250, 230, 120), (250, 250, 250), (240, 150, 180)])
            canvas.ellipse(somewhere(), 1.3 * unit, 1.3 * unit, mixed(flower, _NIGHT, dark))
    elif scene.place == "snow":
        for x in (rng.uniform(0, 0.3), rng.uniform(0.7, 1)):
            foot = (x * width, horizon + 6 * unit)
            for level in range(3):
                wide, base = (11 - 3 * level) * unit, foot[1] - 9 * level * unit
                tree = [(foot[0] - wide, base), (foot[0], base - 15 * unit), (foot[0] + wide, base)]
                canvas.polygon(tree, mixed((40, 104, 84), _NIGHT, dark))
    elif scene.place == "desert":
        for x in (rng.uniform(0.02, 0.25), rng.uniform(0.75, 0.98)):
            green = mixed((70, 140, 84), _NIGHT, dark)
            foot, tall = x * width, rng.uniform(16, 24) * unit
            stem = [(foot, horizon + 6 * unit), (foot, horizon - tall)]
            canvas.curve(stem, [3 * unit, 3 * unit], green)
            arm = [(foot, horizon - 6 * unit), (foot + 9 * unit, horizon - 6 * unit)]
            canvas.curve([*arm, (foot + 9 * unit, horizon - 15 * unit)], [2 * unit] * 3, green)
    elif scene.place == "sea":
        foam = mixed((200, 226, 240), _NIGHT, dark)
        for _ in range(9):
            x, y = somewhere()
            canvas.curve([(x, y), (x + 7 * unit, y)], [0.7 * unit, 0.7 * unit], foam)
    elif scene.place == "beach":
        for _ in range(8):
            canvas.ellipse(somewhere(), unit, unit, mixed((196, 170, 120), _NIGHT, dark))
