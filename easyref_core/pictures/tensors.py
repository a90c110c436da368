"""Pictures and masks as ComfyUI passes them, and as other nodes do: tensors, arrays, lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import EasyRefError
from ..untrusted import kind_of

_LEVELS = 255
_NUMPY = {"f": np.float32, "i": np.int64, "u": np.int64, "b": np.bool_}


def picture_list(images: Any, name: str) -> list[torch.Tensor]:
    """Single float pictures [H, W, C], which may be none.

    Args:
        images: one picture [H, W, C], a batch [B, H, W, C], or a list of such, each of its own
            size. Whole numbers are levels from 0 to 255.
        name: for messages.

    Raises:
        EasyRefError: something else, or a tensor without values.
    """
    entries = images if isinstance(images, (list, tuple)) else [images]
    return [picture for entry in entries for picture in _pictures(entry, name)]


def _pictures(images: Any, name: str) -> list[torch.Tensor]:
    batch = _floats(images, name, "a picture or a batch of pictures", _LEVELS)
    if batch.ndim == 3:
        batch = batch[None]
    if batch.ndim != 4:
        raise EasyRefError(
            f"{name} has shape {list(batch.shape)}; [pictures, height, width, colours] is needed. "
            "Choose another picture."
        )
    return list(batch)


def mask_list(masks: Any, name: str = "The mask") -> list[torch.Tensor]:
    """Single float masks [H, W], at least one.

    Args:
        masks: one mask [H, W], a batch [B, H, W] or [B, 1, H, W], or a list of such. Whole numbers
            are 0 and 1, or levels up to 255.
        name: for messages.

    Raises:
        EasyRefError: something else, no mask or no pixels, or values that are not numbers.
    """
    entries = masks if isinstance(masks, (list, tuple)) else [masks]
    found = [mask for entry in entries for mask in _masks(entry, name)]
    if not found:
        raise EasyRefError(f"{name} holds no mask. Connect another mask.")
    return found


def _masks(masks: Any, name: str) -> list[torch.Tensor]:
    batch = _floats(masks, name, "a mask or a batch of masks", None)
    if batch.ndim == 2:
        batch = batch[None]
    if batch.ndim == 4 and batch.shape[1] == 1:
        batch = batch[:, 0]
    if batch.ndim != 3 or 0 in batch.shape:
        raise EasyRefError(
            f"{name} has shape {list(batch.shape)}; [masks, height, width] is needed, none of "
            "them 0. Connect another mask."
        )
    if not torch.isfinite(batch).all():
        raise EasyRefError(
            f"{name} holds values that are not numbers (NaN or infinite). Check the node that "
            "made it."
        )
    return list(batch)


def mask_batch(masks: Any, name: str = "The mask") -> torch.Tensor:
    """Masks of one size as a batch [B, H, W] in float32, on the device of the first.

    Raises:
        EasyRefError: see `mask_list`; masks of different sizes.
    """
    found = mask_list(masks, name)
    sizes = list(dict.fromkeys(tuple(mask.shape) for mask in found))
    if len(sizes) > 1:
        first, second = (f"{width}x{height}" for height, width in sizes[:2])
        raise EasyRefError(
            f"{name} is a list of {len(found)} of different sizes ({first} and {second}), which "
            "cannot be one batch. Make them the same size."
        )
    return torch.stack([mask.detach().to(found[0].device, torch.float32) for mask in found])


def _floats(values: Any, name: str, wanted: str, most: float | None) -> torch.Tensor:
    """A tensor or an array as floats.

    Args:
        most: what whole numbers are divided by; None for 255 if one of them is above 1.
    """
    if isinstance(values, np.ndarray) and values.dtype.kind in _NUMPY:
        # A copy: torch reads neither negative strides nor other byte orders.
        values = torch.from_numpy(np.array(values, _NUMPY[values.dtype.kind]))
    if not isinstance(values, torch.Tensor):
        raise EasyRefError(f"{name} is {kind_of(values)} where {wanted} is needed. Connect one.")
    if (
        values.layout is not torch.strided
        or values.is_nested
        or values.is_quantized
        or values.is_meta
        or values.is_complex()
    ):
        raise EasyRefError(
            f"{name} is a {values.dtype} tensor that holds no plain values where {wanted} is "
            "needed. Check the node that made it."
        )
    if values.is_floating_point():
        return values
    if values.dtype == torch.bool or values.numel() == 0:
        return values.float()
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > _LEVELS:
        raise EasyRefError(
            f"{name} holds whole numbers from {low} to {high}; levels go from 0 to 255. Check the "
            "node that made it."
        )
    divisor = most if most is not None else (_LEVELS if high > 1 else 1)
    return values.float() / divisor


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
