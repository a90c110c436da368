"""A Qwen2-VL directory as downloaded from Hugging Face: its sizes and weight files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import EasyRefError
from ..weight_file import WeightFile, open_weight_file
from .config import MllmConfig, read_config
from .names import canonical_names


@dataclass(frozen=True)
class MllmDirectory:
    """An MLLM directory, its weights not read.

    Attributes:
        files: weight files; none where the directory has only config and tokenizer.
    """

    path: Path
    config: MllmConfig
    files: tuple[WeightFile, ...]

    def sources(self) -> dict[str, tuple[WeightFile, str]]:
        """Canonical weight name -> (file, name in the file)."""
        return {
            local: (file, name)
            for file in self.files
            for local, name in canonical_names(file.tensors).items()
        }


def open_directory(path: str | Path) -> MllmDirectory:
    """Read the sizes of an MLLM directory and the headers of its weight files.

    Raises:
        EasyRefError: no directory, no config, another family, or a shard that is missing.
    """
    path = Path(path)
    if not path.is_dir():
        raise EasyRefError(
            f"There is no MLLM directory {path}. Put the Qwen2-VL-2B-Instruct folder there."
        )
    config = read_config(path)
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise EasyRefError(f"{index} cannot be read ({error}). Download it again.") from error
        missing = [n for n in names if not (path / n).is_file()]
        if missing:
            raise EasyRefError(
                f"{path} lacks {len(missing)} of its {len(names)} weight files: "
                f"{', '.join(missing)}. Download them."
            )
        files = [path / n for n in names]
    else:
        files = [f for f in (path / "model.safetensors", path / "pytorch_model.bin") if f.is_file()]
        files = files[:1]
    return MllmDirectory(path, config, tuple(open_weight_file(f) for f in files))
