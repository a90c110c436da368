"""Encoding few and many references: time, and peak memory against the estimate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .bench import Bench
from .report import Row, measured, stated

PEAK = 1.1
_MB = 1e6


def encode(bench: Bench) -> Iterator[Row]:
    bench.require_counting()
    models = bench.models
    seconds, tokens = bench.seconds(lambda: bench.encode(bench.references(1, seed=99), "a cat"))
    yield measured("1 reference, weights read for the first time", seconds, "s")
    yield stated("tokens are finite", bool(tokens.cond.isfinite().all()))
    for count in (models.few, models.many):
        references = bench.references(count, seed=count)
        with _requested_memory() as requested:
            bench.easyref().encoder.forget()  # what an earlier run has made
            bench.reset_peak()
            before = bench.allocated()
            seconds, _ = bench.seconds(lambda group=references: bench.encode(group, "a cat"))
            peak = bench.peak() - before
        yield measured(f"{count} references", seconds, "s")
        seconds, _ = bench.seconds(lambda group=references: bench.encode(group, "a dog"))
        yield measured(f"{count} references, another prompt", seconds, "s")
        yield measured(f"{count} references, peak", peak / _MB, "MB")
        yield measured(f"{count} references, told to ComfyUI", max(requested) / _MB, "MB")
        yield measured(f"{count} references, peak / told", peak / max(requested), at_most=PEAK)


@contextmanager
def _requested_memory() -> Iterator[list[float]]:
    """Bytes for activations requested by loading models inside the context."""
    import comfy.model_management as mm

    load: Callable[..., Any] = mm.load_models_gpu
    requested: list[float] = []

    def recorded(models: Any, memory_required: float = 0, **options: Any) -> Any:
        requested.append(memory_required)
        return load(models, memory_required=memory_required, **options)

    mm.load_models_gpu = recorded
    try:
        yield requested
    finally:
        mm.load_models_gpu = load
