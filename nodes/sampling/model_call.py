"""One model call: which effects act on which rows, with which scale at this noise level."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch

from ...easyref_core.adapter.key_values import TokenKeyValues
from ...easyref_core.errors import EasyRefError
from .batch_rows import (
    Area,
    BatchSlice,
    LayerGrid,
    Size,
    batch_slice,
    is_tile,
    row_counts,
    tile_count,
)
from .conditionings import COND_BATCH, CondBatch, CondRows
from .weights import Effect, Scale

Assignment = tuple[Effect, bool] | None
"""What acts on one conditioning's rows, and whether with the unconditional half of its tokens."""


@dataclass(frozen=True, eq=False)
class EffectOnRows:
    """One effect on neighbouring rows.

    Attributes:
        unconditional: for each conditioning of the rows, which half of the tokens it gets.
        rows: of the call.
        batch: latents of each conditioning.
        area: of the rows, where the effect depends on it.
        scale: of the rows at their noise level: a number, or [rows, 1, 1].
        key_values: of the effect's tokens.
    """

    effect: Effect
    unconditional: tuple[bool, ...]
    rows: slice
    batch: BatchSlice
    area: Area | None
    scale: Scale
    key_values: TokenKeyValues

    def per_row(self, both: torch.Tensor) -> torch.Tensor:
        """Keys or values [2 * groups, N, C], conditional groups first -> [rows, N, C]."""
        groups = self.key_values.batch
        halves = [
            both[groups:] if unconditional else both[:groups]
            for unconditional in self.unconditional
        ]
        rows = [self.batch.select(half) for half in halves]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def at_layer(
        self, group: str, size: Size, latent: Size, like: torch.Tensor
    ) -> tuple[Scale, torch.Tensor | None] | None:
        """(scale, positions) at the layers of a group and of one size, None for nowhere.

        The scale is a number or broadcasts to [rows, P, 1]; positions are [P], None for all.
        """
        factor = self.effect.at_layers(group)
        if factor == 0:
            return None
        scale = self.scale if factor == 1 else self.scale * factor
        found = self.effect.at_positions(LayerGrid(size, latent, self.area), self.batch, like)
        if found is None:
            return scale, None
        values = found.values
        if values.shape[1] == 0:
            return None
        if values.shape[0] > 1:
            values = values.repeat(len(self.unconditional), 1, 1)
        return values * scale, found.positions


@dataclass(frozen=True, eq=False)
class ModelCall:
    """What is added in one model call.

    Attributes:
        rows: of the call.
        conditionings: among which the rows are divided.
        size: of the call's latents.
        latent: size of the whole latent.
        normalise: scales that overlap are divided down to a sum of 1.
    """

    effects: Sequence[EffectOnRows]
    rows: int
    conditionings: int
    size: Size
    latent: Size
    normalise: bool


def plan_model_call(
    conditionings: Sequence[CondRows],
    assignments: Sequence[Sequence[Assignment]],
    x: torch.Tensor,
    text: torch.Tensor | None,
    options: Mapping[str, Any],
    normalise: bool,
    scale_per_row: Callable[[Effect], Scale],
    key_values: Callable[[Effect], TokenKeyValues],
) -> ModelCall | None:
    """What is added in a model call, None for nothing.

    Args:
        conditionings: as ComfyUI notes them.
        assignments: lists of one for each conditioning; what several lists hold adds up.
        x: [rows, C, H, W] latents.
        text: [rows, L, W] text states.
        options: ComfyUI's transformer options.
        normalise: see `ModelCall`.
        scale_per_row: the scale of an effect on all rows of the call.

    Raises:
        EasyRefError: tokens or masks for a batch of another size.
    """
    assignments = [assigned for assigned in assignments if any(assigned)]
    if not assignments:
        return None
    rows, size = x.shape[0], (x.shape[-2], x.shape[-1])
    known: CondBatch | None = options.get(COND_BATCH)
    latent = known.latent if known is not None else size
    counts = row_counts(options, known.latents if known is not None else None)
    tiles = tile_count(rows, len(conditionings), counts, text)
    if not tiles:
        warn_of_rows(rows, len(conditionings) * (counts or [1])[0], len(conditionings))
        return None
    if is_tile(size, latent, (cond.area for cond in conditionings)):
        assignments = _without_position(assignments, latent)
    conditionings = [*conditionings] * tiles
    batch = batch_slice(options, rows // len(conditionings))
    effects = [
        effect
        for assigned in assignments
        for effect in _on_rows([*assigned] * tiles, conditionings, batch, scale_per_row, key_values)
    ]
    return ModelCall(effects, rows, len(conditionings), size, latent, normalise)


def _on_rows(
    assigned: Sequence[Assignment],
    conditionings: Sequence[CondRows],
    batch: BatchSlice,
    scale_per_row: Callable[[Effect], Scale],
    key_values: Callable[[Effect], TokenKeyValues],
) -> Iterator[EffectOnRows]:
    """Group consecutive cond/uncond rows with the same effect into one attention call."""

    def same_attention(number: int) -> tuple[Effect, Area | None] | None:
        assignment = assigned[number]
        if assignment is None:
            return None
        effect, _ = assignment
        return effect, conditionings[number].area if effect.by_position else None

    for shared, group in groupby(range(len(conditionings)), same_attention):
        if shared is None:
            continue
        (effect, area), numbers = shared, list(group)
        for weight in effect.weights:
            weight.check_batch(batch.total)
        rows = slice(numbers[0] * batch.count, (numbers[-1] + 1) * batch.count)
        unconditional = tuple(assigned[number][1] for number in numbers)
        scale, projected = scale_per_row(effect), key_values(effect)
        _check_groups(projected.batch, batch.total)
        if isinstance(scale, torch.Tensor):
            scale = scale[rows]
        yield EffectOnRows(effect, unconditional, rows, batch, area, scale, projected)


def _without_position(
    assignments: Sequence[Sequence[Assignment]], latent: Size
) -> list[list[Assignment]]:
    """Without effects that depend on the position: nothing says where in the picture a tile is."""
    kept = [
        [a if a and not a[0].by_position else None for a in assigned] for assigned in assignments
    ]
    if kept != [list(assigned) for assigned in assignments]:
        _warn_of_tiles(latent)
    return [assigned for assigned in kept if any(assigned)]


def _check_groups(groups: int, latents: int) -> None:
    if groups not in (1, latents):
        raise EasyRefError(
            f"The reference tokens hold {groups} groups, but the batch has {latents} latents. "
            "Make the batch as large as the number of groups, or use one group for all."
        )


@lru_cache(maxsize=8)
def warn_of_rows(found: int, rows: int, conditionings: int) -> None:
    """Once for each case."""
    logging.warning(
        "EasyRef: another node changed the batch (%d rows, where %d are expected for %d "
        "conditionings), so references cannot be told apart there and are left out.",
        found,
        rows,
        conditionings,
    )


@lru_cache(maxsize=1)
def _warn_of_tiles(latent: Size) -> None:
    logging.warning(
        "EasyRef: another node samples the picture (%d x %d latent cells) in tiles without saying "
        "which tile is where, so references with a mask cannot be placed and are left out.",
        *latent,
    )
