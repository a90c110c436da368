"""Which reference tokens act on which rows and positions of one model call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ...easyref_core.adapter.attention import ReferenceShare
from ...easyref_core.adapter.key_values import TokenKeyValues
from ...easyref_core.errors import EasyRefError
from .frames import Frames
from .parts import Part, Settings
from .run_info import Chunk

Lane = list[tuple[Part, bool] | None]
"""For each chunk of a call the part that acts on it, and whether by its unconditional half."""

Scale = float | torch.Tensor


@dataclass(frozen=True, eq=False)
class Share:
    """One part on a run of neighbouring rows.

    Attributes:
        chunks: whose rows they are.
        unconditional: which half of the tokens each chunk gets.
        rows: of the call.
        frames: latents of a chunk.
        rate: weight of the rows with window and curves: a number, or [rows, 1, 1].
        key_values: of the part's tokens.
    """

    part: Part
    chunks: tuple[Chunk, ...]
    unconditional: tuple[bool, ...]
    rows: slice
    frames: Frames
    rate: Scale
    key_values: TokenKeyValues

    def select(self, both: torch.Tensor) -> torch.Tensor:
        """[2 * groups, N, C], conditional groups first -> one group a row [rows, N, C]."""
        groups = self.key_values.batch
        parts = []
        for unconditional in self.unconditional:
            first = groups if unconditional else 0
            parts.append(self.frames.pick(both[first : first + groups]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def strength(
        self, group: str, height: int, width: int, whole: tuple[int, int], like: torch.Tensor
    ) -> tuple[Scale, torch.Tensor | None] | None:
        """(scale, positions) at the layers of a group and of one resolution, None for nowhere.

        The scale is a number or broadcasts to [rows, P, 1]; positions [P], None for all.
        """
        settings = self.part.settings
        factor = settings.layer_weights.of(group)
        if factor == 0:
            return None
        rate = self.rate if factor == 1 else self.rate * factor
        mask = settings.mask
        if mask is None:
            return rate, None
        if mask.batch == 1:
            spots = mask.spots(height, width, whole, self.chunks[0].area, like)
            return (spots.values * rate, spots.positions) if spots.count else None
        masks = [mask.at(height, width, whole, c.area, self.frames, like) for c in self.chunks]
        return torch.cat(masks) * rate, None


def shares_of_lane(
    lane: Lane,
    chunks: Sequence[Chunk],
    frames: Frames,
    rate: Callable[[Settings], Scale],
    key_values: Callable[[Part], TokenKeyValues],
) -> list[Share]:
    """A lane cut into runs of chunks that can be attended together.

    Args:
        rate: the rate of settings for all rows of the call.

    Raises:
        EasyRefError: a batch of tokens or masks that is not the latents'.
    """
    shares: list[Share] = []
    start, each = 0, frames.count
    while start < len(chunks):
        first, end = lane[start], start + 1
        while end < len(chunks) and _together(lane, chunks, start, end):
            end += 1
        if first is not None:
            part = first[0]
            if part.settings.mask is not None:
                part.settings.mask.check(frames.total)
            rows = slice(start * each, end * each)
            every = rate(part.settings)
            made = key_values(part)
            _check_groups(made.batch, frames.total)
            shares.append(
                Share(
                    part,
                    tuple(chunks[start:end]),
                    tuple(one[1] for one in lane[start:end] if one is not None),
                    rows,
                    frames,
                    every[rows] if isinstance(every, torch.Tensor) else every,
                    made,
                )
            )
        start = end
    return shares


def _together(lane: Lane, chunks: Sequence[Chunk], start: int, other: int) -> bool:
    first, second = lane[start], lane[other]
    if first is None or second is None:
        return first is second
    masked = first[0].settings.mask is not None
    return first[0] is second[0] and not (masked and chunks[start].area != chunks[other].area)


def _check_groups(groups: int, latents: int) -> None:
    if groups not in (1, latents):
        raise EasyRefError(
            f"The reference tokens hold {groups} groups, but the batch has {latents} latents. "
            "Make the batch as large as the number of groups, or use one group for all."
        )


@dataclass(frozen=True, eq=False)
class ModelCall:
    """What all layers of one model call share.

    Attributes:
        rows: of the call.
        conditionings: chunks of rows.
        latent: (height, width) of its latents.
        whole: (height, width) of the latent that they were cut from.
        normalise: weights that overlap are scaled down to a sum of 1.
    """

    shares: Sequence[Share]
    rows: int
    conditionings: int
    latent: tuple[int, int]
    whole: tuple[int, int]
    normalise: bool
    # Layers of one group and resolution share these; a call runs its layers one after the other.
    _strengths: dict[
        tuple[str, int, int, torch.dtype], list[tuple[Share, Scale, torch.Tensor | None]]
    ] = field(default_factory=dict)

    def acts_on(self, group: str) -> bool:
        """Whether anything is added in a group's layers, as far as the host can tell."""
        return any(share.part.settings.layer_weights.of(group) != 0 for share in self.shares)

    def at(
        self, layer: str, group: str, height: int, width: int, query: torch.Tensor
    ) -> list[ReferenceShare]:
        """What to add in a layer.

        Args:
            query: [rows, height * width, C]
        """
        key = (group, height, width, query.dtype)
        if key not in self._strengths:
            self._strengths[key] = self._all_strengths(group, height, width, query)
        result = []
        for share, scale, positions in self._strengths[key]:
            keys, values = (
                share.select(both).to(query.dtype) for both in share.key_values.layers[layer]
            )
            everywhere = share.rows == slice(0, self.rows)
            rows = None if everywhere else share.rows
            result.append(ReferenceShare(keys, values, scale, rows, positions))
        return result

    def _all_strengths(
        self, group: str, height: int, width: int, query: torch.Tensor
    ) -> list[tuple[Share, Scale, torch.Tensor | None]]:
        found = []
        for share in self.shares:
            strength = share.strength(group, height, width, self.whole, query)
            if strength is not None:
                found.append((share, *strength))
        if not self.normalise:
            return found
        total = query.new_zeros(self.rows, query.shape[1], 1)
        for share, scale, positions in found:
            own = total[share.rows]
            if positions is None:
                own += abs(scale)
            else:
                shape = (own.shape[0], positions.shape[0], 1)
                own.index_add_(1, positions, abs(scale).to(own.dtype).expand(shape))
        total.clamp_(min=1)
        return [
            (
                share,
                scale / (total[share.rows] if p is None else total[share.rows].index_select(1, p)),
                p,
            )
            for share, scale, p in found
        ]
