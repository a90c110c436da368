"""Where references act: a picture mask at every attention resolution."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ...easyref_core.errors import EasyRefError
from ...easyref_core.pictures.tensors import mask_batch
from .batch_rows import BatchSlice, LayerGrid
from .weights import PositionWeights, Weight


class Mask(Weight):
    """A mask over the whole picture, of any size, one for all latents or one for each.

    Args:
        pixels: see `mask_batch`.

    Raises:
        EasyRefError: see `mask_batch`.
    """

    by_position = True

    def __init__(self, pixels: Any) -> None:
        self._pixels = mask_batch(pixels).clamp(0, 1)
        self._is_zero = not bool(self._pixels.any())
        # Filled with results that depend on the key alone; losing a race costs only time.
        self._resized: dict[tuple[Any, ...], PositionWeights] = {}

    @property
    def is_zero(self) -> bool:
        return self._is_zero

    @property
    def batch(self) -> int:
        return self._pixels.shape[0]

    def check_batch(self, batch: BatchSlice) -> None:
        if not batch.takes(self.batch):
            raise EasyRefError(
                f"The mask has a batch of {self.batch}, but there are {batch.total} latents. Use "
                "one mask for all, or as many masks as latents."
            )

    def times(self, other: Mask) -> Mask:
        """Where both are white, stretched over each other.

        Raises:
            EasyRefError: they are for batches of different size.
        """
        if 1 not in (self.batch, other.batch) and self.batch != other.batch:
            raise EasyRefError(
                f"The mask of a region has a batch of {self.batch} and that of EasyRef Apply of "
                f"{other.batch}. Use one mask for all latents, or as many as latents in both."
            )
        first, second = self._pixels[:, None], other._pixels[:, None].to(self._pixels.device)
        size = [max(a, b) for a, b in zip(first.shape[-2:], second.shape[-2:], strict=True)]
        # Nearest, so that an edge stays as sharp as it was; the layers average later.
        grown = (F.interpolate(mask, size, mode="nearest-exact") for mask in (first, second))
        return Mask(torch.mul(*grown)[:, 0])

    def at_positions(
        self, grid: LayerGrid, batch: BatchSlice, like: torch.Tensor
    ) -> PositionWeights:
        """See `Weight`. One mask for all latents leaves out the positions where it is black."""
        key = (grid, like.device, like.dtype)
        if key not in self._resized:
            self._resized[key] = self._resize_to(grid, like)
        resized = self._resized[key]
        return resized if self.batch == 1 else PositionWeights(batch.select(resized.values))

    def _resize_to(self, grid: LayerGrid, like: torch.Tensor) -> PositionWeights:
        """For all latents, with values [B, P, 1]. The positions are found on the mask's own
        device, so that a step does not wait for another."""
        mask = self._pixels[:, None]
        if grid.area is not None:
            height, width, top, left = grid.area
            mask = _resize(mask, *grid.latent)[:, :, top : top + height, left : left + width]
        values = _resize(mask, *grid.size).flatten(1)[..., None]
        if self.batch == 1:
            positions = values.flatten().nonzero().flatten()
            if positions.shape[0] < values.shape[1]:
                return PositionWeights(values[:, positions].to(like), positions.to(like.device))
        return PositionWeights(values.to(like))


def _resize(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[B, 1, H, W] -> [B, 1, height, width]; averages where it shrinks, so nothing thin is lost."""
    shrunk = min(height, mask.shape[-2]), min(width, mask.shape[-1])
    mask = F.interpolate(mask, shrunk, mode="area")
    return F.interpolate(mask, (height, width), mode="bilinear", align_corners=False)
