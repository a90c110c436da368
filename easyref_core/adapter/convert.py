"""An adapter file in another dtype, with or without the MLLM: smaller, or whole again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from ..errors import EasyRefError
from ..files import check_output, write_atomically, writing
from ..untrusted import escaped, shown
from ..weight_file import GetTensor, TensorInfo, WeightFile, all_finite, write_safetensors
from .checkpoint import AdapterCheckpoint, is_adapter
from .parts import BODY, FINAL, TOKENS
from .weights import official_weights

FP8 = "fp8"
DTYPES = ("float32", "bfloat16", "float16", FP8)
_FP8 = torch.float8_e4m3fn
_SCALE = "scale_weight"

Source = tuple[WeightFile, str]


def convert_adapter(
    checkpoint: AdapterCheckpoint,
    to: str | Path,
    dtype: str | None = None,
    *,
    mllm: Mapping[str, Source] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter's weights under their official names into one safetensors file.

    One tensor at a time is in memory. Weights of the base UNet and others that EasyRef does not use
    are left out.

    Args:
        to: a new file; may be none of those that are read.
        dtype: one of `DTYPES`; None keeps that of each weight. `fp8` rounds matrices to one byte,
            each row with a scale of its own; vectors and reference tokens keep their dtype.
        mllm: official name -> source of the MLLM's weights (`EncoderPlan.sources`), which are
            written too. An empty one leaves the MLLM out; None keeps what the adapter holds.
        overwrite: whether an adapter that is there may be replaced.

    Returns:
        `to`.

    Raises:
        EasyRefError: an unknown dtype; a weight that overflows in it (named); files that cannot be
            read or written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise EasyRefError(
            f"There is no dtype {shown(dtype)} to convert to. Choose one of {', '.join(DTYPES)}."
        )
    to = Path(to)
    sources = {name: (checkpoint.file, n) for name, n in official_weights(checkpoint).items()}
    if mllm is not None:
        own = {name: s for name, s in sources.items() if not name.startswith(BODY)}
        sources = {name: s for name, s in mllm.items() if name.startswith(BODY)} | own
    files = {file.path: file for file, _ in sources.values()}
    check_output(to, "an EasyRef adapter", is_adapter, files, overwrite)
    infos: dict[str, TensorInfo] = {}
    for name, (file, source) in sources.items():
        infos |= _written(name, file, source, dtype)

    def write(path: Path) -> None:
        with ExitStack() as opened:
            readers = {p: opened.enter_context(f.open(scaled=False)) for p, f in files.items()}
            tensors = _tensors(sources, readers, dtype)
            write_safetensors(path, infos, tensors, checkpoint.file.metadata)

    with writing(to):
        write_atomically(to, write, replace=overwrite)
    return to


def _written(name: str, file: WeightFile, source: str, dtype: str | None) -> dict[str, TensorInfo]:
    """What one weight becomes in the file: itself, and its scale where it has one."""
    info = file.tensors[source]
    scale = file.scales.get(source)
    if dtype == FP8 and _is_matrix(name, info):
        rows = TensorInfo((info.shape[0], 1), "float32")
        return {name: TensorInfo(info.shape, "float8_e4m3fn"), _scale_of(name): rows}
    if dtype is None and scale is not None:
        of_scale = TensorInfo(tuple(scale.shape), "float32")
        return {name: TensorInfo(info.shape, info.dtype), _scale_of(name): of_scale}
    return {name: TensorInfo(info.shape, _dtype(info, dtype, scale is not None))}


def _tensors(
    sources: Mapping[str, Source], readers: Mapping[Path, GetTensor], dtype: str | None
) -> Iterator[torch.Tensor]:
    """In the order of `_written`."""
    for name, (file, source) in sources.items():
        weight, scale = readers[file.path](source), file.scales.get(source)
        info = file.tensors[source]
        if dtype is None:
            yield weight
            if scale is not None:
                yield scale
            continue
        if scale is not None:
            weight = weight.float() * scale
        if dtype == FP8 and _is_matrix(name, info):
            yield from _in_fp8(weight.float())
            continue
        converted = weight.to(getattr(torch, _dtype(info, dtype, scale is not None)))
        if not all_finite(converted):
            raise EasyRefError(
                f"{escaped(name)} overflows in {dtype}, or holds values that are not numbers. "
                "Choose bfloat16 or float32."
            )
        yield converted


def _in_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in one byte a number, and the scale of each row [rows, 1]."""
    scale = weight.abs().amax(dim=1, keepdim=True) / torch.finfo(_FP8).max
    scale[scale == 0] = 1
    return (weight / scale).to(_FP8), scale


def _is_matrix(name: str, info: TensorInfo) -> bool:
    return len(info.shape) == 2 and name.endswith(".weight") and name != FINAL + TOKENS


def _dtype(info: TensorInfo, dtype: str | None, scaled: bool) -> str:
    """Of a weight that is written without a scale."""
    if dtype == FP8 or dtype is None:
        return "float32" if scaled else info.dtype
    return dtype


def _scale_of(name: str) -> str:
    return name.removesuffix("weight") + _SCALE
