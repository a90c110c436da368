"""Lazy reading of weight files: names and shapes first, then tensor by tensor.

Formats are told apart by their first bytes, never by the file's name.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import EasyRefError

_DTYPES = {  # safetensors' names
    **{f"F{bits}": f"float{bits}" for bits in (64, 32, 16)},
    **{f"I{bits}": f"int{bits}" for bits in (64, 32, 16, 8)},
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "U8": "uint8",
    "BOOL": "bool",
}

GetTensor = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype (torch's name) of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class WeightFile:
    """A weight file whose header has been read, not its weights.

    Attributes:
        metadata: of the safetensors header.
        stamp: size and modification time, to notice when the file is replaced.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    stamp: tuple[int, int]
    is_safetensors: bool

    @contextmanager
    def open(self) -> Iterator[GetTensor]:
        """Yield a function that reads one tensor by name, memory-mapped, on the CPU.

        Raises:
            EasyRefError: the file is gone or has changed since its header was read.
        """
        self.check_unchanged()
        if self.is_safetensors:
            from safetensors import safe_open

            with safe_open(self.path, framework="pt", device="cpu") as handle:
                yield handle.get_tensor
        else:
            yield _load_pickle(self.path).__getitem__

    def check_unchanged(self) -> None:
        """Raise EasyRefError where the file has changed since its header was read."""
        if _stamp(self.path) != self.stamp:
            raise EasyRefError(
                f"{self.path} has changed since it was loaded. Queue the prompt again (or run "
                "the command again) so that it is read anew."
            )

    def read(self, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
        """Read several tensors: `names` maps the wanted name to the name in the file."""
        with self.open() as get:
            return {wanted: get(name) for wanted, name in names.items()}


def open_weight_file(path: str | Path) -> WeightFile:
    """Read the header of a safetensors file, or of a PyTorch file of tensors only.

    Raises:
        EasyRefError: missing, empty, truncated, foreign, or a pickle that carries code.
    """
    path = Path(path)
    if not path.is_file():
        raise EasyRefError(f"There is no weight file {path}. Check the name and the folder.")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise EasyRefError(f"{path} cannot be read ({error}). Check its permissions.") from error
    if size == 0:
        raise EasyRefError(f"{path} is empty (0 bytes). Download it again.")
    # A header length below 4 GB, then JSON: no pickle starts so.
    if head[4:8] == bytes(4) and head[8:9] == b"{":
        infos, metadata = _safetensors_header(path, size)
        return WeightFile(path, infos, metadata, _stamp(path), is_safetensors=True)
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        tensors = _load_pickle(path)
        infos = {n: TensorInfo(tuple(t.shape), _name(t.dtype)) for n, t in tensors.items()}
        return WeightFile(path, infos, {}, _stamp(path), is_safetensors=False)
    raise EasyRefError(
        f"{path} is neither a safetensors nor a PyTorch file (it starts with {head[:8]!r}). "
        "If it was downloaded with git, the file itself may be missing and only its pointer here."
    )


def all_finite(weight: torch.Tensor) -> bool:
    """Whether a weight holds neither NaN nor infinities; one-byte floats too, which torch cannot
    test as they are.
    """
    return bool(torch.isfinite(weight.float() if weight.itemsize == 1 else weight).all())


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise EasyRefError(f"{path} cannot be read any more ({error}). Restore the file.") from None
    return stat.st_size, stat.st_mtime_ns


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _safetensors_header(path: Path, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Names, shapes and metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu"):  # the format's own checks
            pass
        with path.open("rb") as file:
            header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (SafetensorError, OSError, ValueError) as error:
        raise EasyRefError(
            f"{path} is not a whole safetensors file: {error} ({size:,} bytes on disk). "
            "It was probably cut off; download it again."
        ) from error
    metadata = header.pop("__metadata__", None) or {}
    infos = {
        name: TensorInfo(tuple(entry["shape"]), _DTYPES.get(entry["dtype"], entry["dtype"]))
        for name, entry in header.items()
    }
    return infos, metadata


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a PyTorch file by name; a DeepSpeed file's stand under `module`."""
    if torch.__version__ < (2, 6):  # CVE-2025-32434: weights_only does not keep code out
        raise EasyRefError(
            f"{path} is a pickle, which PyTorch {torch.__version__} cannot open without the risk "
            "of running code hidden in it. Update PyTorch to 2.6 or newer, or get the "
            ".safetensors file."
        )
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise EasyRefError(
            f"{path} is a pickle that is damaged or carries more than tensors, which could run "
            "code on this computer, so it was not opened. Convert it to safetensors where it "
            "comes from, or get the .safetensors file."
        ) from error
    except Exception as error:  # a damaged pickle raises anything, IndexError and struct.error too
        raise EasyRefError(
            f"{path} cannot be read as a PyTorch file ({type(error).__name__}: {error}). "
            "It was probably cut off; download it again."
        ) from error
    if isinstance(content, dict) and isinstance(content.get("module"), dict):
        content = content["module"]
    if not isinstance(content, dict):
        raise EasyRefError(
            f"{path} holds a {type(content).__name__}, not tensors by name. "
            "Give the adapter's own file."
        )
    return {k: v for k, v in content.items() if isinstance(v, torch.Tensor)}
