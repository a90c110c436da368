"""The form in which a model set stores large weights: int8 with one scale per output channel.

    python -m workshop.demo.stored_weights FOLDER    # convert a set that stores them in float16

`easyref_core.demo_set.read_stored_weights` reads it back, in float16. The text encoders and the
adapter stay in float16: they are small, or a plain checkpoint that `load_checkpoint` reads.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from easyref_core.demo_set import STORED_SCALE, read_stored_weights

from .tiny_weights import write_tensors

PARTS = ("unet", "vae", "controlnet")
WEIGHTS = "diffusion_pytorch_model.safetensors"

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


if __name__ == "__main__":
    main(sys.argv[1:])
