"""What a person sees while a run goes on."""

from __future__ import annotations

import time

import torch
from accelerate import Accelerator

from .config import Settings


class Bar:
    """Progress on stderr: loss, pictures a second, memory."""

    def __init__(self, settings: Settings, accelerator: Accelerator, first: int) -> None:
        from tqdm import tqdm

        optimiser = settings.optimiser
        self._pictures = optimiser.batch_size * optimiser.accumulation * accelerator.num_processes
        self._device = accelerator.device
        self._start, self._first = time.perf_counter(), first
        self._bar = tqdm(
            total=optimiser.steps,
            initial=first,
            desc=settings.stage,
            disable=not accelerator.is_main_process,
        )

    def show(self, step: int, loss: float) -> None:
        seconds = time.perf_counter() - self._start
        speed = (step - self._first) * self._pictures / max(seconds, 1e-9)
        shown = {"loss": f"{loss:.4f}", "pictures/s": f"{speed:.1f}"}
        if self._device.type == "cuda":
            shown["GB"] = f"{torch.cuda.max_memory_allocated(self._device) / 1e9:.1f}"
        self._bar.set_postfix(shown)
        self._bar.update(1)
        if step == self._bar.total:
            self._bar.close()
