"""Device memory: freed, not growing, and sufficient on a small card."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .bench import Bench
from .plan import SMALL_CARD
from .report import Row, measured, stated

LEFT = 0.1  # MB; one set of keys and values has 43, the reference tokens 0.2
GROWTH = 64.0  # MB
KERNELS = 512.0  # MB that the driver may take for kernels it loads meanwhile
PROMPTS = 20
_MB = 1e6


def free(bench: Bench) -> Iterator[Row]:
    """After /free no more is allocated than before anything was loaded.

    Once with the outputs of the nodes still in ComfyUI's caches (`unload_models`), once without
    (`free_memory`). What ComfyUI itself keeps after sampling is measured first and subtracted.
    """
    bench.require_counting()
    start = _settled(bench)
    bench.sample(bench.unet(), 2)
    bench.drop()
    bench.free()
    own = bench.allocated() - start
    yield measured("left by ComfyUI's own sampling", own / _MB, "MB")

    used = bench.used()
    tokens = bench.encode(bench.references(2), "a cat")
    model = bench.apply(bench.unet(), tokens, regions=bench.regions())
    bench.sample(model, 2)
    yield measured("allocated while in use", (bench.allocated() - start) / _MB, "MB")
    bench.free()
    left = (bench.allocated() - start - own) / _MB
    yield measured("left with outputs in the caches", left, "MB", at_most=GROWTH)
    del tokens, model
    bench.drop()
    bench.free()
    left = (bench.allocated() - start - own) / _MB
    yield measured("left", left, "MB", at_most=LEFT)
    yield measured("left on the card, the driver's included", (bench.used() - used) / _MB, "MB")


def growth(bench: Bench) -> Iterator[Row]:
    """Memory allocated after twenty prompts against the third.

    All node outputs are kept, as ComfyUI's caches do on machines with much memory.
    """
    bench.require_counting()
    references = bench.references(bench.models.few)
    outputs: list[Any] = []
    sizes: list[float] = []
    for number in range(PROMPTS):
        tokens = bench.encode(references, f"picture number {number} of a cat")
        model = bench.apply(bench.unet(), tokens)
        outputs.append((tokens, model))
        bench.sample(model, 1, side=min(bench.models.latent, 64))
        sizes.append(bench.allocated() / _MB)
    yield measured("allocated after 3 prompts", sizes[2], "MB")
    grown = sizes[-1] - sizes[2]
    yield measured(f"more after {PROMPTS} prompts", grown, "MB", at_most=GROWTH)


def small_card(bench: Bench) -> Iterator[Row]:
    """Encode many references and sample in 6 GB.

    PyTorch's allocator is limited to that, and ComfyUI was started with the rest reserved.
    """
    if bench.gpu:
        total = torch.cuda.get_device_properties(bench.device).total_memory
        if total > SMALL_CARD:
            torch.cuda.set_per_process_memory_fraction(SMALL_CARD / total, bench.device)
    bench.require_counting()
    bench.reset_peak()
    start = bench.used()
    with _highest_use(bench) as highest:
        seconds, tokens = bench.seconds(
            lambda: bench.encode(bench.references(bench.models.many), "a cat")
        )
        yield measured(f"encoding {bench.models.many} references", seconds, "s")
        model = bench.apply(bench.unet(), tokens)
        seconds, latents = bench.seconds(lambda: bench.sample(model, 4))
        yield measured("4 steps, models loaded", seconds, "s")
    yield stated("result is finite", bool(torch.isfinite(latents).all()))
    limit = SMALL_CARD / _MB
    yield measured("tensors, at most", bench.peak() / _MB, "MB", at_most=limit)
    yield measured("the card, at most", (max(highest) - start) / _MB, "MB", at_most=limit + KERNELS)


def _settled(bench: Bench) -> int:
    """Allocated bytes after the libraries have allocated their permanent workspaces."""
    if bench.gpu:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            square = torch.ones(256, 256, device=bench.device, dtype=dtype)
            torch.nn.functional.linear(square, square)
            picture = square[None, None, :64, :64]
            torch.nn.functional.conv2d(picture, picture[..., :3, :3])
        del square, picture
        bench.wait()
    bench.free()
    return bench.allocated()


@contextmanager
def _highest_use(bench: Bench, seconds: float = 0.02) -> Iterator[list[int]]:
    """Bytes of the card in use, sampled every so many seconds inside the context."""
    samples = [bench.used()]
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(seconds):
            samples.append(bench.used())

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()
