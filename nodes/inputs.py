"""Inputs that several nodes have, and what they make of them; ranges are the same everywhere."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..easyref_core.aggregation import Reference
from ..easyref_core.pictures import tensor_to_picture
from .link_types import References

_PROMPT = "What the picture shall show; usually the same text as the positive prompt. May be empty."


def images_input() -> io.Image.Input:
    return io.Image.Input(
        "images",
        optional=True,
        tooltip="Reference pictures as one batch. They come before those of references.",
    )


def prompt_input(tooltip: str = _PROMPT) -> io.String.Input:
    return io.String.Input(
        "prompt", multiline=True, dynamic_prompts=True, default="", tooltip=tooltip
    )


def image_size_input(tooltip: str) -> io.Int.Input:
    return io.Int.Input("image_size", default=0, min=0, max=1344, step=28, tooltip=tooltip)


def weight_input(tooltip: str, name: str = "weight", default: float = 1.0) -> io.Float.Input:
    """A factor: 1 as trained, below 0 the other way."""
    return io.Float.Input(name, default=default, min=-1.0, max=3.0, step=0.05, tooltip=tooltip)


def references_from_batch(images: torch.Tensor, name: str, weight: float = 1.0) -> References:
    """ComfyUI's IMAGE batch [B, H, W, C] as references.

    Raises:
        EasyRefError: no picture, no pixels, or values that are not numbers.
    """
    if images.ndim == 3:
        images = images[None]
    return tuple(
        Reference(tensor_to_picture(image, label), weight, label)
        for number, image in enumerate(images)
        for label in [name if len(images) == 1 else f"{name} (picture {number + 1})"]
    )


def gather(images: torch.Tensor | None, references: References | None) -> References:
    """A node's `images` and `references` inputs as one group, in this order.

    Raises:
        EasyRefError: the batch cannot be used, see `references_from_batch`.
    """
    group = references_from_batch(images, "images") if images is not None else ()
    return group + (references or ())
