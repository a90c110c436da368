"""A vision transformer's start: it knows pictures' patches and places before its first step.

With random patch embeddings, a small transformer needs many times the steps to see small things.
"""

from __future__ import annotations

import math

import torch
from torch import nn

_SAMPLE = 500  # pictures


@torch.no_grad()
def start_patches(conv: nn.Conv2d, positions: torch.Tensor, pixels: torch.Tensor) -> None:
    """Set the patch embedding to principal components, the position embedding to waves.

    Args:
        conv: cuts into patches.
        positions: [1 + rows * columns, W] the embeddings, that of the class token first; changed.
        pixels: [N, 3, S, S] preprocessed pictures.
    """
    size, width = conv.kernel_size[0], conv.out_channels
    patches = nn.functional.unfold(pixels[:_SAMPLE], size, stride=size)  # [N, 3 * size², P]
    rows = patches.transpose(1, 2).flatten(0, 1)
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    values, vectors = values.flip(0)[:width], vectors.flip(1)[:, :width]
    # Between plain and whitened components: details count, noise does not.
    scaled = vectors * values.clamp(min=1e-6) ** -0.25
    scaled = scaled / (rows @ scaled).std()
    conv.weight.copy_(scaled.T.reshape(conv.weight.shape))
    side = math.isqrt(len(positions) - 1)
    positions[1:] = 0.5 * _waves(side, width)


def _waves(side: int, width: int) -> torch.Tensor:
    """[side², width] sines and cosines of rows and columns."""
    rates = math.pi * torch.arange(1, width // 4 + 1) / (width // 4) * 2
    angles = torch.arange(side)[:, None] * rates
    one = torch.cat((angles.sin(), angles.cos()), dim=1)  # [side, width / 2]
    rows, columns = one.repeat_interleave(side, 0), one.repeat(side, 1)
    return torch.cat((rows, columns), dim=1)
