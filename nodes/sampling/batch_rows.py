"""Which rows of a model call belong to which latent of the batch.

Three cases beside the plain one: windows of frames, areas, and tiles. ComfyUI's context windows and
AnimateDiff-Evolved call the model with a few frames at a time. Tiled sampling (MultiDiffusion) cuts
all rows of a call into tiles and concatenates them, while ComfyUI's options still describe the rows
as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

Size = tuple[int, int]
"""(height, width)"""

Area = tuple[int, ...]
"""(height, width, top, left) in latent cells."""


@dataclass(frozen=True)
class BatchSlice:
    """The latents of a model call.

    Attributes:
        total: latents of the whole batch.
        indices: of this call's latents in it, None for all of them in order.
    """

    total: int
    indices: tuple[int, ...] | None = None

    @property
    def count(self) -> int:
        """Latents of this call."""
        return self.total if self.indices is None else len(self.indices)

    def select(self, per_latent: torch.Tensor) -> torch.Tensor:
        """[total or 1, ...] -> [count, ...]; one for all is expanded without a copy."""
        if per_latent.shape[0] == 1:
            return per_latent.expand(self.count, *per_latent.shape[1:])
        if self.indices is None:
            return per_latent
        return per_latent.index_select(0, _index(self.indices, per_latent.device))


@dataclass(frozen=True)
class LayerGrid:
    """The positions of an attention layer, and the part of the picture that they cover.

    Attributes:
        size: of the layer; it has height * width positions.
        latent: of the whole latent, in cells.
        area: the part of the latent that the layer covers, None for all.
    """

    size: Size
    latent: Size
    area: Area | None = None


def batch_slice(transformer_options: Mapping[str, Any], count: int) -> BatchSlice:
    """The latents of a model call that holds `count` of them for each conditioning."""
    indices, total = _context_window(transformer_options)
    if indices is None or len(indices) != count:
        return BatchSlice(count)
    return BatchSlice(max(total or 0, max(indices) + 1), tuple(indices))


def row_counts(transformer_options: Mapping[str, Any], latents: int | None) -> list[int]:
    """How many rows each conditioning of a model call can have, most likely first: those of a
    window of frames, which may have been cut after ComfyUI noted the batch, and of the batch.

    Args:
        latents: of the batch, None where that is unknown.
    """
    indices, _ = _context_window(transformer_options)
    return [count for count in (indices and len(indices), latents) if count]


def tile_count(
    rows: int, conditionings: int, counts: Sequence[int], text: torch.Tensor | None
) -> int:
    """How many tiles a model call holds, each with the rows of all its conditionings.

    Args:
        rows: of the call.
        counts: see `row_counts`.
        text: [rows, L, W] text states, which show whether the rows have another order.

    Returns:
        1 as a rule; 0 where the rows cannot be told apart.
    """
    if not counts:
        return 1 if rows % conditionings == 0 else 0
    for count in counts:
        tiles, rest = divmod(rows, conditionings * count)
        # Texts are compared for tiles only, as this waits for the device.
        if not rest and (tiles == 1 or _repeats(text, rows, tiles)):
            return tiles
    return 0


def is_tile(latent: Size, whole: Size, areas: Iterable[Area | None]) -> bool:
    """Whether another node cut the latents of a model call: they are not what the areas say.

    Args:
        latent: size of the call's latents.
        whole: size of the latent that is sampled.
        areas: of the call's conditionings, None for the whole latent.
    """
    return any(latent != _size(area, whole) for area in areas)


def _size(area: Area | None, whole: Size) -> Size:
    if area is None:
        return whole
    height, width, top, left = area
    return min(height, whole[0] - top), min(width, whole[1] - left)


def _repeats(text: torch.Tensor | None, rows: int, tiles: int) -> bool:
    """Whether the rows of every tile have the same texts."""
    if text is None or text.shape[0] != rows:
        return True
    per_tile = text.unflatten(0, (tiles, -1))
    return torch.equal(per_tile, per_tile[:1].expand_as(per_tile))


def _context_window(options: Mapping[str, Any]) -> tuple[Sequence[int] | None, int | None]:
    """(indices of the frames of a window, number of all frames), None without windows."""
    window = options.get("context_window")  # ComfyUI's
    if window is not None and window.dim == 0:
        # Newer cores sample the frame before a window with it, and drop its result.
        before = getattr(window, "causal_anchor_index", None)
        indices = window.index_list if before is None else [before, *window.index_list]
        return indices, window.total_frames
    parameters = options.get("ad_params") or {}  # AnimateDiff-Evolved's
    return parameters.get("sub_idxs"), parameters.get("full_length")


@lru_cache(maxsize=64)
def _index(indices: tuple[int, ...], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(indices, device=device)
