"""Which latents of a larger batch a run samples.

Latent From Batch, Rebatch Latents and others note in `batch_index` where each latent was, so that
it is sampled with the noise that it had there. Of this, ComfyUI tells the sampling nothing but the
noise itself; so the places are found by making the noise of each place again.
"""

from __future__ import annotations

from typing import Any

import comfy.sample
import torch

_FIRST = 16  # numbers of a latent's noise that are compared before all of them are


def batch_index(noise: Any, seed: Any, most: int) -> tuple[int, ...] | None:
    """The place of each latent in its batch, None if it cannot be told: the noise is another, or of
    a place that is not among the first `most`.

    Args:
        noise: [B, ...] that the run was given.
        seed: that the noise was made with.
    """
    if not isinstance(noise, torch.Tensor) or noise.is_nested or not isinstance(seed, int):
        return None
    generator = torch.Generator().manual_seed(seed)  # ComfyUI's own would change what follows
    rows = noise.detach().cpu().flatten(1)
    places: dict[int, int] = {}
    for place in range(most):
        made = comfy.sample.prepare_noise_inner(noise[:1], generator, [0]).flatten(1)
        same = (rows[:, :_FIRST] == made[:, :_FIRST]).all(dim=1)
        for row in same.nonzero().flatten().tolist():
            if torch.equal(rows[row], made[0]):
                places.setdefault(row, place)
        if len(places) == len(rows):
            return tuple(places[row] for row in range(len(rows)))
    return None
