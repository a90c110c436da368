"""The weight files of a model directory, in any layout that transformers writes."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import EasyRefError
from ..untrusted import escaped, inside, is_regular, kind_of, read_json, shown

_MAX_FILES = 1000
_SHOWN = 3
# transformers looks for them in this order. A variant, such as fp16, stands before the last ending.
_LAYOUTS = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"
_SHARD = re.compile(r"-\d+-of-\d+\.")


def weight_files(path: Path) -> list[Path]:
    """Files of the first layout that the directory has; none where it has none.

    Raises:
        EasyRefError: it has them several times, or an index names what is missing or lies outside.
    """
    for find in (_file, _variants):
        for layout in _LAYOUTS:
            for name in (layout, layout + _INDEX):
                found = find(path, name)
                if len(found) > 1:
                    names = ", ".join(escaped(file.name) for file in found[:_SHOWN])
                    raise EasyRefError(
                        f"{escaped(str(path))} holds its weights several times ({names}). Keep "
                        "one of them."
                    )
                if found:
                    return _listed(path, found[0]) if name.endswith(_INDEX) else found
    return []


def _file(path: Path, name: str) -> list[Path]:
    return [path / name] if is_regular(path / name) else []


def _variants(path: Path, name: str) -> list[Path]:
    start, end = name.rsplit(".", 1)
    files = (file for file in sorted(path.glob(f"{start}.*.{end}")) if is_regular(file))
    return [file for file in files if not _SHARD.search(file.name)]


def _listed(path: Path, index: Path) -> list[Path]:
    """The weight files that an index names."""
    content = read_json(index, what="index of weight files")
    places = content.get("weight_map") if isinstance(content, dict) else content
    if not isinstance(places, dict) or not places:
        raise EasyRefError(
            f"{escaped(str(index))} cannot be read: weight_map, which says where each weight lies, "
            f"is {kind_of(places)}. Download it again."
        )
    names = list(dict.fromkeys(n if isinstance(n, str) else None for n in places.values()))
    if len(names) > _MAX_FILES:
        raise EasyRefError(
            f"{escaped(str(index))} names {len(names):,} weight files; a model has a few. "
            "Download it again."
        )
    files = sorted({inside(path, name, "weight file") for name in names})
    missing = [shown(file.name) for file in files if not is_regular(file)]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise EasyRefError(
            f"{escaped(str(path))} lacks {len(missing)} of its {len(files)} weight files: "
            f"{', '.join(missing[:_SHOWN])}{more}. Download them."
        )
    return files
