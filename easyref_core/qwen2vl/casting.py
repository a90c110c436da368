"""Layers that keep their weights in one dtype and compute in that of their input.

In the place of `torch.nn` for an encoder, a file in half precision takes half the memory when it is
computed with in float32, and gives the same numbers as weights that were converted beforehand.
Linear layers may also have int8 weights, see `int8`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .int8 import RowScaled, scaled_linear

Embedding = nn.Embedding  # rows are converted after the look-up


class Linear(RowScaled, nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = _to(x.dtype, self.bias)
        return scaled_linear(x, self.weight.to(x.dtype), bias, self.weight_scale)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = _to(x.dtype, self.weight), _to(x.dtype, self.bias)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, _to(x.dtype, self.weight), self.eps)


def _to(dtype: torch.dtype, weight: torch.Tensor | None) -> torch.Tensor | None:
    return None if weight is None else weight.to(dtype)
