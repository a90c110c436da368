"""Where references act: a picture mask at every attention resolution."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ...easyref_core.errors import EasyRefError
from .run_info import Area


class Mask:
    """A mask [1 or B, H, W] in 0..1 over the whole picture, of any size.

    Raises:
        EasyRefError: wrong shape or values that are not numbers.
    """

    def __init__(self, pixels: torch.Tensor) -> None:
        if pixels.ndim == 2:
            pixels = pixels[None]
        if pixels.ndim != 3 or 0 in pixels.shape:
            raise EasyRefError(
                f"The mask has shape {list(pixels.shape)}; [batch, height, width] is needed, none "
                "of them 0. Connect a MASK."
            )
        if not torch.isfinite(pixels).all():
            raise EasyRefError(
                "The mask holds values that are not numbers. Check where it is made."
            )
        self._pixels = pixels.detach().float().clamp(0, 1)
        # Filled with results that depend on the key alone; losing a race costs only time.
        self._made: dict[tuple[Any, ...], torch.Tensor] = {}

    @property
    def batch(self) -> int:
        return self._pixels.shape[0]

    def at(
        self,
        height: int,
        width: int,
        whole: tuple[int, int],
        area: Area | None,
        rows: int,
        like: torch.Tensor,
    ) -> torch.Tensor:
        """The mask at an attention layer.

        Args:
            height, width: of the layer.
            whole: (height, width) of the whole latent.
            area: the part of the latent that the layer covers, None for all.
            rows: latents.
            like: gives device and dtype.

        Returns:
            [rows, height * width, 1]

        Raises:
            EasyRefError: the mask's batch is neither 1 nor `rows`.
        """
        if self.batch not in (1, rows):
            raise EasyRefError(
                f"The mask has a batch of {self.batch}, but there are {rows} latents. Use one "
                "mask for all, or as many masks as latents."
            )
        key = (height, width, whole, area, like.device, like.dtype)
        if key not in self._made:
            mask = self._pixels[:, None]
            if area is not None:
                mask = _resize(mask, *whole)
                tall, wide, top, left = area
                mask = mask[:, :, top : top + tall, left : left + wide]
            self._made[key] = _resize(mask, height, width).flatten(1)[..., None].to(like)
        return self._made[key].expand(rows, -1, -1)


def _resize(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[B, 1, H, W] -> [B, 1, height, width]; averages where it shrinks, so nothing thin is lost."""
    shrunk = min(height, mask.shape[-2]), min(width, mask.shape[-1])
    mask = F.interpolate(mask, shrunk, mode="area")
    return F.interpolate(mask, (height, width), mode="bilinear", align_corners=False)
