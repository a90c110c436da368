"""A Qwen2-VL directory as downloaded from Hugging Face: its sizes and weight files."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import EasyRefError
from ..untrusted import escaped, inside, is_regular, kind_of, read_json, shown
from ..weight_file import WeightFile, open_weight_file
from .config import MllmConfig
from .config_file import config_from_dict, quantisation, read_settings
from .names import canonical_names

_MAX_FILES = 1000
_SHOWN = 3
# transformers looks for them in this order. A variant, such as fp16, stands before the last ending.
_LAYOUTS = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"
_SHARD = re.compile(r"-\d+-of-\d+\.")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


@dataclass(frozen=True)
class MllmDirectory:
    """An MLLM directory, its weights not read.

    Attributes:
        files: weight files; none where the directory has only config and tokenizer.
        quantisation: how its config.json says that the weights are quantised; empty if they are
            not.
    """

    path: Path
    config: MllmConfig
    files: tuple[WeightFile, ...]
    quantisation: str = ""

    @property
    def config_file(self) -> str:
        """For messages."""
        return escaped(str(self.path / "config.json"))

    def sources(self) -> dict[str, tuple[WeightFile, str]]:
        """Canonical weight name -> (file, name in the file).

        Raises:
            EasyRefError: a weight is in two files.
        """
        sources: dict[str, tuple[WeightFile, str]] = {}
        for file in self.files:
            for local, name in canonical_names(file.tensors).items():
                if local in sources:
                    raise EasyRefError(
                        f"{shown(name)} is in {escaped(str(sources[local][0].path))} and in "
                        f"{escaped(str(file.path))}. Files of two downloads are mixed; get the "
                        "directory again."
                    )
                sources[local] = (file, name)
        return sources


def open_directory(path: str | Path) -> MllmDirectory:
    """Read the sizes of an MLLM directory and the headers of its weight files.

    The weights may lie in any layout that transformers writes: safetensors or .bin, in one file or
    in several with an index, with or without a variant in their names.

    Raises:
        EasyRefError: no directory, no config, another family, numbers that do not fit together, an
            index that names what is missing or lies outside, or files that cannot be read.
    """
    path = Path(path)
    if not os.path.isdir(path):
        raise EasyRefError(
            f"There is no MLLM directory {escaped(str(path))}. Put the "
            "Qwen2-VL-2B-Instruct folder there."
        )
    settings = read_settings(path)
    config = config_from_dict(settings, str(path / "config.json"))
    files = tuple(open_weight_file(file) for file in _weight_files(path))
    return MllmDirectory(path, config, files, quantisation(settings))


def unread_weights(path: Path) -> str:
    """Names of a directory's files that look like weights, for messages."""
    names = sorted(name for name in os.listdir(path) if name.lower().endswith(_WEIGHTS))
    return ", ".join(escaped(name) for name in names[:_SHOWN])


def _weight_files(path: Path) -> list[Path]:
    """Files of the first layout that the directory has; none where it has none."""
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
            f"{escaped(str(index))} names {len(names):,} weight files; Qwen2-VL has a few. "
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
