"""Which rows of a model call belong to which latent of the batch.

Three cases beside the plain one: windows of frames, areas, and tiles. ComfyUI's context windows and
AnimateDiff-Evolved call the model with a few frames at a time. Tiled sampling (MultiDiffusion) cuts
all rows of a call into tiles and concatenates them, while ComfyUI's options still describe the rows
as they were.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .conditionings import CondBatch

Size = tuple[int, int]
"""(height, width)"""

Area = tuple[int, ...]
"""(height, width, top, left) in latent cells."""


@dataclass(frozen=True)
class BatchSlice:
    """The latents of a model call.

    Attributes:
        total: latents of the run's batch.
        indices: of this call's latents in it, None for all of them in order.
        origins: where the run's latents were in the batch that they were taken from, if it is
            known; see `batch_index`. They count where there is one for each latent.
    """

    total: int
    indices: tuple[int, ...] | None = None
    origins: tuple[int, ...] | None = None

    @property
    def count(self) -> int:
        """Latents of this call."""
        return self.total if self.indices is None else len(self.indices)

    def takes(self, count: int) -> bool:
        """Whether so many masks or groups of tokens can be given to the latents."""
        return count in (1, self.total) or self._follows_origins(count)

    def chooses(self, count: int) -> bool:
        """Whether of so many, one for each latent, others are used than all in order."""
        return self.indices is not None or self._follows_origins(count)

    def select(self, per_latent: torch.Tensor) -> torch.Tensor:
        """[n, ...] for each latent, of an n that it takes, -> [count, ...]; one for all is expanded
        without a copy."""
        total = per_latent.shape[0]
        if total == 1:
            return per_latent.expand(self.count, *per_latent.shape[1:])
        indices = self.indices
        if self._follows_origins(total):
            used = range(self.total) if indices is None else indices
            indices = tuple(self.origins[index] for index in used)
        if indices is None:
            return per_latent
        return per_latent.index_select(0, _index(indices, per_latent.device))

    def _follows_origins(self, count: int) -> bool:
        """Whether there is one for each place in the batch that the latents were taken from."""
        origins = self.origins
        return origins is not None and len(origins) == self.total and max(origins) < count


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


@dataclass(frozen=True)
class CallRows:
    """How the rows of a model call are divided.

    Attributes:
        total: rows of the call.
        tiles: each with the rows of all conditionings.
        batch: latents of each conditioning.
        areas: of each conditioning, in the order of the rows; None for the whole latent.
        size: of the call's latents.
        latent: size of the whole latent.
    """

    total: int
    tiles: int
    batch: BatchSlice
    areas: tuple[Area | None, ...]
    size: Size
    latent: Size

    @property
    def is_tile(self) -> bool:
        """Whether another node cut the latents: they are not what the areas say."""
        return any(self.size != self._size_of(area) for area in self.areas)

    def _size_of(self, area: Area | None) -> Size:
        if area is None:
            return self.latent
        height, width, top, left = area
        return min(height, self.latent[0] - top), min(width, self.latent[1] - left)


def divide_rows(
    x: torch.Tensor,
    text: torch.Tensor | None,
    areas: Sequence[Area | None],
    options: Mapping[str, Any],
    noted: CondBatch | None,
) -> CallRows | None:
    """Divide the rows of a model call; None, with a warning, if they cannot be told apart.

    Args:
        x: [rows, C, H, W] latents.
        text: [rows, L, W] text states, which show whether the rows have another order.
        areas: of the conditionings, None for the whole latent.
        options: ComfyUI's transformer options.
        noted: what ComfyUI was called with; None if the caller went around its sampling.
    """
    rows, size = x.shape[0], (x.shape[-2], x.shape[-1])
    indices, total = _context_window(options)
    # A window may have been cut after ComfyUI noted the batch.
    counts = [n for n in (indices and len(indices), noted and noted.latents) if n]
    tiles = _tile_count(rows, len(areas), counts, text)
    if not tiles:
        warn_of_rows(rows, len(areas) * (counts or [1])[0], len(areas))
        return None
    count = rows // (len(areas) * tiles)
    batch = BatchSlice(count)
    if indices is not None and len(indices) == count:
        batch = BatchSlice(max(total or 0, max(indices) + 1), tuple(indices))
    if noted is not None:
        batch = replace(batch, origins=noted.origins)
    return CallRows(rows, tiles, batch, tuple(areas) * tiles, size, noted.latent if noted else size)


def _tile_count(
    rows: int, conditionings: int, counts: Sequence[int], text: torch.Tensor | None
) -> int:
    """How many tiles a model call holds, each with the rows of all its conditionings; 0 if the rows
    cannot be told apart.

    Args:
        counts: how many rows each conditioning can have, most likely first.
    """
    if not counts:
        return 1 if rows % conditionings == 0 else 0
    for count in counts:
        tiles, rest = divmod(rows, conditionings * count)
        # Texts are compared for tiles only, as this waits for the device.
        if not rest and (tiles == 1 or _repeats(text, rows, tiles)):
            return tiles
    return 0


def _repeats(text: torch.Tensor | None, rows: int, tiles: int) -> bool:
    """Whether the rows of every tile have the same texts."""
    if text is None or text.shape[0] != rows:
        return True
    per_tile = text.unflatten(0, (tiles, -1))
    return torch.equal(per_tile, per_tile[:1].expand_as(per_tile))


@lru_cache(maxsize=8)
def warn_of_rows(found: int, expected: int, conditionings: int) -> None:
    """Once for each case."""
    logging.warning(
        "EasyRef: another node changed the batch (%d rows, where %d are expected for %d "
        "conditionings), so references cannot be told apart there and are left out.",
        found,
        expected,
        conditionings,
    )


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
