"""TorchCompileModel in every order: each result is that of the uncompiled model.

On the golden UNet, whose 8 transformer blocks compile in seconds; what a trace keeps of its first
call does not depend on the size.
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

# Compiled kernels add up in another order; what the variants differ by is a hundred times more,
# which is measured too.
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
    wanted = {name: _noise(variant(unet)) for name, variant in variants.items()}
    names = list(wanted)
    apart = min(
        _difference(wanted[first], wanted[second])
        for number, first in enumerate(names)
        for second in names[number + 1 :]
    )
    yield measured("results differ by at least", apart, at_least=APART)

    def far(name: str, model: Any) -> float:
        return _difference(_noise(model), wanted[name])

    def farthest(order: list[str], made: Callable[[Variant], Any]) -> Row:
        found = {name: far(name, made(variants[name])) for name in order}
        worst = max(found, key=lambda name: (found[name] != found[name], found[name]))
        return measured("", found[worst], at_most=CLOSE, note=f"farthest off: {worst}")

    def named(row: Row, name: str) -> Row:
        return Row(**{**row.written(), "name": name})

    # One compiled model, references behind it: plain first, each change, plain again.
    torch.compiler.reset()
    behind = comfyhost.stock(_NODE, unet, backend)
    order = [*names, "plain", "one Apply"]
    yield named(farthest(order, lambda variant: variant(behind)), "plain, then every change")
    torch.compiler.reset()
    behind = comfyhost.stock(_NODE, unet, backend)
    order = ["one Apply", "plain", "two Applies", "plain"]
    yield named(farthest(order, lambda variant: variant(behind)), "Apply first, then plain")
    # The compile node last, as on a graph where it stands before the sampler.
    torch.compiler.reset()
    order = ["one Apply", "another weight", "plain", "a mask", "two Applies", "one Apply"]
    yield named(
        farthest(order, lambda variant: comfyhost.stock(_NODE, variant(unet), backend)),
        "compiled behind Apply",
    )


def _variants(bench: Bench) -> dict[str, Variant]:
    """Of the golden adapter on the golden UNet, "plain" first."""
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
    """Inductor on a GPU; on a CPU one that traces as every backend does and compiles nothing."""
    if not bench.gpu:
        return "eager"
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        raise NotHere("there is no C compiler, without which inductor cannot start its kernels")
    return "inductor"


def _noise(model: Any) -> torch.Tensor:
    return comfyhost.predict(model, 5.0).float().cpu()


def _difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())
