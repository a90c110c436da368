"""The header of a safetensors file: every byte of the file belongs to exactly one tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import EasyRefError
from ..untrusted import escaped, kind_of, parse_json, shown, whole_number
from .dtypes import SAFETENSORS, SIZES
from .stored import MAX_DIMENSIONS, TensorInfo

MAX_HEADER = 2_000_000  # bytes; that of an adapter with SDXL has half a million
_METADATA = "__metadata__"


def read_header(
    file: BinaryIO, path: Path, size: int
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors by name, and the metadata.

    Args:
        size: of the file, in bytes.

    Raises:
        EasyRefError: cut off, damaged, or not as the format says.
    """
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    start = 8 + length
    if start > size:
        raise _cut_off(path, f"its header alone would have {length:,} bytes", size)
    if length > MAX_HEADER:
        raise EasyRefError(
            f"{escaped(str(path))} has a header of {length:,} bytes; no weight file needs more "
            f"than {MAX_HEADER:,}. Get the file again."
        )
    content = file.read(length)
    if len(content) < length:
        raise _cut_off(path, "its header is incomplete", size)
    header = parse_json(content, f"The header of {path}")
    if not isinstance(header, dict):
        raise _damaged(path, f"it is {kind_of(header)} instead of an object")
    metadata = header.pop(_METADATA, None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "its metadata are not texts by name")
    places = {name: _place(path, name, entry) for name, entry in header.items()}
    end = 0
    for name, (_, first, last) in sorted(places.items(), key=lambda entry: entry[1][1:]):
        if first != end:
            raise _damaged(path, f"{escaped(name)} starts at byte {first:,} instead of {end:,}")
        end = last
    if start + end > size:
        raise _cut_off(path, f"its tensors need {start + end:,} bytes", size)
    if start + end < size:
        raise _damaged(path, f"its tensors end at byte {start + end:,} of {size:,}")
    infos = {
        name: TensorInfo(info.shape, info.dtype, start + first)
        for name, (info, first, _) in places.items()
    }
    return infos, metadata


def _place(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """A tensor, and its first and last byte after the header."""
    if not isinstance(entry, Mapping):
        raise _damaged(path, f"{escaped(name)} is {kind_of(entry)} instead of an object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str):
        raise _damaged(path, f"the dtype of {escaped(name)} is {shown(dtype)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise _damaged(path, f"the shape of {escaped(name)} is {shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise _damaged(path, f"the data_offsets of {escaped(name)} are {shown(offsets)}")
    hint = f"The header of {escaped(str(path))} is damaged; get the file again."

    def whole(value: Any) -> int:
        if type(value) is int and value >= 0:  # as nearly always, for a hundred thousand numbers
            return value
        return whole_number(value, f"A size of {escaped(name)}", low=0, hint=hint)

    sizes = tuple(map(whole, shape))
    first, last = map(whole, offsets)
    name_of = SAFETENSORS.get(dtype, dtype)
    width = SIZES.get(name_of)
    if last < first or (width and last - first != math.prod(sizes) * width):
        raise _damaged(
            path,
            f"{escaped(name)} of shape {list(sizes)} in {escaped(dtype)} cannot lie in bytes "
            f"{first:,} to {last:,}",
        )
    return TensorInfo(sizes, name_of), first, last


def _cut_off(path: Path, reason: str, size: int) -> EasyRefError:
    return EasyRefError(
        f"{escaped(str(path))} is not a whole safetensors file: {reason} ({size:,} bytes on disk). "
        "It was probably cut off; download it again."
    )


def _damaged(path: Path, reason: str) -> EasyRefError:
    return EasyRefError(f"{escaped(str(path))} has a damaged header: {reason}. Get the file again.")
