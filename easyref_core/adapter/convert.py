"""An adapter in another dtype, with or without the MLLM, in one file or in shards; and back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from ..errors import EasyRefError
from ..files import check_apart, check_output, write_atomically, write_together, writing
from ..untrusted import escaped, shown
from ..weight_file import (
    GetTensor,
    TensorInfo,
    WeightFile,
    is_index,
    open_weight_file,
    with_shards,
)
from ..weight_file.rounding import round_rows
from ..weight_file.scales import scaled_infos
from ..weight_file.shards import SET, index_path, parse_size, shard_paths, split, write_index
from ..weight_file.tensors import (
    all_finite,
    apply_scale,
    dtype_name,
    scale_tensor,
    tensors_beside,
)
from ..weight_file.writing import write_safetensors
from .checkpoint import AdapterCheckpoint, is_adapter
from .parts import BODY, FINAL, TOKENS
from .weights import official_weights

FP8, INT8 = "fp8", "int8"
DTYPES = ("float32", "bfloat16", "float16", FP8, INT8)
_ROUNDED = {FP8: torch.float8_e4m3fn, INT8: torch.int8}
_WHAT = "an EasyRef adapter"

Source = tuple[WeightFile, str]


def convert_adapter(
    checkpoint: AdapterCheckpoint,
    to: str | Path,
    dtype: str | None = None,
    *,
    mllm: Mapping[str, Source] | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter's weights under their official names into a safetensors file, or into
    several with an index.

    One tensor at a time is in memory. Weights of the base UNet and others that EasyRef does not use
    are left out.

    Args:
        to: a new file; may be none of those that are read.
        dtype: one of `DTYPES`; None keeps that of each weight. `fp8` and `int8` round matrices to
            one byte, each row with a scale of its own; vectors and reference tokens keep their
            dtype.
        mllm: official name -> source of the MLLM's weights (`EncoderPlan.sources`), which are
            written too. An empty one leaves the MLLM out; None keeps what the adapter holds.
        max_shard_size: bytes, or a text such as "2GB"; where the weights have more, they are
            written into shards beside `to`, as Hugging Face's `save_pretrained` does. None: never.
        overwrite: whether an adapter that is there may be replaced.

    Returns:
        The path by which the adapter is loaded: `to`, or that of the shards' index.

    Raises:
        EasyRefError: an unknown dtype; a weight that overflows in it (named); a size that is none;
            files that cannot be read or written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise EasyRefError(
            f"There is no dtype {shown(dtype)} to convert to. Choose one of {', '.join(DTYPES)}."
        )
    to = Path(to)
    if is_index(to):
        raise EasyRefError(
            f"{escaped(to.name)} is the name of an index, which is written beside shards. Choose a "
            "name that ends in .safetensors."
        )
    most = None if max_shard_size is None else parse_size(max_shard_size)
    sources = {name: (checkpoint.file, n) for name, n in official_weights(checkpoint).items()}
    if mllm is not None:
        own = {name: s for name, s in sources.items() if not name.startswith(BODY)}
        sources = {name: s for name, s in mllm.items() if name.startswith(BODY)} | own
    files = {file.path: file for file, _ in sources.values()}
    inputs = [part.path for file in files.values() for part in (file, *file.shards)]
    infos = {name: _written(name, file, source, dtype) for name, (file, source) in sources.items()}
    # A weight and its scale stay together.
    sizes = {name: sum(info.bytes for info in found.values()) for name, found in infos.items()}
    shards = [list(sizes)] if most is None else split(sizes, most)

    def write(names: Iterable[str], metadata: Mapping[str, str], path: Path) -> None:
        with ExitStack() as opened:
            readers = {p: opened.enter_context(f.open(scaled=False)) for p, f in files.items()}
            tensors = _tensors({name: sources[name] for name in names}, readers, dtype)
            written = {n: info for name in names for n, info in infos[name].items()}
            write_safetensors(path, written, tensors, metadata)

    metadata = dict(checkpoint.file.metadata)
    if len(shards) == 1:
        check_output(to, _WHAT, is_adapter, inputs, overwrite)
        with writing(to):
            write_atomically(to, partial(write, shards[0], metadata), replace=overwrite)
        return to
    named = dict(zip(shard_paths(to, len(shards)), shards, strict=True))
    index = index_path(to)
    old = _replaced(named, index, inputs, overwrite)
    stamps = sorted((file.stamp.size, file.stamp.digest) for file in files.values())
    metadata[SET] = hashlib.sha256(repr((stamps, infos)).encode()).hexdigest()[:16]
    writers: dict[Path, Callable[[Path], object]] = {
        path: partial(write, names, metadata) for path, names in named.items()
    }
    files_of = {name: path.name for path, names in named.items() for name in names}
    places = {n: files_of[name] for name, found in infos.items() for n in found}
    writers[index] = lambda path: write_index(path, places, sum(sizes.values()))
    with writing(index):
        write_together(writers, old)
    return index


def _replaced(
    paths: Iterable[Path], index: Path, inputs: Iterable[Path], overwrite: bool
) -> list[Path]:
    """The files that shards and their index replace, the index first.

    Raises:
        EasyRefError: see `check_output`.
    """
    check_output(index, _WHAT, is_adapter, inputs, overwrite)
    old = with_shards(index) if index.exists() else []
    for path in old:
        check_apart(path, inputs)
    for path in paths:
        if path not in old:
            check_output(path, "a shard of an adapter", _is_shard, inputs, overwrite)
            old += [path] if path.exists() else []
    return old


def _is_shard(path: Path) -> bool:
    """Whether there is a shard that was written by `convert_adapter`."""
    try:
        return SET in open_weight_file(path).metadata
    except EasyRefError:
        return False


def _written(name: str, file: WeightFile, source: str, dtype: str | None) -> dict[str, TensorInfo]:
    """What one weight becomes in the file: itself, and its scale where it has one."""
    info = file.tensors[source]
    scale = file.scales.get(source)
    if dtype in _ROUNDED and _is_matrix(name, info):
        rounded = TensorInfo(info.shape, dtype_name(_ROUNDED[dtype]))
        return scaled_infos(name, rounded, (info.shape[0], 1))
    if dtype is None and scale is not None:
        return scaled_infos(name, TensorInfo(info.shape, info.dtype), scale.shape)
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
                yield from tensors_beside(weight.dtype, scale_tensor(scale))
            continue
        if scale is not None:
            weight = apply_scale(weight, scale)
        if dtype in _ROUNDED and _is_matrix(name, info):
            converted, of_rows = round_rows(weight, _ROUNDED[dtype])
            found = (converted, *tensors_beside(converted.dtype, of_rows))
        else:
            converted = weight.to(getattr(torch, _dtype(info, dtype, scale is not None)))
            found = (converted,)
        if not all(map(all_finite, found)):
            raise EasyRefError(
                f"{escaped(name)} overflows in {dtype}, or holds values that are not numbers. "
                "Choose bfloat16 or float32."
            )
        yield from found


def _is_matrix(name: str, info: TensorInfo) -> bool:
    return len(info.shape) == 2 and name.endswith(".weight") and name != FINAL + TOKENS


def _dtype(info: TensorInfo, dtype: str | None, scaled: bool) -> str:
    """Of a weight that is written without a scale."""
    if dtype in _ROUNDED or dtype is None:
        return "float32" if scaled else info.dtype
    return dtype
