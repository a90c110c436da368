"""Scaled fp8: weights that were divided by a scale before they were rounded to one byte.

The scale of `X.weight` is `X.scale_weight` or `X.weight_scale`, one number or one for each row.
ComfyUI marks such files by a tensor `scaled_fp8`, newer ones each weight by `X.comfy_quant`. Scales
of activations (`X.input_scale`) are of no use where weights are computed with as usual. Whatever
else stands beside a weight stays in the list of tensors, where nothing claims it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from ..errors import EasyRefError
from ..untrusted import escaped, parse_json
from .dtypes import WEIGHTS, all_finite
from .stored import TensorInfo

_WEIGHT = "weight"
_SCALES = ("scale_weight", "weight_scale")
_OF_ACTIVATIONS = ("scale_input", "input_scale")
_FORMAT, _MARK = "comfy_quant", "scaled_fp8"
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_MAX_ROWS = 1_000_000
_MAX_FORMAT_BYTES = 4096


def split_scales(
    tensors: Mapping[str, TensorInfo], read: Callable[[str], torch.Tensor]
) -> tuple[dict[str, TensorInfo], dict[str, torch.Tensor]]:
    """(tensors without scales and their marks, name of a weight -> its scale in float32).

    Raises:
        EasyRefError: a scale is not a number (named).
    """
    rest = {n: t for n, t in tensors.items() if n.rpartition(".")[2] != _MARK}
    scales: dict[str, torch.Tensor] = {}
    for name in tensors:
        layer = name.removesuffix(_WEIGHT)
        found = [layer + n for n in _SCALES if layer + n in tensors]
        if layer == name or len(found) != 1 or not _fits(tensors[name], tensors[found[0]]):
            continue
        mark = tensors.get(layer + _FORMAT)
        if mark and not _is_plain(mark, layer + _FORMAT, tensors[name], read):
            continue
        scale = read(found[0]).float()
        if not all_finite(scale):
            raise EasyRefError(
                f"The scale {escaped(found[0])} holds values that are not numbers (NaN or "
                "infinite). The file is damaged; download it again."
            )
        scales[name] = scale
        for suffix in (*_SCALES, *_OF_ACTIVATIONS, _FORMAT):
            rest.pop(layer + suffix, None)
    return rest, scales


def apply_scale(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weight times its scale (or that of its first rows), in float32."""
    if scale.numel() > 1:
        scale = scale[: len(weight)]
    else:
        scale = scale.reshape(())
    return weight.to(torch.float32, copy=True).mul_(scale)


def _fits(weight: TensorInfo, scale: TensorInfo) -> bool:
    """Whether it is one number, or one for each row."""
    if scale.dtype not in WEIGHTS or weight.dtype not in WEIGHTS:
        return False
    by_row = len(weight.shape) == 2 and scale.shape == (weight.shape[0], 1)
    return math.prod(scale.shape) == 1 or (by_row and 0 < scale.shape[0] <= _MAX_ROWS)


def _is_plain(
    mark: TensorInfo, name: str, weight: TensorInfo, read: Callable[[str], torch.Tensor]
) -> bool:
    """Whether the mark says that the weight is fp8 with a plain scale."""
    if mark.dtype != "uint8" or math.prod(mark.shape) > _MAX_FORMAT_BYTES:
        return False
    content = parse_json(read(name).numpy().tobytes(), name)
    found = content.get("format") if isinstance(content, dict) else None
    return found in _FORMATS and found == weight.dtype
