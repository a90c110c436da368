"""Where references act: a picture mask at every attention resolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ...easyref_core.errors import EasyRefError
from .frames import Frames
from .run_info import Area


@dataclass(frozen=True, eq=False)
class Spots:
    """Where one mask is not black at an attention layer.

    Attributes:
        positions: [P] of the layer's T positions, None for all of them.
        values: [1, P, 1], the mask there.
    """

    positions: torch.Tensor | None
    values: torch.Tensor

    @property
    def count(self) -> int:
        return self.values.shape[1]


class Mask:
    """A mask [1 or B, H, W], or with one channel, in 0..1 over the whole picture, of any size.

    Raises:
        EasyRefError: wrong shape or values that are not numbers.
    """

    def __init__(self, pixels: torch.Tensor) -> None:
        if pixels.ndim == 2:
            pixels = pixels[None]
        if pixels.ndim == 4 and pixels.shape[1] == 1:  # as ComfyUI keeps noise masks
            pixels = pixels[:, 0]
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
        self.empty = not bool(self._pixels.any())
        # Filled with results that depend on the key alone; losing a race costs only time.
        self._made: dict[tuple[Any, ...], torch.Tensor] = {}
        self._spots: dict[tuple[Any, ...], Spots] = {}

    @property
    def batch(self) -> int:
        return self._pixels.shape[0]

    def check(self, latents: int) -> None:
        """Raise EasyRefError unless there is one mask, or one for each of the latents."""
        if self.batch not in (1, latents):
            raise EasyRefError(
                f"The mask has a batch of {self.batch}, but there are {latents} latents. Use one "
                "mask for all, or as many masks as latents."
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

    def at(
        self,
        height: int,
        width: int,
        whole: tuple[int, int],
        area: Area | None,
        frames: Frames,
        like: torch.Tensor,
    ) -> torch.Tensor:
        """The mask at an attention layer.

        Args:
            height, width: of the layer.
            whole: (height, width) of the whole latent.
            area: the part of the latent that the layer covers, None for all.
            frames: whose masks are wanted.
            like: gives device and dtype.

        Returns:
            [frames.count, height * width, 1]

        Raises:
            EasyRefError: the mask's batch is neither 1 nor `frames.total`.
        """
        self.check(frames.total)
        key = (height, width, whole, area, like.device, like.dtype)
        if key not in self._made:
            self._made[key] = self._shrink(height, width, whole, area).to(like)
        return frames.pick(self._made[key])

    def spots(
        self,
        height: int,
        width: int,
        whole: tuple[int, int],
        area: Area | None,
        like: torch.Tensor,
    ) -> Spots:
        """Where a mask for all latents is not black at an attention layer; arguments as for `at`.

        Found on the mask's own device and kept, so that a step does not wait for it.
        """
        key = (height, width, whole, area, like.device, like.dtype)
        if key not in self._spots:
            values = self._shrink(height, width, whole, area)[:1]
            found = values.flatten().nonzero().flatten()
            if found.shape[0] == values.shape[1]:
                self._spots[key] = Spots(None, values.to(like))
            else:
                self._spots[key] = Spots(found.to(like.device), values[:, found].to(like))
        return self._spots[key]

    def _shrink(
        self, height: int, width: int, whole: tuple[int, int], area: Area | None
    ) -> torch.Tensor:
        """[B, height * width, 1]"""
        mask = self._pixels[:, None]
        if area is not None:
            mask = _resize(mask, *whole)
            tall, wide, top, left = area
            mask = mask[:, :, top : top + tall, left : left + wide]
        return _resize(mask, height, width).flatten(1)[..., None]


def _resize(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[B, 1, H, W] -> [B, 1, height, width]; averages where it shrinks, so nothing thin is lost."""
    shrunk = min(height, mask.shape[-2]), min(width, mask.shape[-1])
    mask = F.interpolate(mask, shrunk, mode="area")
    return F.interpolate(mask, (height, width), mode="bilinear", align_corners=False)
