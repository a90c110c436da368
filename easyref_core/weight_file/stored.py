"""Where a tensor lies in its file, and reading it from there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import BinaryIO

import torch

from ..errors import EasyRefError
from ..untrusted import escaped
from .dtypes import dtype_of

MAX_DIMENSIONS = 16


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that has not been read.

    Attributes:
        shape: one size for each dimension.
        dtype: PyTorch's name; of a tensor that cannot be read, what it is (`sparse`, ...).
        offset: of its first number in the file, in bytes.
        strides: in numbers; None where the numbers lie one after another.
    """

    shape: tuple[int, ...]
    dtype: str
    offset: int = 0
    strides: tuple[int, ...] | None = None

    @property
    def bytes(self) -> int:
        """Of its numbers; the dtype must be one that can be read."""
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


def read_tensor(
    file: BinaryIO, path: object, name: str, info: TensorInfo, rows: int | None
) -> torch.Tensor:
    """A tensor on the CPU, in memory of its own.

    Args:
        path, name: for messages.
        rows: only so many of its first rows; None for all.

    Raises:
        EasyRefError: the file has become shorter, or the dtype is unknown.
    """
    dtype = dtype_of(info.dtype)
    if dtype is None:
        raise EasyRefError(
            f"{escaped(str(path))}: {escaped(name)} is stored as {escaped(info.dtype)}, which "
            "cannot be read. Get the file in float32, float16 or bfloat16."
        )
    shape = info.shape
    if rows is not None and shape and info.strides is None:
        shape = (min(rows, shape[0]), *shape[1:])
    strides = info.strides
    # Numbers from the first to the last one that belongs to the tensor.
    if 0 in shape:
        count = 0
    elif strides is None:
        count = math.prod(shape)
    else:
        count = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    content = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
    if count and not _fill(file, info.offset, memoryview(content.numpy())):
        raise EasyRefError(
            f"{escaped(str(path))} was cut off while {escaped(name)} was read. Get the file again "
            "and queue the prompt (or run the command) again."
        )
    tensor = content.view(dtype) if count else content.new_empty(0, dtype=dtype)
    if strides is None or not count:
        return tensor.reshape(shape)
    return tensor.as_strided(shape, strides).contiguous()[:rows]


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
