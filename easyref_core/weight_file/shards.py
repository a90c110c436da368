"""Weights divided among several files, as Hugging Face's `save_pretrained` divides them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import EasyRefError
from ..untrusted import escaped, shown
from .layout import INDEX

MAX_SHARDS = 100  # all are open at once
SET = "shards_of"  # in the metadata of shards: the same for those that were written together

_WEIGHTS = ".safetensors"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?) *([KMGT]B|)", re.ASCII)
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}" + re.escape(_WEIGHTS), re.DOTALL)


def parse_size(size: int | str) -> int:
    """Bytes of "2GB", "500MB" or a number; units count in thousands, as huggingface_hub's.

    Raises:
        EasyRefError: it is no size, or less than a byte.
    """
    match = _SIZE.fullmatch(str(size).strip().upper())
    found = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if found < 1:
        raise EasyRefError(
            f"A shard cannot have the size {shown(size)}. Give bytes, such as 2GB, 500MB or "
            "1000000."
        )
    return found


def split(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Divide weights among shards as huggingface_hub does: one too large has its own.

    Args:
        sizes: name -> bytes, in order.
        most: bytes of a shard.

    Raises:
        EasyRefError: there would be too many shards.
    """
    shards: list[list[str]] = []
    current: list[str] = []
    used = 0
    for name, size in sizes.items():
        if size > most:
            shards.append([name])
            continue
        if used + size > most:
            shards.append(current)
            current, used = [], 0
        current.append(name)
        used += size
    shards += [current] if current else []
    if len(shards) > MAX_SHARDS:
        raise EasyRefError(
            f"Shards of at most {most:,} bytes would be {len(shards):,} files; {MAX_SHARDS} can be "
            "read. Choose a larger size."
        )
    return shards


def shard_paths(path: Path, count: int) -> list[Path]:
    """Where the shards lie of what would be one file at `path`.

    Raises:
        EasyRefError: it does not end in .safetensors.
    """
    if path.suffix != _WEIGHTS:
        raise EasyRefError(
            f"Shards need a name that ends in {_WEIGHTS}, {escaped(path.name)} does not. Choose "
            f"one, such as {escaped(path.stem)}{_WEIGHTS}."
        )
    return [
        path.with_stem(f"{path.stem}-{number:05}-of-{count:05}") for number in range(1, count + 1)
    ]


def index_path(path: Path) -> Path:
    """Where the index of its shards lies."""
    return path.with_name(path.name + INDEX)


def index_of_shard(path: Path) -> Path | None:
    """Where the index of a shard would lie, by its name; None for a file that is no shard."""
    match = _SHARD.fullmatch(path.name)
    return index_path(path.with_name(match[1] + _WEIGHTS)) if match else None


def write_index(path: Path, places: Mapping[str, str], total_size: int) -> None:
    """
    Args:
        places: name of each tensor -> name of its file.
        total_size: of the tensors, in bytes.
    """
    content = {"metadata": {"total_size": total_size}, "weight_map": places}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
