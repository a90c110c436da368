"""Where a tensor lies in its file, and reading its bytes from there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

from ..errors import EasyRefError
from ..untrusted import escaped
from .dtypes import SIZES

MAX_DIMENSIONS = 16
_UNSIGNED = {1: "B", 2: "H", 4: "I", 8: "Q"}  # bytes of a number -> its code in the struct module


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
        return math.prod(self.shape) * SIZES[self.dtype]

    @property
    def span(self) -> int:
        """Bytes in the file from the first to the last number that belongs to it."""
        if 0 in self.shape or self.strides is None:
            return self.bytes
        steps = zip(self.shape, self.strides, strict=True)
        return (1 + sum((size - 1) * step for size, step in steps)) * SIZES[self.dtype]

    def first(self, rows: int | None) -> TensorInfo:
        """Only so many of its first rows; None for all. A single number has none."""
        if rows is None or not self.shape:
            return self
        return replace(self, shape=(min(rows, self.shape[0]), *self.shape[1:]))


def unreadable(path: object, name: str, info: TensorInfo) -> EasyRefError:
    """The error where the dtype of the tensor `name` is unknown."""
    return EasyRefError(
        f"{escaped(str(path))}: {escaped(name)} is stored as {escaped(info.dtype)}, which "
        "cannot be read. Get the file in float32, float16 or bfloat16."
    )


def cut_off(path: object, name: str) -> EasyRefError:
    """The error where the file has become shorter than the tensor `name` needs."""
    return EasyRefError(
        f"{escaped(str(path))} was cut off while {escaped(name)} was read. Get the file again "
        "and queue the prompt (or run the command) again."
    )


def read_bytes(file: BinaryIO, path: object, name: str, info: TensorInfo) -> bytes:
    """The numbers of a tensor one after another, the last dimension first.

    Args:
        path, name: for messages.

    Raises:
        EasyRefError: the file has become shorter, or the dtype is unknown.
    """
    if info.dtype not in SIZES:
        raise unreadable(path, name, info)
    file.seek(info.offset)
    content = file.read(info.span)
    if len(content) < info.span:
        raise cut_off(path, name)
    if info.strides is None or not content:
        return content
    numbers = memoryview(content).cast(_UNSIGNED[SIZES[info.dtype]])
    steps = zip(info.shape, info.strides, strict=True)
    return _gathered(numbers, [(size, step) for size, step in steps if size > 1])


def _gathered(numbers: memoryview, steps: Sequence[tuple[int, int]]) -> bytes:
    """
    Args:
        steps: (size, stride) of each dimension.
    """
    if not steps:
        return numbers[:1].tobytes()
    (size, step), *rest = steps
    if not rest and step:
        return numbers[: (size - 1) * step + 1 : step].tobytes()
    return b"".join(_gathered(numbers[n * step :], rest) for n in range(size))
