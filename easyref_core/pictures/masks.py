"""ComfyUI's MASK in all the shapes in which nodes make it."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import EasyRefError
from .levels import as_levels


def mask_batch(masks: Any, name: str = "The mask") -> torch.Tensor:
    """Masks as [B, H, W] float32, 0 to 1 where they were made so, on their own device.

    Args:
        masks: [H, W], [B, H, W] or [B, 1, H, W], as ComfyUI keeps noise masks; see `as_levels` for
            kinds of values.
        name: for messages.

    Raises:
        EasyRefError: see `as_levels`; another shape, no pixels, or values that are not numbers.
    """
    masks = as_levels(masks, name, "mask", dimensions=2)
    if masks.ndim == 4 and masks.shape[1] == 1:
        masks = masks[:, 0]
    if masks.ndim != 3 or 0 in masks.shape:
        raise EasyRefError(
            f"{name} has shape {list(masks.shape)}; [masks, height, width] is needed, none of them "
            "0. Connect a MASK."
        )
    if not torch.isfinite(masks).all():
        raise EasyRefError(
            f"{name} holds values that are not numbers (NaN or infinite). Check the node that made "
            "it."
        )
    return masks
