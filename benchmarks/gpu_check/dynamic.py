"""Dynamic VRAM against static: the same pictures to tokens to latents, each in its own process."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from safetensors.torch import load_file, save_file

from .bench import Bench, cosine, finite
from .report import NotHere, Row, measured, stated

LIKE = 0.999
_FILE = "with_dynamic_vram.safetensors"


def with_dynamic_vram(bench: Bench) -> Iterator[Row]:
    """Leaves its results for the other process."""
    if bench.gpu and not _is_dynamic():
        raise NotHere("this ComfyUI does not use dynamic VRAM on this computer")
    results = _results(bench)
    broken = finite(results)
    yield stated("results with dynamic VRAM are finite", not broken, ", ".join(broken))
    save_file(results, bench.work / _FILE)


def without_dynamic_vram(bench: Bench) -> Iterator[Row]:
    """Compares with what the other process left."""
    file = bench.work / _FILE
    if not file.is_file():
        raise NotHere("there are no results with dynamic VRAM to compare with")
    if _is_dynamic():
        raise RuntimeError("ComfyUI uses dynamic VRAM although it was told not to")
    with_it, results = load_file(file), _results(bench)
    for name, result in results.items():
        like = cosine(result, with_it[name])
        yield measured(f"{name}, cosine with and without", like, at_least=LIKE)


def _results(bench: Bench) -> dict[str, torch.Tensor]:
    tokens = bench.encode(bench.references(3), "a cat in a garden")
    model = bench.apply(bench.unet(), tokens)
    steered = bench.sample(model, 6)
    masked = bench.sample(bench.apply(bench.unet(), None, regions=bench.regions()), 6)
    found = {"tokens": tokens.cond, "latents": steered, "latents with regions": masked}
    return {name: tensor.float().cpu().contiguous() for name, tensor in found.items()}


def _is_dynamic() -> bool:
    """Whether new model patchers are of the dynamic kind."""
    import comfy.model_patcher

    dynamic = getattr(comfy.model_patcher, "ModelPatcherDynamic", None)
    return dynamic is not None and comfy.model_patcher.CoreModelPatcher is dynamic
