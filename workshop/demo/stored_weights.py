"""The form in which a model set stores large weights: int8 with one scale per output channel.

    python -m workshop.demo.stored_weights FOLDER    # convert a set that stores them in float16

`easyref_core.demo_set.read_stored_weights` reads it back, in float16. The adapter is a plain
checkpoint that `load_checkpoint` reads, so its large weights are stored as scaled fp8, which
`easyref_core.weight_file` reads. The text encoders stay in float16: they are small.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from easyref_core.demo_set import STORED_SCALE, read_stored_weights
from easyref_core.weight_file import open_weight_file

from .tiny_weights import write_tensors

PARTS = ("unet", "vae", "controlnet")
WEIGHTS = "diffusion_pytorch_model.safetensors"
ADAPTER = "easyref.safetensors"

_FP8_LARGEST = 448.0
_SMALLEST_FP8_SCALE = 2.0**-40  # of a row of zeros
_LARGE = 4096  # values; smaller weights, norms and biases stay in float16
_SMALLEST_SCALE = 2.0**-17  # below, float16 could not hold the products exactly


def quantised(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights in the stored form: large ones in int8 with bfloat16 scales, the others in float16.

    A scale is the channel's largest magnitude over 127. It has the few digits of bfloat16, so that
    weights that were read back in float16 are stored as the same numbers again.
    """
    stored: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        if weight.ndim < 2 or weight.numel() < _LARGE:
            stored[name] = weight.half()
            continue
        weight = weight.float()
        largest = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)
        scale = (largest / 127).clamp(min=_SMALLEST_SCALE).bfloat16()
        stored[name] = (weight / scale.float()).round().clamp(-127, 127).to(torch.int8)
        stored[name + STORED_SCALE] = scale
    return stored


def scaled_fp8(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter's weights in the stored form: those of large linear layers as float8_e4m3fn with
    float32 scales, one per row, beside them as `scale_weight`; all others in float16.

    A row's largest magnitude becomes fp8's largest, so that weights that were read back are stored
    as the same numbers again.
    """
    stored: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        layer = name.removesuffix("weight")
        if layer == name or weight.ndim != 2 or weight.numel() < _LARGE:
            stored[name] = weight.half()
            continue
        weight = weight.float()
        largest = weight.abs().amax(dim=1, keepdim=True)
        scale = (largest / _FP8_LARGEST).clamp(min=_SMALLEST_FP8_SCALE)
        stored[name] = (weight / scale).to(torch.float8_e4m3fn)
        stored[f"{layer}scale_weight"] = scale
    return stored


def copy_adapter(source: Path, to: Path) -> None:
    """Write an adapter in the stored form, atomically; it may be in that form already.

    Raises:
        EasyRefError: it cannot be read.
    """
    file = open_weight_file(source)
    weights = file.read({name: name for name in file.tensors})
    write_tensors(to, scaled_fp8(weights), dtype=None, metadata=file.metadata)


def write_stored(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write a model's weights in the stored form, atomically."""
    write_tensors(path, quantised(weights), dtype=None)


def load_stored(kind: Any, directory: Path) -> Any:
    """A diffusers model in float32 from a directory of a set, in either form.

    Args:
        kind: its class, such as `UNet2DConditionModel`.

    Raises:
        OSError, ValueError, RuntimeError, KeyError, SafetensorError: a file is missing or damaged,
            or the weights do not fit the configuration.
    """
    weights = read_stored_weights(directory / WEIGHTS)
    model = kind.from_config(kind.load_config(directory))
    model.load_state_dict(weights)
    return model.float().eval()


def main(arguments: Sequence[str]) -> None:
    """Convert the parts of a set in place."""
    (folder,) = arguments
    for path in (Path(folder) / part / WEIGHTS for part in PARTS):
        if path.is_file():
            before = path.stat().st_size
            write_stored(path, read_stored_weights(path))
            print(f"{path}: {before:,} -> {path.stat().st_size:,} bytes")
    adapter = Path(folder) / ADAPTER
    if adapter.is_file():
        before = adapter.stat().st_size
        copy_adapter(adapter, adapter)
        print(f"{adapter}: {before:,} -> {adapter.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
