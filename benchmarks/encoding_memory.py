"""Activation memory of encoding references at real size, counted without computing.

Runs EasyRef's own encoding and inspection with Qwen2-VL-2B's shapes on PyTorch's meta device and
records the peak of bytes allocated there, which is what a GPU needs beside the weights. Attention
counts as a fused kernel, which allocates only its result, or runs in chunks as without one.

    python benchmarks/encoding_memory.py

Prints one JSON object: peak bytes, and peak over the plan's estimate, which tests/core keep near 1.
"""

from __future__ import annotations

import itertools
import json
import sys
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from easyref_core import attention_kernels as kernels
from easyref_core.adapter.layer_pooling import POOLS, PoolingSizes, new_sizes
from easyref_core.encode.cache import EncodingCache
from easyref_core.encode.encoder import EasyRefEncoder
from easyref_core.encode.group import Reference, plan_group
from easyref_core.encode.inspection import inspect_references
from easyref_core.encode.passes import encode_references
from easyref_core.encode.plan_encoder import EncoderPlan
from easyref_core.pictures.preprocessing import Patches
from easyref_core.pictures.sizes import PATCH, plan_sizes
from easyref_core.qwen2vl.config import MllmConfig, VisionConfig
from easyref_core.qwen2vl.prompt import TokenizedPrompt

META = torch.device("meta")
TOKEN_WIDTH, NUM_TOKENS = 2048, 64
GROUPS = ((1, 336), (8, 336), (64, 336), (1, 1008), (8, 1008), (64, 588), (1, 3360), (2, 3360))
"""Number of images and their size in pixels, up to the longest sequences that the MLLM reads."""


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of storages allocated on the meta device while active, until they are freed.

    Tensors copied to the CPU become zeros, so that code that reads values runs.

    Attributes:
        live: bytes allocated now.
        peak: largest value of `live`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            source = args[0]
            if source.device == META:
                return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._add(tensor.untyped_storage(), given)
        return result

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        number, size = storage._cdata, storage.nbytes()
        if number in given or number in self._known:
            return

        def freed(_: object) -> None:
            del self._known[number]
            self.live -= size

        self._known[number] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def _tensors(values: Any) -> list[torch.Tensor]:
    leaves = tree_leaves(values)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.device == META]


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Attention that allocates what a fused kernel allocates."""
    return torch.empty_like(query)


class Tokenizer:
    """Token ids of the right length, without a vocabulary."""

    source = "nowhere"

    def tokenize(self, image_tokens: Any, prompt: str) -> TokenizedPrompt:
        spans, start = [], 16
        for count in image_tokens:
            spans.append((start, start + count))
            start += count + 2
        length = start + 32 + len(prompt)
        return TokenizedPrompt(torch.zeros(length, dtype=torch.int64), tuple(spans), (0, 1))


POOLED_GROUPS = ((1, 336), (16, 336))
"""Their hidden states do lie in memory, 0.1 MB a token in bfloat16."""


def real_encoder(
    fused: bool, dtype: torch.dtype, aggregation: str = "easyref", shape: str = "blocks"
) -> EasyRefEncoder:
    """The encoder on the meta device with Qwen2-VL-2B's widths, and fewer layers where none are
    pooled: activation memory does not depend on their number then."""
    pooled = aggregation != "easyref"
    layers = 28 if pooled else 3
    pools = tuple((name, new_sizes(shape, 1536)) for name in POOLS[aggregation]) if pooled else ()
    attend = _fused if fused else kernels.attend_in_chunks
    names = ("Linear", "LayerNorm", "RMSNorm", "Embedding")
    operations = SimpleNamespace(**{n: getattr(nn, n) for n in names}, attend=attend)
    return EasyRefEncoder(
        MllmConfig(num_layers=layers, vision=VisionConfig(depth=1)),
        NUM_TOKENS,
        TOKEN_WIDTH,
        pooling=PoolingSizes(pools, tuple(range(layers))) if pooled else None,
        operations=operations,
        compute_dtype=dtype,
        device=META,
        dtype=dtype,
    ).requires_grad_(False)


def _grey(picture: Image.Image, image_size: int) -> Patches:
    """Patches of the right shape without preprocessing, all of the image's grey value."""
    _, (width, height) = plan_sizes(*picture.size, image_size)
    rows, columns = height // PATCH, width // PATCH
    number = torch.tensor(float(picture.getpixel((0, 0))[0]))
    return Patches(number.expand(rows * columns, MllmConfig().vision.patch_dim), rows, columns)


def peak_and_estimate(
    encoder: EasyRefEncoder,
    fused: bool,
    count: int,
    size: int,
    inspect: bool,
    edited: bool = False,
) -> tuple[int, int]:
    """Peak bytes of one encode or inspection, and the plan's estimate.

    Args:
        edited: of encoding the same pictures again with another prompt.
    """
    # Equal images are encoded once. The last one differs, so that it is encoded beside the features
    # of the others, which are black like the image of the unconditional branch.
    colours = [0] * (count - 1) + [min(count - 1, 1)]
    pictures = [Image.new("RGB", (size, size), colour) for colour in colours]
    references = [Reference(picture) for picture in pictures]
    tokenizer: Any = Tokenizer()
    pools = encoder.mllm_layer_pooling
    checkpoint: Any = SimpleNamespace(
        pools=pools.sizes.pools if pools is not None else (),
        mllm_layers=None,
        identity="none",
        name="none",
        num_tokens=NUM_TOKENS,
        final_layers=1,
        image_size=size,
    )
    encoder_plan = EncoderPlan(checkpoint, encoder.config, None, {})
    aggregation = pools.sizes.aggregations[0] if pools is not None else "easyref"
    plan = partial(plan_group, encoder_plan, tokenizer, references, aggregation=aggregation)
    run: Callable[..., Any] = inspect_references if inspect else encode_references
    cache = EncodingCache() if edited else EncodingCache(prefixes=0)
    with patch("easyref_core.encode.group.preprocess", _grey):
        if edited:
            with PeakMemory():
                run(encoder, plan("a prompt"), device=META, cache=cache)
        planned = plan("another prompt" if edited else "")
        known = partial(cache.known_length, planned)
        estimate = planned.working_bytes(encoder.compute_dtype, fused, known)
        with PeakMemory() as memory:
            run(encoder, planned, device=META, cache=cache)
    return memory.peak, estimate


def measure(aggregations: Sequence[str] = ("easyref", "dla")) -> dict[str, dict[str, float]]:
    """Mode -> number and size of images -> peak in GB, and peak over estimate."""
    found: dict[str, dict[str, Any]] = {}
    modes = itertools.product(
        aggregations, (torch.bfloat16, torch.float32), (True, False), (False, True)
    )
    for aggregation, dtype, fused, inspect in modes:
        encoder = real_encoder(fused, dtype, aggregation)
        kind = "inspect" if inspect else "encode"
        kind += "" if aggregation == "easyref" else f" ({aggregation})"
        name = str(dtype).removeprefix("torch.")
        mode = f"{kind}, {name}, {'fused' if fused else 'chunked'} attention"
        for count, size in GROUPS if aggregation == "easyref" else POOLED_GROUPS:
            peak, estimate = peak_and_estimate(encoder, fused, count, size, inspect)
            found.setdefault(mode, {})[f"{count} at {size}"] = {
                "gigabytes": round(peak / 1e9, 3),
                "peak over estimate": round(peak / estimate, 3),
            }
            print(mode, count, size, found[mode][f"{count} at {size}"], file=sys.stderr)
    return found


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
