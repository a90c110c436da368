"""A metric's model: a directory as transformers saves it, read without running anything of its own.

transformers builds the module and renames weights of older files; files are opened here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...errors import EasyRefError
from ...out_of_memory import lack_of_memory
from ...untrusted import (
    escaped,
    is_regular,
    kind_of,
    one_line,
    open_regular,
    read_json,
    shown,
    whole_number,
)
from ...weight_file import open_weight_file, weight_files

_CONFIG = "config.json"
_PREPROCESSING = "preprocessor_config.json"
_MAX_LAYERS = 200
_MAX_SIDE = 1024  # of a picture that a processor makes
_MAX_PATCHES = 4096
# What else a config.json can ask of transformers: code from the hub as attention or as a model,
# another arithmetic, other results.
_IGNORED = (
    "attn_implementation",
    "auto_map",
    "dtype",
    "experts_implementation",
    "quantization_config",
    "return_dict",
    "torch_dtype",
    "use_return_dict",
)
_WEIGHTS = ("float64", "float32", "float16", "bfloat16")
_CHUNK = 2**20
# Not weights, or of a part that is not used.
_BESIDE = ("position_ids", "pooler.dense.weight", "pooler.dense.bias")
_PROCESSORS = ("CLIPImageProcessor", "BitImageProcessor", "ViTImageProcessor")
_AGAIN = "Download the folder again."


class MissingModelError(EasyRefError):
    """A model is not there, while nothing is wrong with what is."""


@dataclass(frozen=True, eq=False)
class ModelKind:
    """The models that a metric takes.

    Attributes:
        name: for messages, such as "CLIP".
        example: the usual one's name on the Hugging Face hub.
        classes: model_type of config.json -> (configuration class, model class, arguments).
    """

    name: str
    example: str
    classes: Mapping[str, tuple[str, str, Mapping[str, Any]]]


@dataclass(frozen=True, eq=False)
class OpenedModel:
    """A model with what it was read from.

    Attributes:
        module: in float32, on the CPU.
        processor: of transformers, PIL's kind: picture -> pixel values.
        identity: family, checksum of each weight file, and preprocessing, as plain JSON.
    """

    module: torch.nn.Module
    processor: Any
    identity: dict[str, Any]


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The floating-point tensors of a weight file.

    Raises:
        EasyRefError: see `open_weight_file`; quantised weights.
    """
    file = open_weight_file(path)
    names = [name for name in file.tensors if not name.endswith("position_ids")]
    odd = [name for name in names if file.tensors[name].dtype not in _WEIGHTS]
    if odd:
        raise EasyRefError(
            f"{escaped(str(path))}: {escaped(odd[0])} is stored as "
            f"{escaped(file.tensors[odd[0]].dtype)}. Get the model in float32 or float16."
        )
    return file.read({name: name for name in names})


def family_of(directory: Path) -> str | None:
    """The model_type of a directory's config.json; None where there is none. Does not raise."""
    try:
        family = read_json(directory / _CONFIG).get("model_type")
    except (EasyRefError, AttributeError):
        return None
    return family if isinstance(family, str) else None


def open_model(
    directory: Path,
    kind: ModelKind,
    read: Callable[[Path], dict[str, torch.Tensor]] = read_weights,
) -> OpenedModel:
    """Read a model directory.

    Args:
        read: how a weight file is read.

    Raises:
        MissingModelError: no directory, or no config.json or weights in it.
        EasyRefError: a model of another kind, or files that are damaged or do not fit together.
    """
    name = escaped(str(directory))
    if not is_regular(directory / _CONFIG):
        raise MissingModelError(f"There is no {kind.name} model in {name} (no {_CONFIG}).")
    settings = _plain_settings(_read_settings(directory / _CONFIG))
    family = settings.get("model_type")
    if not isinstance(family, str) or family not in kind.classes:
        raise EasyRefError(
            f"{name} holds a model of type {shown(family)} where {kind.name} is needed "
            f"(model_type {' or '.join(kind.classes)}), such as {kind.example}."
        )
    files = weight_files(directory)
    if not files:
        raise MissingModelError(f"There are no weights in {name} (model.safetensors).")
    processor = _image_processor(directory, _patch_size(settings))
    state = {key: w.float() for file in files for key, w in read(file).items()}
    module = _module(settings, kind.classes[family], state, name)
    preprocessing = {key: _plain(value) for key, value in sorted(processor.to_dict().items())}
    identity = {
        "family": family,
        "sha256": {file.name: _checksum(file) for file in files},
        "preprocessing": preprocessing,
    }
    return OpenedModel(module.eval().requires_grad_(False), processor, identity)


def _module(
    settings: dict[str, Any],
    classes: tuple[str, str, Mapping[str, Any]],
    state: dict[str, torch.Tensor],
    name: str,
) -> torch.nn.Module:
    import transformers

    config_class, model_class, arguments = classes
    stored = sum(weight.numel() for weight in state.values())
    try:
        _check_layers(settings)
        config = getattr(transformers, config_class).from_dict(settings)
        kind = getattr(transformers, model_class)
        with torch.device("meta"):
            needed = sum(weight.numel() for weight in kind(config, **arguments).parameters())
        if needed > stored:  # before memory is taken for them
            raise EasyRefError(f"it describes {needed:,} weights, the files hold {stored:,}")
        module, info = kind.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, **arguments
        )
    except Exception as error:  # odd configurations raise anything
        if lack_of_memory(error) is not None:
            raise
        raise EasyRefError(
            f"The model in {name} cannot be built by its {_CONFIG} ({one_line(error)}). {_AGAIN}"
        ) from error
    unused = [key for key in info["unexpected_keys"] if not key.endswith(_BESIDE)]
    for problem, names in (("lack", info["missing_keys"]), ("hold beside it", unused)):
        if names:
            raise EasyRefError(
                f"The weights in {name} do not fit its {_CONFIG}: they {problem} "
                f"{escaped(sorted(map(str, names))[0])} and {len(names) - 1} more. {_AGAIN}"
            )
    return module.float()


def _check_layers(settings: Mapping[str, Any]) -> None:
    """Raise EasyRefError for depths that would be built for ever, or need a stack without end."""
    for part in (settings, settings.get("text_config"), settings.get("vision_config")):
        if isinstance(part, dict) and "num_hidden_layers" in part:
            whole_number(part["num_hidden_layers"], "num_hidden_layers", 1, _MAX_LAYERS)


def _plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's sizes, without what `_IGNORED` names and private settings."""
    return {
        key: _plain_settings(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key not in _IGNORED and not key.startswith(("_", "output_"))
    }


def _patch_size(settings: Mapping[str, Any]) -> int:
    vision = settings.get("vision_config")
    found = (vision if isinstance(vision, dict) else settings).get("patch_size", _MAX_SIDE)
    return whole_number(found, "patch_size", 1, _MAX_SIDE)


def _image_processor(directory: Path, patch_size: int) -> Any:
    """The directory's image processor, computing with PIL and numpy: torchvision's resizes
    otherwise, and scores must not depend on whether it is installed.

    It must make pictures of one size, or an odd picture could take all memory.
    """
    path = directory / _PREPROCESSING
    if not is_regular(path):
        raise EasyRefError(
            f"There is no {_PREPROCESSING} in {escaped(str(directory))}, which says how pictures "
            "are prepared. Download all files of the model."
        )
    settings = _read_settings(path)
    named = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    kind = str(named).replace("FeatureExtractor", "ImageProcessor")
    kind = kind.removesuffix("Fast").removesuffix("Pil")
    if kind not in _PROCESSORS:
        raise EasyRefError(
            f"{escaped(str(path))} names the image processor {shown(named)}; CLIP's and DINO's are "
            f"{', '.join(_PROCESSORS)}. {_AGAIN}"
        )
    import transformers

    try:
        for side in _sides(settings):
            whole_number(side, "a side", 1, _MAX_SIDE)
        named_class = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
        processor = named_class.from_dict(settings)
        probes = [Image.new("RGB", size) for size in ((64, 48), (48, 96))]
        made = {
            tuple(processor(images=[p], return_tensors="pt").pixel_values.shape) for p in probes
        }
        patches = max(math.prod(shape[-2:]) for shape in made) / patch_size**2
        if len(made) > 1 or patches > _MAX_PATCHES:
            raise EasyRefError(f"it makes pictures of the shapes {sorted(made)}")
        return processor
    except Exception as error:  # odd settings raise anything
        raise EasyRefError(
            f"{escaped(str(path))} cannot be used ({one_line(error)}). {_AGAIN}"
        ) from error


def _sides(settings: Mapping[str, Any]) -> list[Any]:
    found: list[Any] = []
    for key in ("size", "crop_size", "pad_size"):
        value = settings.get(key)
        found += value.values() if isinstance(value, dict) else [] if value is None else [value]
    return found


def _read_settings(path: Path) -> dict[str, Any]:
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise EasyRefError(f"{escaped(str(path))} holds {kind_of(settings)}. {_AGAIN}")
    return settings


def _plain(value: Any) -> Any:
    """A processor's setting as JSON; newer transformers have classes for sizes and channels."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path, "weight file") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
