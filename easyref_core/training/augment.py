"""Crops and random choices of targets and references.

Source: the effect of the official training code; every random choice comes from the caller's
generator, so that a sample is the same on any number of processes and after resuming.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageOps

from ..errors import EasyRefError

STRIDE = 64
MAX_ASPECT = 50  # scaling a long line of pixels would need too much memory


@dataclass(frozen=True)
class Target:
    """A target image and SDXL's size conditioning for it, as (height, width) pairs."""

    picture: Image.Image
    original_size: tuple[int, int]
    crop: tuple[int, int]

    @property
    def time_ids(self) -> tuple[int, ...]:
        """SDXL's six numbers: original size, crop's top left, target size."""
        return (*self.original_size, *self.crop, self.picture.height, self.picture.width)


def aspect_target(picture: Image.Image, size: int) -> Target:
    """Keep the aspect ratio: an area near size x size, both sides multiples of 64.

    Raises:
        EasyRefError: the image is too elongated.
    """
    _check_shape(picture)
    width, height = picture.size
    factor = math.sqrt(width * height / size**2)
    if width == height:
        width = height = size
    elif not 0.8 <= factor <= 1.1:
        width, height = math.ceil(width / factor), math.ceil(height / factor)
    sides = [STRIDE * math.ceil(side / STRIDE) for side in (width, height)]
    resized = picture.resize((sides[0], sides[1]), Image.Resampling.BICUBIC)
    return Target(resized, (resized.height, resized.width), (0, 0))


def square_corner(
    picture: Image.Image, size: int, rng: random.Random, centred: bool
) -> tuple[int, int]:
    """(top, left) of a size x size square in the image scaled so that its short side is size.

    Raises:
        EasyRefError: the image is too elongated.
    """
    width, height = _covering(picture, size)
    if centred:
        return (height - size) // 2, (width - size) // 2
    return rng.randint(0, height - size), rng.randint(0, width - size)


def square_crop(picture: Image.Image, size: int, corner: tuple[int, int]) -> Image.Image:
    """The size x size square at (top, left) of the image scaled to cover it.

    Raises:
        EasyRefError: the image is too elongated.
    """
    scaled = picture.resize(_covering(picture, size), Image.Resampling.BILINEAR)
    top, left = corner
    # The corner may come from another image, which was longer.
    top, left = min(top, scaled.height - size), min(left, scaled.width - size)
    return scaled.crop((left, top, left + size, top + size))


def _covering(picture: Image.Image, size: int) -> tuple[int, int]:
    """(width, height) with the short side at `size`."""
    _check_shape(picture)
    short = min(picture.size)
    return (
        max(size, int(size * picture.width / short)),
        max(size, int(size * picture.height / short)),
    )


def _check_shape(picture: Image.Image) -> None:
    """
    Raises:
        EasyRefError: the image is too elongated.
    """
    aspect = max(picture.size) / min(picture.size)
    if aspect > MAX_ASPECT:
        raise EasyRefError(
            f"the target or what is cropped like it is {picture.width}x{picture.height}, an aspect "
            f"ratio of {aspect:.0f}; the most that is trained on is {MAX_ASPECT}. Crop it."
        )


def face_crop(
    picture: Image.Image, box: tuple[float, float, float, float], rng: random.Random
) -> Image.Image:
    """A square around the face, expanded randomly by up to half on each side, inside the image,
    and mirrored with probability 1/2."""
    x1, y1, x2, y2 = box
    side = max(x2 - x1, y2 - y1, 2.0)
    side = min(side * (1 + 2 * rng.randint(0, 49) / 100), picture.width, picture.height)
    left = min(max((x1 + x2 - side) / 2, 0), picture.width - side)
    top = min(max((y1 + y2 - side) / 2, 0), picture.height - side)
    crop = picture.crop((round(left), round(top), round(left + side), round(top + side)))
    return ImageOps.mirror(crop) if rng.random() < 0.5 else crop


def choose_references(
    count: int, rng: random.Random, most: int, subset_probability: float
) -> list[int]:
    """Indices of the references to use, shuffled: at most `most`, and with a probability of
    `subset_probability` a random subset of at least two."""
    order = list(range(count))
    rng.shuffle(order)
    order = order[:most]
    if rng.random() < subset_probability and len(order) > 2:
        order = order[: rng.randint(2, len(order) - 1)]
    return order
