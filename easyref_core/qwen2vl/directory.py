"""A Qwen2-VL directory as downloaded from Hugging Face: its sizes and weight files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import EasyRefError
from ..untrusted import escaped, shown
from ..weight_file import WeightFile, open_weight_file, weight_files
from .config import MllmConfig
from .config_file import config_from_dict, quantisation, read_settings
from .names import canonical_names

_SHOWN = 3
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
    files = tuple(open_weight_file(file) for file in weight_files(path))
    return MllmDirectory(path, config, files, quantisation(settings))


def unread_weights(path: Path) -> str:
    """Names of a directory's files that look like weights, for messages."""
    names = sorted(name for name in os.listdir(path) if name.lower().endswith(_WEIGHTS))
    return ", ".join(escaped(name) for name in names[:_SHOWN])
