"""One model call: which effects act on which rows, with which scale at this noise level."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch

from ...easyref_core.adapter.key_values import TokenKeyValues
from ...easyref_core.errors import EasyRefError
from .batch_rows import Area, BatchSlice, CallRows, LayerGrid, Size
from .weights import Effect, Scale, Weighted

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

    def of_rows(self, both: torch.Tensor) -> torch.Tensor:
        """Keys or values [2 * groups, N, C], unconditional groups first -> [G, N, C], each for as
        many neighbouring rows. The usual order of rows takes no copy."""
        groups = self.key_values.batch
        own = groups > 1  # of each latent
        if self.unconditional == (True, False) and not (own and self.batch.chooses(groups)):
            return both
        halves = slice(groups, None), slice(groups)
        found = [both[halves[unconditional]] for unconditional in self.unconditional]
        if own:
            found = [self.batch.select(half) for half in found]
        return found[0] if len(found) == 1 else torch.cat(found)

    def at_layer(
        self, group: str, size: Size, latent: Size, like: torch.Tensor
    ) -> tuple[Scale, torch.Tensor | None] | None:
        """See `scale_at_layer`."""
        grid, conditionings = LayerGrid(size, latent, self.area), len(self.unconditional)
        return scale_at_layer(self.effect, self.scale, group, grid, self.batch, conditionings, like)


def scale_at_layer(
    weighted: Weighted,
    scale: Scale,
    group: str,
    grid: LayerGrid,
    batch: BatchSlice,
    conditionings: int,
    like: torch.Tensor,
) -> tuple[Scale, torch.Tensor | None] | None:
    """(scale, positions) at the layers of a group and of one size, None for nowhere.

    The scale is a number or broadcasts to [rows, P, 1]; positions are [P], None for all.

    Args:
        scale: of the rows at their noise level.
        conditionings: of the rows, each with `batch`'s latents.
        like: a tensor with the device and dtype.
    """
    factor = weighted.at_layers(group)
    if factor == 0:
        return None
    if factor != 1:
        scale = scale * factor
    found = weighted.at_positions(grid, batch, like)
    if found is None:
        return scale, None
    values = found.values
    if values.shape[1] == 0:
        return None
    if values.shape[0] > 1:
        values = values.repeat(conditionings, 1, 1)
    return values * scale, found.positions


@dataclass(frozen=True, eq=False)
class ModelCall:
    """What is added in one model call.

    Attributes:
        normalise: scales that overlap are divided down to a sum of 1.
    """

    rows: CallRows
    effects: Sequence[EffectOnRows]
    normalise: bool


def effects_on_rows(
    assignments: Sequence[Sequence[Assignment]],
    rows: CallRows,
    scale_per_row: Callable[[Effect], Scale],
    key_values: Callable[[Effect], TokenKeyValues],
) -> list[EffectOnRows]:
    """What is added to the rows of a model call.

    Args:
        assignments: lists of one for each conditioning; what several lists hold adds up.
        scale_per_row: the scale of an effect on all rows of the call.

    Raises:
        EasyRefError: tokens or masks for a batch of another size.
    """
    return [
        effect
        for assigned in assignments
        for effect in _on_rows([*assigned] * rows.tiles, rows, scale_per_row, key_values)
    ]


def _on_rows(
    assigned: Sequence[Assignment],
    call: CallRows,
    scale_per_row: Callable[[Effect], Scale],
    key_values: Callable[[Effect], TokenKeyValues],
) -> Iterator[EffectOnRows]:
    """Group consecutive cond/uncond rows with the same effect into one attention call."""

    def same_attention(number: int) -> tuple[Effect, Area | None] | None:
        assignment = assigned[number]
        if assignment is None:
            return None
        effect, _ = assignment
        if not effect.by_position:
            return effect, None
        if call.is_tile:  # nothing says where in the picture it is
            warn_of_tiles(call.latent)
            return None
        return effect, call.areas[number]

    batch = call.batch
    for shared, group in groupby(range(len(assigned)), same_attention):
        if shared is None:
            continue
        (effect, area), numbers = shared, list(group)
        for weight in effect.weights:
            weight.check_batch(batch)
        rows = slice(numbers[0] * batch.count, (numbers[-1] + 1) * batch.count)
        unconditional = tuple(assigned[number][1] for number in numbers)
        scale, projected = scale_per_row(effect), key_values(effect)
        if not batch.takes(projected.batch):
            raise EasyRefError(
                f"The reference tokens hold {projected.batch} groups, but the batch has "
                f"{batch.total} latents. Make the batch as large as the number of groups, or use "
                "one group for all."
            )
        if isinstance(scale, torch.Tensor):
            scale = scale[rows]
        yield EffectOnRows(effect, unconditional, rows, batch, area, scale, projected)


@lru_cache(maxsize=1)
def warn_of_tiles(latent: Size) -> None:
    logging.warning(
        "EasyRef: another node samples the picture (%d x %d latent cells) in tiles without saying "
        "which tile is where, so references with a mask cannot be placed and are left out.",
        *latent,
    )
