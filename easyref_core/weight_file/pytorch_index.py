"""PyTorch files: which tensors they hold and where their numbers lie.

Source: `torch.serialization`, both layouts that `torch.save` writes.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import EasyRefError
from ..untrusted import escaped, shown
from .dtypes import SIZES
from .stored import TensorInfo
from .unpickler import ForeignName, TensorUnpickler, Unreadable, View, contiguous

MAX_INDEX = 1_500_000  # bytes of the pickle, and of a ZIP directory; an adapter with SDXL: 0.6
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_LOCAL_HEADER = b"PK\x03\x04"

Places = Mapping[str, tuple[int, int]]
"""Key of a storage -> (its offset in the file, its bytes)."""


def read_index(file: BinaryIO, path: Path, size: int) -> dict[str, TensorInfo]:
    """Tensors by name; a DeepSpeed file's stand under `module`. No number is read.

    Args:
        size: of the file, in bytes.

    Raises:
        EasyRefError: damaged, compressed, or a pickle that carries more than tensors.
    """
    try:
        zipped = _read(file, 0, 4) == _LOCAL_HEADER
        content, places = (_read_zip if zipped else _read_legacy)(file, path, size)
        if isinstance(content, dict) and isinstance(content.get("module"), dict):
            content = content["module"]
        if not isinstance(content, dict):
            raise EasyRefError(
                f"{escaped(str(path))} holds a {_kind(content)}, not tensors by name. Give the "
                "adapter's own file."
            )
        return {
            name: _info(tensor, places)
            for name, tensor in content.items()
            if isinstance(name, str) and isinstance(tensor, (View, Unreadable))
        }
    except ForeignName as error:
        raise EasyRefError(
            f"{escaped(str(path))} is a pickle that carries more than tensors ({shown(str(error))})"
            ", which could run code on this computer, so it was not opened. Convert it to "
            "safetensors where it comes from, or get the .safetensors file."
        ) from error
    except EasyRefError:
        raise
    except Exception as error:  # a damaged pickle raises anything, IndexError and struct.error too
        raise EasyRefError(
            f"{escaped(str(path))} cannot be read as a PyTorch file ({type(error).__name__}: "
            f"{escaped(str(error)[:200])}). It was probably cut off; download it again."
        ) from error


def _kind(content: Any) -> str:
    return "tensor" if isinstance(content, (View, Unreadable)) else type(content).__name__


def _info(tensor: View | Unreadable, places: Places) -> TensorInfo:
    if isinstance(tensor, Unreadable):
        return TensorInfo((), tensor.kind)
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    size = _itemsize(tensor.dtype)
    start, length = places[storage.key]
    if storage.count * _itemsize(storage.dtype) != length:
        raise ValueError(f"storage {storage.key} has {length} bytes")
    last = sum((count - 1) * step for count, step in zip(shape, strides, strict=True))
    if 0 not in shape and (tensor.offset + last + 1) * size > length:
        raise ValueError(f"a tensor of shape {list(shape)} leaves its storage")
    if math.prod(shape) * size > length:
        return TensorInfo(shape, "expanded")
    offset = start + tensor.offset * size
    plain = strides == contiguous(shape)
    return TensorInfo(shape, tensor.dtype, offset, None if plain else strides)


def _itemsize(name: str) -> int:
    if name not in SIZES:
        raise ValueError(f"numbers {name}")
    return SIZES[name]


class _Bounded:
    """A file of which at most `MAX_INDEX` bytes are read at once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        content = self._file.read(MAX_INDEX + 1 if count < 0 else min(count, MAX_INDEX + 1))
        if len(content) > MAX_INDEX:
            raise ValueError(f"its directory is larger than {MAX_INDEX:,} bytes")
        return content


def _read_zip(file: BinaryIO, path: Path, size: int) -> tuple[Any, Places]:
    with zipfile.ZipFile(_Bounded(file)) as archive:  # type: ignore[arg-type]
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise EasyRefError(
            f"{escaped(str(path))} is a compressed archive, which PyTorch does not write. Save the "
            "weights again with torch.save, or as safetensors."
        )
    pickles = [e.filename for e in entries if e.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"an archive with {len(pickles)} files called data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    places: dict[str, tuple[int, int]] = {}
    for entry in entries:
        header = _read(file, entry.header_offset, 30)
        name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        start = entry.header_offset + 30 + name + extra
        if header[:4] != _LOCAL_HEADER or start + entry.file_size > size:
            raise ValueError(f"{entry.filename} is incomplete")
        places[entry.filename.removeprefix(root)] = (start, entry.file_size)
    if "byteorder" in places and _read(file, *places["byteorder"]) == b"big":
        raise ValueError("it was written on a big-endian machine")
    unpickler = TensorUnpickler(io.BytesIO(_read(file, *places["data.pkl"])))
    storages = {k.removeprefix("data/"): p for k, p in places.items() if k.startswith("data/")}
    return unpickler.load(), storages


def _read_legacy(file: BinaryIO, _path: Path, size: int) -> tuple[Any, Places]:
    """Files of PyTorch before 1.6: five pickles, then the storages."""
    file.seek(0)
    stream = io.BytesIO(file.read(MAX_INDEX))
    unpickler = TensorUnpickler(stream)
    if unpickler.load() != _MAGIC or unpickler.load() != _PROTOCOL:
        raise ValueError("it does not start as torch.save starts")
    if unpickler.load().get("little_endian") is False:
        raise ValueError("it was written on a big-endian machine")
    content, keys = unpickler.load(), unpickler.load()
    places: dict[str, tuple[int, int]] = {}
    offset = stream.tell()
    for key in keys:
        storage = unpickler.storages[key]
        if int.from_bytes(_read(file, offset, 8), "little") != storage.count:
            raise ValueError(f"storage {key} has another size")
        places[key] = (offset + 8, storage.count * _itemsize(storage.dtype))
        offset += 8 + places[key][1]
    if offset > size:
        raise EOFError("it ends too early")
    return content, places


def _read(file: BinaryIO, offset: int, length: int) -> bytes:
    if length > MAX_INDEX:
        raise ValueError(f"its index is larger than {MAX_INDEX:,} bytes")
    file.seek(offset)
    content = file.read(length)
    if len(content) < length:
        raise EOFError("it ends too early")
    return content
