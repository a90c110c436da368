"""Reference pictures as latents of the user's VAE, encoded once for each size of sample."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...easyref_core.adapter.identity import passes, reference_size
from ...easyref_core.encode.group import Reference
from ...easyref_core.errors import EasyRefError
from ...easyref_core.pictures.sizes import MAX_ASPECT
from ...easyref_core.untrusted import shown

CELL = 8
"""Pixels a side of a latent's cell."""

_SIZES = 4  # areas whose latents are kept; a picture of a megapixel takes 256 KB


class ReferenceLatents:
    """Pictures, and their latents for the areas that were sampled last.

    Args:
        vae: ComfyUI's VAE, which loads itself.
        references: one or more.

    Raises:
        EasyRefError: a picture is too elongated.
    """

    def __init__(self, vae: Any, references: Sequence[Reference]) -> None:
        for reference in references:
            width, height = reference.picture.size
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise EasyRefError(
                    f"{reference.name} is {width}x{height}; the largest aspect ratio that can be "
                    f"read is {MAX_ASPECT}. Crop it."
                )
        self._vae = vae
        self._references = tuple(references)
        self._lock = threading.Lock()
        self._latents: OrderedDict[int, tuple[torch.Tensor, ...]] = OrderedDict()

    def sizes(self, area: int) -> list[tuple[int, int]]:
        """(width, height) in pixels of each reference for a sample of this many pixels."""
        return [reference_size(*reference.picture.size, area) for reference in self._references]

    def get(self, area: int, channels: int) -> tuple[torch.Tensor, ...]:
        """[channels, height / 8, width / 8] of each reference, as the VAE gives them, on the CPU.

        Args:
            area: of the sample in pixels.

        Raises:
            EasyRefError: the VAE's latents are for another kind of model, or are no numbers.
        """
        with self._lock:
            if area not in self._latents:
                self._latents[area] = self._encode(area, channels)
            self._latents.move_to_end(area)
            while len(self._latents) > _SIZES:
                self._latents.popitem(last=False)
            return self._latents[area]

    def _encode(self, area: int, channels: int) -> tuple[torch.Tensor, ...]:
        sizes = self.sizes(area)
        latents: dict[int, torch.Tensor] = {}
        for numbers in passes(sizes):
            size = sizes[numbers[0]]
            pictures = [_pixels(self._references[number].picture, size) for number in numbers]
            encoded = self._vae.encode(torch.stack(pictures))
            self._check(encoded, len(numbers), size, channels)
            # Ordinary tensors, which every kind of run can use.
            with torch.inference_mode(False):
                for number, latent in zip(numbers, encoded, strict=True):
                    latents[number] = latent.detach().to("cpu", torch.float32, copy=True)
        return tuple(latents[number] for number in range(len(sizes)))

    def _check(self, encoded: Any, count: int, size: tuple[int, int], channels: int) -> None:
        width, height = size
        wanted = (count, channels, height // CELL, width // CELL)
        if tuple(getattr(encoded, "shape", ())) != wanted:
            found = list(getattr(encoded, "shape", ())) or shown(encoded)
            raise EasyRefError(
                f"The VAE encodes {count} references of {width}x{height} to {found}, but the model "
                f"needs {list(wanted)}. Connect the VAE that belongs to the model."
            )
        if not torch.isfinite(encoded).all():
            raise EasyRefError(
                "The VAE encodes the references to values that are not numbers (NaN or infinite), "
                "as some do in half precision. Use another VAE, or start ComfyUI with --fp32-vae."
            )


def _pixels(picture: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """[H, W, 3] between 0 and 1."""
    resized = picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255)
