"""Progress bar, log of losses and trackers."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..files import writing as writing_to
from .config import Settings
from .disk import writing

_TAIL = 4096  # bytes, more than a line of losses has


class Bar:
    """Progress on stderr: samples per second, loss, memory."""

    def __init__(self, settings: Settings, accelerator: Accelerator, first: int) -> None:
        from tqdm import tqdm

        optimiser = settings.optimiser
        self._device = accelerator.device
        self._bar = tqdm(
            total=optimiser.steps,
            initial=first,
            desc=settings.stage,
            unit=" samples",
            unit_scale=optimiser.batch_size * optimiser.accumulation * accelerator.num_processes,
            disable=not accelerator.is_main_process,
        )

    def show(self, step: int, loss: float) -> None:
        values = {"step": step, "loss": f"{loss:.4f}"}
        if self._device.type == "cuda":
            values["GB"] = f"{torch.cuda.max_memory_allocated(self._device) / 1e9:.1f}"
        self._bar.set_postfix(values)
        self._bar.update(1)
        if step == self._bar.total:
            self._bar.close()


class Losses:
    """`losses.jsonl`: one line per step; after resuming, a step's last line counts."""

    def __init__(self, folder: Path) -> None:
        """Remove a line that a killed run left half written; the next would be appended to it.

        Raises:
            EasyRefError: the file cannot be written.
        """
        self._path = folder / "losses.jsonl"
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._path.touch()
        with writing(self._path), self._path.open("r+b") as file:
            end = file.seek(0, os.SEEK_END)
            start = file.seek(max(0, end - _TAIL))
            tail = file.read(end - start)
            whole = tail.rfind(b"\n") + 1
            if whole < len(tail):
                file.truncate(start + whole)

    def write(self, step: int, loss: float) -> None:
        """
        Raises:
            EasyRefError: the file cannot be written.
        """
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "loss": loss}) + "\n")


def start_trackers(accelerator: Accelerator, settings: Settings) -> None:
    """Start output.trackers, with the settings as their run's configuration.

    Raises:
        EasyRefError: their files cannot be written.
    """
    flat: dict[str, Any] = {}
    for section, values in dataclasses.asdict(settings).items():
        pairs = values.items() if isinstance(values, dict) else [("", values)]
        flat |= {f"{section}.{name}".rstrip("."): str(value) for name, value in pairs}
    with writing_to(Path(settings.output.folder) / "logs"):
        accelerator.init_trackers("easyref", config=flat)
