"""Writing a safetensors file tensor by tensor; the library's own writer needs all at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from .dtypes import SAFETENSORS
from .stored import TensorInfo

_NAMES = {name: short for short, name in SAFETENSORS.items()}


def write_safetensors(
    path: Path,
    infos: Mapping[str, TensorInfo],
    tensors: Iterable[torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write `tensors` as they come.

    Args:
        infos: name -> shape and dtype of each, in order.

    Raises:
        OSError: the disk is full or not writable.
        ValueError: a tensor is not what was announced.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, info in infos.items():
        start, end = end, end + info.bytes
        shape, dtype = list(info.shape), _NAMES[info.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for (name, info), tensor in zip(infos.items(), tensors, strict=True):
            if (tuple(tensor.shape), str(tensor.dtype)) != (info.shape, f"torch.{info.dtype}"):
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {info}")
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
