"""Crop pictures to a box or a mask, so that a face or an object fills the frame.

A crop is in whole pixels: those that the box or mask covers, padded, and squared if wanted. It
never leaves the picture and never cuts into what is covered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import EasyRefError
from ..untrusted import flag, number
from .tensors import mask_list, picture_list

_TOLERANCE = 1e-6  # rounding errors of a fraction


@dataclass(frozen=True)
class Box:
    """A rectangle in fractions of the picture's width and height, 0 to 1.

    Raises:
        EasyRefError: values that are not numbers, nothing inside, or a side outside the picture.
    """

    x: float = 0.0
    y: float = 0.0
    width: float = 1.0
    height: float = 1.0

    def __post_init__(self) -> None:
        for name in ("x", "y", "width", "height"):
            object.__setattr__(self, name, number(getattr(self, name), name))
        sides = {"x": (self.x, self.width), "y": (self.y, self.height)}
        for (axis, (first, size)), side in zip(sides.items(), ("width", "height"), strict=True):
            if size <= 0:
                raise EasyRefError(
                    f"The box has {side} {size:g} at {axis} {first:g}; nothing is left of the "
                    f"picture. Choose a {side} above 0."
                )
            if first < -_TOLERANCE or first + size > 1 + _TOLERANCE:
                raise EasyRefError(
                    f"The box reaches from {first:g} to {first + size:g} of the picture's {side} "
                    f"({axis} {first:g} + {side} {size:g}), but the picture ends at 0 and 1. Make "
                    f"{axis} or {side} smaller."
                )


def mask_box(mask: torch.Tensor, name: str) -> Box:
    """The bounding box of a mask [H, W].

    A pixel is covered if it is at least half as bright as the brightest, so that feathered and
    faint masks work too.

    Raises:
        EasyRefError: nothing is covered.
    """
    brightest = float(mask.max())
    if brightest <= 1 / 255:
        raise EasyRefError(
            f"{name} covers nothing: all of it is black. Paint the part to keep in white, or "
            "disconnect the mask to crop by x, y, width and height. (Load Image gives an empty "
            "mask for a picture without transparency.)"
        )
    height, width = mask.shape
    covered = mask >= brightest / 2
    rows, columns = covered.any(dim=1).nonzero()[:, 0], covered.any(dim=0).nonzero()[:, 0]
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    left, right = int(columns[0]), int(columns[-1]) + 1
    return Box(left / width, top / height, (right - left) / width, (bottom - top) / height)


def mask_boxes(masks: Any) -> list[Box]:
    """Boxes of ComfyUI's MASK; see `mask_list` and `mask_box`."""
    found = mask_list(masks)
    count = len(found)
    names = ["The mask"] if count == 1 else [f"Mask {n + 1} of {count}" for n in range(count)]
    return [mask_box(mask, name) for mask, name in zip(found, names, strict=True)]


def crop_window(
    box: Box, width: int, height: int, padding: float, square: bool
) -> tuple[int, int, int, int]:
    """The crop of a picture of this size, in whole pixels: (left, top, right, bottom).

    Args:
        padding: around the box, as a fraction of its larger side.
        square: as square as the picture allows; only ever enlarges the crop.
    """
    columns = _covered(box.x, box.width, width)
    rows = _covered(box.y, box.height, height)
    sizes = [end - first for first, end in (columns, rows)]
    # More than the picture is no more than all of it.
    margin = 2 * round(min(padding, max(width, height)) * max(sizes))
    sizes = [size + margin for size in sizes]
    if square:
        sizes = [max(sizes)] * 2
    left, right = _around(columns, sizes[0], width)
    top, bottom = _around(rows, sizes[1], height)
    return left, top, right, bottom


def _covered(first: float, length: float, pixels: int) -> tuple[int, int]:
    """(first, end) pixel of a part of a side, partly covered pixels included, at least one."""
    start = min(max(math.floor(first * pixels + _TOLERANCE), 0), pixels - 1)
    end = min(math.ceil((first + length) * pixels - _TOLERANCE), pixels)
    return start, max(end, start + 1)


def _around(covered: tuple[int, int], size: int, pixels: int) -> tuple[int, int]:
    """(first, end) of `size` pixels centred on the covered ones, moved and cut to fit the side."""
    size = min(size, pixels)
    first, end = covered
    start = first - (size - (end - first)) // 2
    start = min(max(start, 0), pixels - size)
    return start, start + size


def crop_pictures(
    images: Any, boxes: Sequence[Box], padding: float = 0.25, square: bool = True
) -> list[torch.Tensor]:
    """Crops [1, h, w, C] of ComfyUI's IMAGE [B, H, W, C]: one box for all pictures, one each, or
    several of one picture.

    Args:
        images: see `picture_list`; pictures of a list may differ in size.

    Raises:
        EasyRefError: see `picture_list`; no picture, as many boxes as fit neither, or padding
            below 0.
    """
    pictures = picture_list(images, "images")
    if not pictures or any(0 in picture.shape for picture in pictures):
        raise EasyRefError("images holds no picture, or one without pixels. Connect another.")
    padding, square = number(padding, "padding", low=0), flag(square, "square")
    count = max(len(pictures), len(boxes))
    if len(pictures) not in (1, count) or len(boxes) not in (1, count):
        raise EasyRefError(
            f"There are {len(pictures)} pictures and {len(boxes)} masks. Connect one mask for all "
            "pictures, one for each, or several for one picture."
        )
    crops = []
    for index in range(count):
        box = boxes[index if len(boxes) > 1 else 0]
        picture = pictures[index if len(pictures) > 1 else 0]
        height, width = picture.shape[:2]
        left, top, right, bottom = crop_window(box, width, height, padding, square)
        # A copy: a view would keep the whole batch in memory.
        crops.append(picture[None, top:bottom, left:right].clone())
    return crops
