"""Weights in the layout of TensorFlow.js: `NAME-weights_manifest.json` and the files it names."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ....errors import EasyRefError
from ....untrusted import (
    escaped,
    inside,
    kind_of,
    number,
    read_bytes,
    read_json,
    shown,
    text,
    whole_number,
)

_LARGEST_MANIFEST = 1_000_000  # bytes; face-api's largest has 28,000
_LARGEST_FILE = 64_000_000  # bytes; face-api's largest has 6.4 million
_MOST_WEIGHTS = 2_000
_MOST_FILES = 64
_DTYPES = {"float32": "<f4", "uint8": "u1", "uint16": "<u2"}


@dataclass(frozen=True)
class _Entry:
    """A weight as the manifest describes it; value = stored * scale + minimum."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float
    minimum: float

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(_DTYPES[self.dtype]).itemsize


def load_weights(network: nn.Module, folder: Path, name: str) -> str:
    """Fill all parameters of a network; "/" in the file's names stands for "." in the network's.

    Returns:
        SHA-256 of the weights' bytes, in hex digits.

    Raises:
        EasyRefError: a file is missing, damaged, or of another network.
    """
    manifest = inside(folder, f"{name}-weights_manifest.json")
    groups = read_json(manifest, _LARGEST_MANIFEST, "weights manifest")
    source = escaped(str(manifest))
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise EasyRefError(
            f"{source} holds {kind_of(groups)}; a weights manifest is a list of objects with "
            '"weights" and "paths". Get the folder again.'
        )
    digest = hashlib.sha256()
    found: dict[str, torch.Tensor] = {}
    for group in groups:
        entries = [_entry(item, source) for item in _items(group, "weights", _MOST_WEIGHTS, source)]
        content = b"".join(
            read_bytes(inside(folder, path, "weight file"), _LARGEST_FILE, "weight file")
            for path in _items(group, "paths", _MOST_FILES, source)
        )
        needed = sum(entry.bytes for entry in entries)
        if needed != len(content):
            raise EasyRefError(
                f"{source} describes {needed:,} bytes of weights, but its files hold "
                f"{len(content):,}. One of them is cut off or of another version; get the folder "
                "again."
            )
        digest.update(content)
        found.update(_tensors(entries, content, source))
    _fill(network, found, source)
    return digest.hexdigest()


def _items(group: dict[str, Any], key: str, most: int, source: str) -> list[Any]:
    items = group.get(key)
    if not isinstance(items, list) or len(items) > most:
        count = f" of {len(items)} entries" if isinstance(items, list) else ""
        raise EasyRefError(
            f'{source} holds {kind_of(items)}{count} as "{key}"; a list of at most {most} is '
            "needed. Get the folder again."
        )
    return items


def _entry(item: Any, source: str) -> _Entry:
    again = "Get the folder again."
    if not isinstance(item, dict) or not isinstance(item.get("shape"), list):
        raise EasyRefError(
            f"{source} describes a weight by {shown(item)}; an object with name, shape and dtype "
            f"is needed. {again}"
        )
    name = text(item.get("name"), f"The name of a weight in {source}", again)
    label = f"{shown(name)} in {source}"
    size = f"The shape of {label}"
    shape = tuple(whole_number(each, size, 0, _LARGEST_FILE, again) for each in item["shape"][:9])
    packed = item.get("quantization", {"dtype": item.get("dtype"), "scale": 1, "min": 0})
    dtype = packed.get("dtype") if isinstance(packed, dict) else None
    if item.get("dtype") != "float32" or dtype not in tuple(_DTYPES):
        raise EasyRefError(
            f"{label} has the type {shown(item.get('dtype'))}, stored as {shown(dtype)}; float32 "
            f"is needed, stored as {', '.join(_DTYPES)}. Take the weights of face-api."
        )
    scale = number(packed.get("scale"), f"The scale of {label}", -1e6, 1e6, again)
    minimum = number(packed.get("min"), f"The minimum of {label}", -1e6, 1e6, again)
    return _Entry(name, shape, dtype, scale, minimum)


def _tensors(entries: list[_Entry], content: bytes, source: str) -> dict[str, torch.Tensor]:
    tensors, start = {}, 0
    for entry in entries:
        stored = np.frombuffer(content[start : start + entry.bytes], _DTYPES[entry.dtype])
        values = stored.astype(np.float32) * np.float32(entry.scale) + np.float32(entry.minimum)
        if not np.isfinite(values).all():
            raise EasyRefError(
                f"{shown(entry.name)} in {source} holds values that are not finite numbers. Get "
                "the folder again."
            )
        tensors[entry.name] = torch.from_numpy(values.reshape(entry.shape))
        start += entry.bytes
    return tensors


def _fill(network: nn.Module, found: dict[str, torch.Tensor], source: str) -> None:
    for name, parameter in network.named_parameters():
        weight = found.get(name.replace(".", "/"))
        if weight is None or weight.shape != parameter.shape:
            has = "nothing" if weight is None else f"the shape {list(weight.shape)}"
            raise EasyRefError(
                f"{source} has {has} for {name.replace('.', '/')}; {list(parameter.shape)} is "
                "needed. These are the weights of another network; take those of face-api."
            )
        parameter.data.copy_(weight)
