"""Linear layers with int8 weights and a scale for each output.

The int8 numbers are exact in the dtype of the computation, so the only rounding is that of the
weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

SCALE = "weight_scale"


class RowScaled(nn.Module):
    """A base class of Linear layers, before that of the library.

    Attributes:
        weight_scale: of int8 weights, [out_features] float32; None where the weights are as they
            are used.
    """

    weight_scale: torch.Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer(SCALE, None)


def scaled_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    """x [..., in] -> [..., out].

    Args:
        weight: [out, in] in the dtype of x, with `scale` whole numbers.
        scale: [out] float32, on any device; None for weights as they are.
    """
    if scale is None:
        return F.linear(x, weight, bias)
    scale = scale.to(x.device)
    if x.dtype == torch.float16:  # in which sums of whole numbers overflow
        return F.linear(x, (weight * scale[:, None]).half(), bias)
    out = F.linear(x, weight).mul_(scale)
    return out if bias is None else out.add_(bias)


def int8_layers(body: nn.Module) -> list[str]:
    """Names of the layers of an `MllmBody` whose weights may be int8: all Linear layers but that
    which reads the pixels.

    Raises:
        TypeError: its layers know no scale.
    """
    names = [name for name, module in body.named_modules() if isinstance(module, RowScaled)]
    if not names:
        raise TypeError("int8 needs layers that know a scale: easyref_core.qwen2vl.casting")
    return [name for name in names if not name.startswith("visual.patch_embed.")]
