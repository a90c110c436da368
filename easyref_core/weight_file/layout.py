"""The weight files of a model directory or of an index, in any layout that transformers writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import EasyRefError
from ..untrusted import escaped, inside, is_regular, kind_of, read_json, shown

_MAX_FILES = 1000
_MAX_METADATA = 100_000  # characters, which fit into a header where the weights become one file
_SHOWN = 3
# transformers looks for them in this order. A variant, such as fp16, stands before the last ending.
_LAYOUTS = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"
_OF_FILES = ("format", "total_size", "total_parameters")  # say nothing of the weights
_SHARD = re.compile(r"-\d+-of-\d+\.")


def weight_files(path: Path) -> list[Path]:
    """Files of the first layout that the directory has; none where it has none.

    Raises:
        EasyRefError: it has them several times, or an index names what is missing or lies outside.
    """
    for find in (_file, _variants):
        for layout in _LAYOUTS:
            for name in (layout, layout + INDEX):
                found = find(path, name)
                if len(found) > 1:
                    names = ", ".join(escaped(file.name) for file in found[:_SHOWN])
                    raise EasyRefError(
                        f"{escaped(str(path))} holds its weights several times ({names}). Keep "
                        "one of them."
                    )
                if found:
                    if not name.endswith(INDEX):
                        return found
                    return sorted(set(places_of(found[0]).values()))
    return []


def _file(path: Path, name: str) -> list[Path]:
    return [path / name] if is_regular(path / name) else []


def _variants(path: Path, name: str) -> list[Path]:
    start, end = name.rsplit(".", 1)
    files = (file for file in sorted(path.glob(f"{start}.*.{end}")) if is_regular(file))
    return [file for file in files if not _SHARD.search(file.name)]


def is_index(path: Path) -> bool:
    """Whether a file is an index of weight files, by its name: any text may be JSON."""
    return path.name.lower().endswith(INDEX)


def with_shards(path: Path) -> list[Path]:
    """The file itself; behind an index that can be read, the weight files that it names."""
    try:
        return [path, *dict.fromkeys(places_of(path).values())] if is_index(path) else [path]
    except EasyRefError:
        return [path]


def places_of(index: Path, most: int = _MAX_FILES) -> dict[str, Path]:
    """Name of each weight -> the file in which an index says that it lies.

    Args:
        most: files that it may name.

    Raises:
        EasyRefError: it cannot be read, or names what is missing or lies outside its folder.
    """
    return _places(index, _content(index), most)


def places_and_metadata(index: Path, most: int) -> tuple[dict[str, Path], dict[str, str]]:
    """`places_of`, and what an index says about all its weights, by name.

    huggingface_hub's `save_torch_state_dict` writes into it what it writes into the header of a
    single file. Values that are no texts, which a header cannot have, become JSON.

    Raises:
        EasyRefError: see `places_of`; the metadata are no object, or too long.
    """
    content = _content(index)
    places = _places(index, content, most)
    found = content.get("metadata")
    if found is not None and not isinstance(found, dict):
        raise EasyRefError(
            f"{escaped(str(index))} cannot be read: its metadata are {kind_of(found)} instead of "
            "an object. Get it again."
        )
    metadata = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in (found or {}).items()
        if name not in _OF_FILES
    }
    size = sum(len(name) + len(value) for name, value in metadata.items())
    if size > _MAX_METADATA:
        raise EasyRefError(
            f"{escaped(str(index))} has metadata of {size:,} characters; no adapter needs more "
            f"than {_MAX_METADATA:,}. Get it again."
        )
    return places, metadata


def _content(index: Path) -> dict[str, Any]:
    content = read_json(index, what="index of weight files")
    return content if isinstance(content, dict) else {"weight_map": content}


def _places(index: Path, content: dict[str, Any], most: int) -> dict[str, Path]:
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise EasyRefError(
            f"{escaped(str(index))} cannot be read: weight_map, which says where each weight lies, "
            f"is {kind_of(places)}. Download it again."
        )
    names = dict.fromkeys(n if isinstance(n, str) else None for n in places.values())
    if len(names) > most:
        raise EasyRefError(
            f"{escaped(str(index))} names {len(names):,} weight files; a model has a few. "
            "Download it again."
        )
    folder = index.parent
    files = {name: inside(folder, name, "weight file") for name in names}
    missing = [shown(file.name) for file in sorted(files.values()) if not is_regular(file)]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise EasyRefError(
            f"{escaped(str(folder))} lacks {len(missing)} of its {len(files)} weight files: "
            f"{', '.join(missing[:_SHOWN])}{more}. Download them."
        )
    return {weight: files[name] for weight, name in places.items()}
