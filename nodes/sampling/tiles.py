"""Model calls that another node made of ComfyUI's own, one tile of the latents or several at once.

Tiled sampling (MultiDiffusion) cuts all rows of a call into tiles and puts these one behind the
other, while ComfyUI's notes still tell of the rows as they were.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .run_info import Chunk


def repetitions(
    rows: int, conditionings: int, each: Sequence[int], text: torch.Tensor | None
) -> int:
    """How often the rows of a model call run through its conditionings.

    Args:
        each: how many rows a conditioning may have; empty where that is unknown.
        text: [rows, L, W], by which rows in another order are noticed.

    Returns:
        1 as a rule, the number of tiles where all rows are there once for each, 0 where the rows
        cannot be told apart.
    """
    if not each:
        return 1 if rows % conditionings == 0 else 0
    for own in each:
        times, rest = divmod(rows, conditionings * own)
        # Only tiles pay for comparing the texts, which waits for the device.
        if not rest and (times == 1 or _repeats(text, rows, times)):
            return times
    return 0


def _repeats(text: torch.Tensor | None, rows: int, times: int) -> bool:
    """Whether every tile's rows have the same texts."""
    if text is None or text.shape[0] != rows:
        return True
    tiles = text.unflatten(0, (times, -1))
    return torch.equal(tiles, tiles[:1].expand_as(tiles))


def is_tile(latent: tuple[int, int], whole: tuple[int, int], chunks: Sequence[Chunk]) -> bool:
    """Whether the latents of a model call are not what its conditionings' areas say.

    Args:
        latent: (height, width) of the call's latents.
        whole: (height, width) of the latent that they were cut from.
    """
    return any(latent != _size(chunk, whole) for chunk in chunks)


def _size(chunk: Chunk, whole: tuple[int, int]) -> tuple[int, int]:
    if chunk.area is None:
        return whole
    height, width, top, left = chunk.area
    return min(height, whole[0] - top), min(width, whole[1] - left)
