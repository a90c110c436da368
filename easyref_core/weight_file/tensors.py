"""Weights as PyTorch's tensors."""

from __future__ import annotations

from typing import BinaryIO

import torch

from .dtypes import SIZES
from .scales import INT8, INT8_MARK, Scale
from .stored import TensorInfo, cut_off, unreadable


def dtype_name(dtype: torch.dtype) -> str:
    """PyTorch's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


def all_finite(weight: torch.Tensor) -> bool:
    """Whether a weight holds neither NaN nor infinities; one-byte floats too, which torch cannot
    test as they are.
    """
    return bool(torch.isfinite(weight.float() if weight.itemsize == 1 else weight).all())


def read_tensor(file: BinaryIO, path: object, name: str, info: TensorInfo) -> torch.Tensor:
    """A tensor on the CPU, in memory of its own.

    Args:
        path, name: for messages.

    Raises:
        EasyRefError: the file has become shorter, or the dtype is unknown.
    """
    dtype = getattr(torch, info.dtype, None)
    if info.dtype not in SIZES or dtype is None:  # some are too new for this PyTorch
        raise unreadable(path, name, info)
    content = torch.empty(info.span, dtype=torch.uint8)
    if info.span and not _fill(file, info.offset, memoryview(content.numpy())):
        raise cut_off(path, name)
    tensor = content.view(dtype) if info.span else content.new_empty(0, dtype=dtype)
    if info.strides is None or not info.span:
        return tensor.reshape(info.shape)
    return tensor.as_strided(info.shape, info.strides).contiguous()


def scale_tensor(scale: Scale) -> torch.Tensor:
    """float32, in memory of its own."""
    return torch.frombuffer(bytearray(scale.numbers), dtype=torch.float32).reshape(scale.shape)


def apply_scale(weight: torch.Tensor, scale: Scale) -> torch.Tensor:
    """The weight times its scale (or that of its first rows), in float32."""
    factors = scale_tensor(scale)
    factors = factors[: len(weight)] if factors.numel() > 1 else factors.reshape(())
    return weight.to(torch.float32, copy=True).mul_(factors)


def tensors_beside(dtype: torch.dtype, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What is written beside a one-byte weight of this dtype, see `scales.scaled_infos`."""
    if dtype_name(dtype) != INT8:
        return (scale,)
    return scale, torch.tensor([*INT8_MARK], dtype=torch.uint8)


def _fill(file: BinaryIO, offset: int, room: memoryview) -> bool:
    """Read into `room`, which is not empty; False where the file ends before."""
    file.seek(offset)
    filled = 0
    while filled < len(room):
        count = file.readinto(room[filled:])  # type: ignore[attr-defined]
        if not count:
            return False
        filled += count
    return True
