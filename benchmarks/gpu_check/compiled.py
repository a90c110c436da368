"""TorchCompileModel before and after EasyRef Apply: results equal the uncompiled model's.

On the golden UNet, whose 8 transformer blocks compile in seconds; what a trace captures of its
first call does not depend on the size.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import comfyhost
import torch

from .bench import Bench, Variant, load_unet
from .models import SMALL
from .report import NotHere, Row, measured

# Compiled kernels sum in another order. The variants differ by a hundred times more, which is
# measured too.
CLOSE = 2e-3
APART = 0.05
_NODE = "comfy_extras.nodes_torch_compile.TorchCompileModel"


def compiled(bench: Bench) -> Iterator[Row]:
    backend = _backend(bench)
    variants = _variants(bench)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield from _all_orders(variants, backend)
    finally:
        torch.backends.cudnn.allow_tf32 = before
        torch.compiler.reset()


def _all_orders(variants: dict[str, Variant], backend: str) -> Iterator[Row]:
    unet = load_unet(SMALL.unet, torch.float32)
    uncompiled = {name: _noise(variant(unet)) for name, variant in variants.items()}
    names = list(uncompiled)
    apart = min(
        _difference(uncompiled[first], uncompiled[second])
        for number, first in enumerate(names)
        for second in names[number + 1 :]
    )
    yield measured("results differ by at least", apart, at_least=APART)

    def largest_difference(order: list[str], compiled: Callable[[Variant], Any]) -> Row:
        off = {
            name: _difference(_noise(compiled(variants[name])), uncompiled[name]) for name in order
        }
        worst = max(off, key=lambda name: (off[name] != off[name], off[name]))  # NaN first
        return measured("", off[worst], at_most=CLOSE, note=f"farthest off: {worst}")

    def named(row: Row, name: str) -> Row:
        return Row(**{**row.written(), "name": name})

    # One compiled model, patched after it: plain first, each change, plain again.
    torch.compiler.reset()
    compiled_unet = comfyhost.stock(_NODE, unet, backend)
    order = [*names, "plain", "one Apply"]
    yield named(
        largest_difference(order, lambda variant: variant(compiled_unet)),
        "plain, then every change",
    )
    torch.compiler.reset()
    compiled_unet = comfyhost.stock(_NODE, unet, backend)
    order = ["one Apply", "plain", "two Applies", "plain"]
    yield named(
        largest_difference(order, lambda variant: variant(compiled_unet)), "Apply first, then plain"
    )
    # The compile node last, right before the sampler.
    torch.compiler.reset()
    order = ["one Apply", "another weight", "plain", "a mask", "two Applies", "one Apply"]
    yield named(
        largest_difference(order, lambda variant: comfyhost.stock(_NODE, variant(unet), backend)),
        "compiled after Apply",
    )


def _variants(bench: Bench) -> dict[str, Variant]:
    """Settings of the golden adapter: name -> function that patches a model; "plain" first."""
    easyref = bench.golden_easyref()
    pack = bench.pack
    first, second = (comfyhost.random_tokens(pack, easyref, seed) for seed in (1, 2))
    left, right = torch.zeros(2, 1, 16, 16)
    left[..., :8] = right[..., 8:] = 1
    regions = pack.run("EasyRefRegion", second, left, 1.0)
    regions = pack.run("EasyRefRegion", first, right, 0.7, previous=regions)
    curve = pack.run("EasyRefWeightCurve", "linear", 1.0, 0.2, "")

    def steered(tokens: Any = first, **settings: Any) -> Variant:
        return lambda model: comfyhost.apply(pack, model, easyref, tokens, **settings)

    return {
        "plain": lambda model: model,
        "one Apply": steered(),
        "other tokens": steered(second),
        "another weight": steered(weight=0.4),
        "outside its window": steered(start_percent=0.9),
        "a mask": steered(mask=left),
        "another mask": steered(mask=right),
        "a curve": steered(curve=curve),
        "two regions": steered(None, regions=regions),
        "two Applies": lambda model: steered(second, weight=0.5)(steered()(model)),
    }


def _backend(bench: Bench) -> str:
    """Inductor on a GPU; on a CPU "eager", which traces as every backend and compiles nothing."""
    if not bench.gpu:
        return "eager"
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        raise NotHere("there is no C compiler, without which inductor cannot start its kernels")
    return "inductor"


def _noise(model: Any) -> torch.Tensor:
    return comfyhost.predict(model, 5.0).float().cpu()


def _difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())
