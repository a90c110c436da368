"""Latents for the demo models, which make far smaller pictures than SDXL."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch
import torch.nn.functional as F

_CELL = 8  # pixels a latent's side stands for
_STEP = 4  # the UNet halves each side twice


def empty_latent(side: int) -> dict[str, Any]:
    """ComfyUI's LATENT of one empty square picture.

    Args:
        side: in pixels.
    """
    return {"samples": torch.zeros(1, 4, side // _CELL, side // _CELL)}


def shrink_latent(latent: Mapping[str, Any], side: int) -> dict[str, Any]:
    """A LATENT of the same batch, with about the area of a square picture and nearly its own shape.

    Args:
        latent: samples [B, C, H, W]; one that is small enough is returned as it is.
        side: of the square picture, in pixels.
    """
    samples = latent["samples"]
    height, width = samples.shape[-2:]
    factor = side / _CELL / sqrt(height * width)
    if factor >= 1:
        return dict(latent)
    size = [max(_STEP, round(length * factor / _STEP) * _STEP) for length in (height, width)]
    return {**latent, "samples": F.interpolate(samples, size, mode="area")}
