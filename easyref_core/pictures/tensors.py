"""Pictures as ComfyUI passes them, and as other nodes do: tensors, arrays, lists."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from ..errors import EasyRefError
from .levels import as_levels


def picture_list(images: Any, name: str) -> list[torch.Tensor]:
    """Single float pictures [H, W, C], which may be none.

    Args:
        images: one picture [H, W, C], a batch [B, H, W, C], or a list of such, each of its own
            size; see `as_levels` for kinds of values.
        name: for messages.

    Raises:
        EasyRefError: see `as_levels`; another shape.
    """
    if isinstance(images, (list, tuple)):
        return [picture for entry in images for picture in picture_list(entry, name)]
    batch = as_levels(images, name, "picture", dimensions=3)
    if batch.ndim != 4:
        raise EasyRefError(
            f"{name} has shape {list(batch.shape)}; [pictures, height, width, colours] is needed. "
            "Choose another picture."
        )
    return list(batch)


def tensor_to_picture(pixels: torch.Tensor, name: str) -> Image.Image:
    """One float picture [H, W, C] in 0..1 (ComfyUI's IMAGE without its batch) as RGB.

    Rounds to the nearest level, so an 8-bit picture comes back bit for bit.

    Raises:
        EasyRefError: no pixels, no colour channel, or values that are not numbers.
    """
    if pixels.ndim != 3 or 0 in pixels.shape:
        raise EasyRefError(
            f"{name} has shape {list(pixels.shape)}; a picture has height, width and colours, "
            "none of them 0. Choose another picture."
        )
    channels = pixels.shape[-1]
    if channels not in (1, 2, 3, 4):
        raise EasyRefError(
            f"{name} has {channels} channels (shape {list(pixels.shape)}); grey, RGB and RGBA "
            "pictures can be read."
        )
    pixels = pixels.detach().to("cpu", torch.float32)
    if not torch.isfinite(pixels).all():
        bad = int((~torch.isfinite(pixels)).sum())
        raise EasyRefError(
            f"{name} holds {bad} values that are not numbers (NaN or infinite). "
            "The node that made it failed, often a VAE in half precision; check it."
        )
    colours = pixels[..., :3] if channels >= 3 else pixels[..., :1].expand(-1, -1, 3)
    levels = (colours * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.contiguous().numpy(), "RGB")
