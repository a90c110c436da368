"""Cost of references during sampling: device synchronisations, and time."""

from __future__ import annotations

import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .bench import Bench, Variant
from .report import Row, measured

ONE_APPLY = 1.03
FOUR_REGIONS = 1.15
NEW_TOKENS = 1.0
_WAITS = "called a synchronizing CUDA operation"
_STEPS = 12
_ROUNDS = 2


def syncs(bench: Bench) -> Iterator[Row]:
    """Synchronisations in model calls after the first, per variant.

    PyTorch's sync debug mode is set to warn, so that every place is listed and those of ComfyUI
    itself, measured with the same model and LoRA at weight 0, can be subtracted.
    """
    own = _synchronisations(bench, lambda model: bench.apply(model, bench.tokens(1), weight=0.0))
    yield measured("waits of ComfyUI's own", own.total(), note=_places(own))
    for name, variant in bench.variants().items():
        places = _synchronisations(bench, variant) - own
        yield measured(name, places.total(), at_most=0, note=_places(places))


def step(bench: Bench) -> Iterator[Row]:
    """Time per step: plain, with the LoRA alone, with one Apply, with four regions.

    Medians of later steps, best of interleaved rounds, so that a changing clock affects all.
    """
    tokens, unet = bench.tokens(1), bench.unet()
    models = {
        "plain": unet,
        "LoRA alone": bench.apply(unet, tokens, weight=0.0),
        "one Apply": bench.apply(unet, tokens),
        "four regions": bench.apply(unet, None, regions=bench.regions()),
    }
    best = dict.fromkeys(models, float("inf"))
    for _ in range(_ROUNDS):
        for name, model in models.items():
            bench.sample(model, 2)  # loads and merges what differs from the last one
            _, times = bench.step_times(model, 3 if bench.small else _STEPS)
            best[name] = min(best[name], statistics.median(times))
    for name, seconds in best.items():
        yield measured(f"a step, {name}", seconds * 1000, "ms")
    plain = best["plain"]
    yield measured("one Apply / plain", best["one Apply"] / plain, at_most=ONE_APPLY)
    yield measured("four regions / plain", best["four regions"] / plain, at_most=FOUR_REGIONS)


def first_step(bench: Bench) -> Iterator[Row]:
    """Extra time of the first step with tokens that were not used before."""
    unet = bench.unet()
    known = bench.apply(unet, bench.tokens(1))
    bench.sample(known, 2)
    usual = statistics.median(bench.step_times(known, 2)[0] for _ in range(3))
    yield measured("first step, known tokens", usual, "s")
    new = [bench.apply(unet, bench.tokens(seed)) for seed in (21, 22, 23)]
    slowest = max(bench.step_times(model, 2)[0] for model in new)
    yield measured("new tokens add", slowest - usual, "s", at_most=NEW_TOKENS)


def _synchronisations(bench: Bench, variant: Variant) -> Counter[str]:
    """Source lines that synchronise with the device after the first model call -> count."""
    from comfy.patcher_extension import WrappersMP

    watch = _Watch(bench.gpu)
    model = bench.unet().clone()
    # The first wrapper is the outermost: those of the variant run inside.
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "gpu_check", watch)
    bench.sample(variant(model), 4, side=min(bench.models.latent, 64))
    if watch.calls < 4:
        raise RuntimeError(f"4 steps made only {watch.calls} model calls")
    return watch.places


class _Watch:
    """An APPLY_MODEL wrapper that counts synchronisations in every call but the first."""

    def __init__(self, gpu: bool) -> None:
        self._gpu = gpu
        self.calls = 0
        self.places: Counter[str] = Counter()

    def __call__(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == 1:
            return executor(*args, **kwargs)
        with _counted(self.places) if self._gpu else _Simulated(self.places):
            return executor(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watch:
        return self


@contextmanager
def _counted(places: Counter[str]) -> Iterator[None]:
    """Count PyTorch's warnings of operations that synchronise with the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if _WAITS in str(warning.message):
            places[f"{_short(warning.filename)}:{warning.lineno}"] += 1


_WAITING = (
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.item,
    torch.ops.aten.nonzero,
)


class _Simulated(TorchDispatchMode):
    """The same on a CPU: counts operations that would synchronise on a GPU."""

    def __init__(self, places: Counter[str]) -> None:
        super().__init__()
        self._places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _WAITING:
            self._places[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def _short(path: str) -> str:
    """The last two parts of a path."""
    return "/".join(Path(path).parts[-2:])


def _places(counts: Counter[str]) -> str:
    return ", ".join(f"{place} ({count})" for place, count in counts.most_common(6))
