"""Named random tensors, and writing of weights and JSON."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from easyref_core.files import write_atomically

# Norm weights and biases get this much noise around 1 and 0: with exact ones and zeros, a loader
# that mixes up two of them would go unnoticed.
JITTER = 0.05


class RandomWeights:
    """Collects random tensors by name, drawn in call order from one seeded generator.

    Matrices have standard deviation gain / sqrt(fan in), so that activations keep their size from
    layer to layer. The same part, seed and order of calls give the same numbers everywhere.

    Args:
        part: Name of the model this belongs to; each part has a random stream of its own.
        seed: Seed of the whole set.
    """

    def __init__(self, part: str, seed: int) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._generator = torch.Generator().manual_seed(zlib.crc32(f"{part}/{seed}".encode()))

    def normal(self, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> None:
        """Add one float32 tensor of this shape.

        Raises:
            ValueError: The name is already taken.
        """
        if name in self.tensors:
            raise ValueError(f"tensor {name!r} is defined twice")
        values = torch.randn(shape, generator=self._generator)
        self.tensors[name] = values.mul_(std).add_(mean)

    def linear(
        self, name: str, inputs: int, outputs: int, *, bias: bool = True, gain: float = 1.0
    ) -> None:
        """Add `name.weight` [outputs, inputs] and, if asked for, `name.bias` [outputs]."""
        self.normal(f"{name}.weight", (outputs, inputs), gain / math.sqrt(inputs))
        if bias:
            self.normal(f"{name}.bias", (outputs,), JITTER)

    def conv(
        self,
        name: str,
        inputs: int,
        outputs: int,
        size: int = 3,
        *,
        bias: bool = True,
        gain: float = 1.0,
        bias_mean: float = 0.0,
    ) -> None:
        """Add `name.weight` [outputs, inputs, size, size] and, if asked for, `name.bias`."""
        fan_in = inputs * size * size
        self.normal(f"{name}.weight", (outputs, inputs, size, size), gain / math.sqrt(fan_in))
        if bias:
            self.normal(f"{name}.bias", (outputs,), JITTER, bias_mean)

    def norm(self, name: str, width: int, *, bias: bool = True) -> None:
        """Add `name.weight` [width] near one and, if asked for, `name.bias` [width] near zero."""
        self.normal(f"{name}.weight", (width,), JITTER, 1.0)
        if bias:
            self.normal(f"{name}.bias", (width,), JITTER)

    def tuned(self, name: str, original: torch.Tensor, amount: float = 0.2) -> None:
        """Add a copy of a tensor with noise of `amount` of its own spread, as training leaves."""
        spread = float((original - original.mean()).square().mean().sqrt())
        self.normal(name, tuple(original.shape), amount * spread)
        self.tensors[name] += original


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with Unix line ends, atomically."""
    write_atomically(path, lambda partial: partial.write_bytes(text.encode("utf-8")))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping as readable JSON, atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors as safetensors in one dtype, atomically; None keeps each tensor's own.

    The "format" entry is what transformers and diffusers look for before they accept a file.
    """
    from safetensors.torch import save_file

    stored = {
        name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in tensors.items()
    }
    notes = {**(metadata or {}), "format": "pt"}
    write_atomically(path, lambda partial: save_file(stored, partial, notes))
