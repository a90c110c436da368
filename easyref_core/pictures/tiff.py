"""How many numbers a TIFF file's header holds, before Pillow makes Python's own of them."""

from __future__ import annotations

import struct
from typing import BinaryIO

_AS_THEY_ARE = {1, 2, 7}  # bytes and texts: profiles, notes, an editor's layers
_MOST_ENTRIES = 65_535


def count_numbers(file: BinaryIO) -> int:
    """Of the first directory, those aside that stay bytes; what is cut off counts as none."""
    file.seek(0)
    head = file.read(16)
    order = "<" if head[:2] == b"II" else ">"
    large = head[2:3] == b"+"  # as Pillow tells a BigTIFF
    number, entry = ("Q", "HHQ8x") if large else ("H", "HHI4x")
    try:
        (start,) = struct.unpack_from(order + ("Q" if large else "I"), head, 8 if large else 4)
        file.seek(start)
        (entries,) = struct.unpack(order + number, file.read(struct.calcsize(order + number)))
        size = struct.calcsize(order + entry)
        content = file.read(size * min(entries, _MOST_ENTRIES))
    except (struct.error, OSError, OverflowError, ValueError):
        return 0
    whole = content[: len(content) // size * size]
    found = struct.iter_unpack(order + entry, whole)
    return sum(count for _, kind, count in found if kind not in _AS_THEY_ARE)
