"""Sizes of pictures for the MLLM: which are possible, and what `preprocessing` resizes to.

Source: official code; see `preprocessing.py`. Without PyTorch, as some need only these numbers.
"""

from __future__ import annotations

import math

from ..errors import EasyRefError

PATCH = 14
MERGE = 2
FRAMES = 2
CHANNELS = 3
FACTOR = PATCH * MERGE  # both sides of a resized picture are multiples of 28 pixels
FETCH_MIN_PIXELS = 4 * FACTOR**2
FETCH_MAX_PIXELS = 16384 * FACTOR**2
MAX_ASPECT = 200
DEFAULT_IMAGE_SIZE = 336
MIN_IMAGE_SIZE = 2 * FACTOR


def pixel_limits(image_size: int) -> tuple[int, int]:
    """Fewest and most pixels after the second resize, for the official `cond_image_size`.

    Raises:
        EasyRefError: `image_size` below 56 pixels, where no picture would be left.
    """
    if image_size < MIN_IMAGE_SIZE:
        raise EasyRefError(
            f"image_size is {image_size}; it must be at least {MIN_IMAGE_SIZE} pixels. "
            f"EasyRef was trained at {DEFAULT_IMAGE_SIZE}."
        )
    side = image_size // FACTOR
    return (side - 1) ** 2 * FACTOR**2, (side**2 + 1) * FACTOR**2


def resized_size(width: int, height: int, low: int, high: int) -> tuple[int, int]:
    """Nearest multiples of 28 whose product lies within low..high, aspect kept. (width, height)

    A side that shrinking would take to 0 stays at 28, as in newer transformers; the official
    versions fail there.
    """
    new = [max(FACTOR, round(side / FACTOR) * FACTOR) for side in (width, height)]
    if new[0] * new[1] > high:
        shrink = math.sqrt(width * height / high)
        new = [max(FACTOR, math.floor(side / shrink / FACTOR) * FACTOR) for side in (width, height)]
    elif new[0] * new[1] < low:
        grow = math.sqrt(low / (width * height))
        new = [math.ceil(side * grow / FACTOR) * FACTOR for side in (width, height)]
    return new[0], new[1]


def plan_sizes(width: int, height: int, image_size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sizes (width, height) after the first and the second resize.

    Raises:
        EasyRefError: the picture is empty, or too elongated.
    """
    low, high = pixel_limits(image_size)
    if width == 0 or height == 0:
        raise EasyRefError(f"the picture is {width}x{height}; it has no pixels. Choose another.")
    aspect = max(width, height) / min(width, height)
    if aspect > MAX_ASPECT:
        raise EasyRefError(
            f"the picture is {width}x{height}, an aspect ratio of {aspect:.0f}; the most that can "
            f"be read is {MAX_ASPECT}. Crop it."
        )
    first = resized_size(width, height, FETCH_MIN_PIXELS, FETCH_MAX_PIXELS)
    return first, resized_size(*first, low, high)
