"""Pictures and masks as tensors, whatever kind of values they hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..errors import EasyRefError
from ..untrusted import shown

_NUMPY = {"f": np.float32, "i": np.int64, "u": np.int64, "b": np.bool_}


def as_levels(values: Any, name: str, unit: str, dimensions: int) -> torch.Tensor:
    """Pictures or masks in float32, 0 to 1, on their own device.

    Args:
        values: floats are taken as they are, whole numbers as levels from 0 to 255, booleans as 0
            and 1. A list is one batch of all its items.
        name: for messages.
        unit: what one of them is called, such as "picture"; for messages.
        dimensions: of one without a batch, which is given one.

    Raises:
        EasyRefError: no tensor, items of different sizes, whole numbers outside 0 to 255, or
            values of another kind (complex, sparse, quantised, without data).
    """
    if isinstance(values, (list, tuple)):
        named = ((f"{name} ({unit} {number})", item) for number, item in enumerate(values, start=1))
        items = [_levels(item, label, unit, dimensions) for label, item in named]
        sizes = {tuple(item.shape[1:]): None for item in items}
        if not items:
            raise EasyRefError(f"{name} is an empty list. Connect at least one {unit}.")
        if len(sizes) > 1:
            first, second, *_ = map(list, sizes)
            raise EasyRefError(
                f"{name} is a list of {len(items)} of different sizes (shapes {first} and "
                f"{second}), which cannot be one batch. Make them the same size, or connect them "
                "one by one."
            )
        return torch.cat([item.to(items[0].device) for item in items])
    return _levels(values, name, unit, dimensions)


def _levels(values: Any, name: str, unit: str, dimensions: int) -> torch.Tensor:
    if isinstance(values, np.ndarray) and values.dtype.kind in _NUMPY:
        values = torch.from_numpy(np.ascontiguousarray(values, _NUMPY[values.dtype.kind]))
    if not isinstance(values, torch.Tensor):
        raise EasyRefError(
            f"{name} is {shown(values)}, not a {unit}. Check what is connected to it."
        )
    ordinary = values.layout == torch.strided and not (
        values.is_quantized or values.is_meta or values.is_nested or values.is_complex()
    )
    if not ordinary:
        raise EasyRefError(
            f"{name} is a tensor of {str(values.dtype).removeprefix('torch.')} "
            f"({str(values.layout).removeprefix('torch.')}, on {values.device.type}); a {unit} of "
            "plain numbers is needed. Check the node that made it."
        )
    levels = values.detach().to(torch.float32)
    if levels.ndim == dimensions:
        levels = levels[None]
    if values.is_floating_point() or values.dtype == torch.bool or values.numel() == 0:
        return levels
    low, high = float(levels.min()), float(levels.max())
    if low < 0 or high > 255:
        raise EasyRefError(
            f"{name} holds whole numbers from {low:g} to {high:g}; as levels they go from 0 to "
            "255. Convert them to floats from 0 to 1."
        )
    return levels / 255
