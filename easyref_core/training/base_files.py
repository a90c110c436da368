"""The files of a base model, checked before diffusers and transformers open them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import EasyRefError
from ..pictures.loading import named
from ..untrusted import check_regular, escaped, inside, read_json, shown
from ..weight_file import open_weight_file
from ..weight_file.dtypes import WEIGHTS

# Part -> its configuration.
PARTS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "text_encoder_2": "config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
VAES = ("AutoencoderKL", "AutoencoderTiny")
_WEIGHTS = {".safetensors", ".bin"}
# As diffusers and transformers name what they load.
_WEIGHTS_NAME = re.compile(r"(diffusion_pytorch_model|pytorch_model|model)\b.*\.(safetensors|bin)$")
_MAX_BYTES = 64_000_000  # of other files; a vocabulary has two million
_MAX_NUMBER = 1e6  # the largest of SDXL's, a size of a vocabulary, is 49,408
_MAX_LAYERS, _MAX_NESTED = 100, 1000  # of one kind; transformers in layers in blocks
_LAYERS, _TRANSFORMERS = "layers_per_block", "transformer_layers_per_block"


def check_base_files(folder: Path, option: str = "model.base") -> dict[str, dict[str, Any]]:
    """The configurations of a base model's parts, checked for what would hang or be misread.

    Args:
        option: that names the folder, for messages.

    Raises:
        EasyRefError: a part or its configuration is missing; a file that is no regular one or too
            large; JSON that is none; weights outside the folder; a number out of range.
    """
    missing = [part for part in PARTS if not os.path.isdir(folder / part)]
    with named(option):
        if missing:
            raise _error(
                folder,
                f"lacks {', '.join(missing)}. It must be an SDXL model in the diffusers layout",
            )
        return {part: check_part(folder / part, name) for part, name in PARTS.items()}


def check_part(folder: Path, config: str) -> dict[str, Any]:
    """The configuration of a part; see `check_base_files`.

    Args:
        config: its file's name.
    """
    contents: dict[str, Any] = {}
    try:
        files = sorted(path for path in folder.iterdir() if not path.is_dir())
    except OSError as error:
        raise _error(folder, f"cannot be read ({escaped(str(error))})") from error
    for path in files:
        size = check_regular(path).st_size
        if size > _MAX_BYTES and path.suffix not in _WEIGHTS:
            raise _error(path, f"has {size:,} bytes, too many for such a file")
        if _WEIGHTS_NAME.match(path.name):
            _check_weights(path)
        if path.suffix == ".json":
            content = contents[path.name] = read_json(path, _MAX_BYTES)
            if not isinstance(content, dict):
                raise _error(path, "holds no object of keys")
            if path.name.endswith(".index.json"):
                _check_index(folder, content)
    if config not in contents:
        raise _error(folder, f"lacks {config}")
    settings = contents[config]
    if config.startswith("tokenizer"):
        if settings.get("fast_tokenizer_files"):  # more names of files
            raise _error(folder / config, "names further files, which CLIP's tokenizer has not")
    else:
        _check_numbers(folder / config, settings)
    return settings


def has_half_only(folder: Path) -> bool:
    """Whether a part's weights are there as the variant fp16 alone."""
    names = [path.name for path in folder.iterdir() if _WEIGHTS_NAME.match(path.name)]
    return bool(names) and all(".fp16." in name for name in names)


def _check_weights(path: Path) -> None:
    for name, tensor in open_weight_file(path).tensors.items():
        if tensor.dtype not in WEIGHTS and not name.endswith("position_ids"):
            raise _error(path, f"holds {shown(name)} as {tensor.dtype}, which is no weight")


def _check_index(folder: Path, index: Mapping[str, Any]) -> None:
    names = index.get("weight_map")
    if not isinstance(names, dict):
        raise _error(folder, "has an index of weights without weight_map")
    for name in names.values():
        inside(folder, name, "weight file")


def _check_numbers(path: Path, settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        limit = _MAX_LAYERS if "layers" in key or key.endswith("_blocks") else _MAX_NUMBER
        for number in _numbers(value):
            if not (math.isfinite(number) and abs(number) <= limit):
                raise _error(path, f"gives {shown(key)} as {shown(number)}, which cannot be")
    layers, transformers = (
        max(_numbers(settings.get(key, 1)), default=1) for key in (_LAYERS, _TRANSFORMERS)
    )
    if layers * transformers > _MAX_NESTED:
        raise _error(path, f"gives {_LAYERS} as {layers} and {_TRANSFORMERS} as {transformers}")


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in plain values."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)


def _error(path: Path, said: str) -> EasyRefError:
    return EasyRefError(f"{escaped(str(path))} {said}. Get it again.")
