"""Dynamic VRAM against static: the same tokens and latents, each in its own process."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from safetensors.torch import load_file, save_file

from .bench import Bench, cosine, not_finite
from .report import NotHere, Row, measured, stated

SIMILAR = 0.999  # least cosine similarity
_FILE = "with_dynamic_vram.safetensors"


def with_dynamic_vram(bench: Bench) -> Iterator[Row]:
    """Save the results for the other process."""
    if bench.gpu and not _is_dynamic():
        raise NotHere("this ComfyUI does not use dynamic VRAM on this computer")
    results = _results(bench)
    broken = not_finite(results)
    yield stated("results with dynamic VRAM are finite", not broken, ", ".join(broken))
    save_file(results, bench.work / _FILE)


def without_dynamic_vram(bench: Bench) -> Iterator[Row]:
    """Compare with the results of the other process."""
    file = bench.work / _FILE
    if not file.is_file():
        raise NotHere("there are no results with dynamic VRAM to compare with")
    if _is_dynamic():
        raise RuntimeError("ComfyUI uses dynamic VRAM although it was told not to")
    dynamic, static = load_file(file), _results(bench)
    for name, result in static.items():
        similarity = cosine(result, dynamic[name])
        yield measured(f"{name}, cosine with and without", similarity, at_least=SIMILAR)


def _results(bench: Bench) -> dict[str, torch.Tensor]:
    tokens = bench.encode(bench.references(3), "a cat in a garden")
    model = bench.apply(bench.unet(), tokens)
    steered = bench.sample(model, 6)
    masked = bench.sample(bench.apply(bench.unet(), None, regions=bench.regions()), 6)
    results = {"tokens": tokens.cond, "latents": steered, "latents with regions": masked}
    return {name: tensor.float().cpu().contiguous() for name, tensor in results.items()}


def _is_dynamic() -> bool:
    """Whether ComfyUI creates dynamic model patchers."""
    import comfy.model_patcher

    dynamic = getattr(comfy.model_patcher, "ModelPatcherDynamic", None)
    return dynamic is not None and comfy.model_patcher.CoreModelPatcher is dynamic
