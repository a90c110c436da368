"""Position, size and tilt of figures in an image."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Pose:
    """A figure's pose.

    Attributes:
        x, y: middle of its square, relative to the image's side.
        scale: its square's side, relative to the image's.
        tilt: degrees counterclockwise.
    """

    x: float
    y: float
    scale: float
    tilt: float


def alone(rng: random.Random) -> Pose:
    """Random pose of a single character."""
    scale = rng.uniform(0.7, 0.9)
    rng.random()  # unused, but keeps the images of a seed as they are
    return Pose(rng.uniform(0.36, 0.64), rng.uniform(0.46, 0.6), scale, _tilt(rng))


def together(rng: random.Random) -> tuple[Pose, Pose]:
    """Random poses of two characters: (a large one, a small one in front on the other side)."""
    small = rng.uniform(0.5, 0.6)
    left = rng.random() < 0.5
    x, y = (0.7 if left else 0.3) + rng.uniform(-0.03, 0.03), rng.uniform(0.5, 0.58)
    large = Pose(x, y, rng.uniform(0.76, 0.86), _tilt(rng))
    x, y = (0.22 if left else 0.78) + rng.uniform(-0.04, 0.04), rng.uniform(0.62, 0.72)
    return large, Pose(x, y, small, _tilt(rng))


def styled(rng: random.Random) -> Pose:
    """Random pose of a shape in a style group."""
    x, y = rng.uniform(0.4, 0.6), rng.uniform(0.4, 0.55)
    return Pose(x, y, rng.uniform(0.8, 1.15), _tilt(rng))


def _tilt(rng: random.Random) -> float:
    return rng.uniform(-15, 15)
