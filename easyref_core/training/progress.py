"""Progress bar, log of losses and trackers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..files import write_atomically
from ..files import writing as writing_to
from ..untrusted import open_regular
from .config import Settings
from .disk import writing

LOSSES = "losses.jsonl"


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
    """`losses.jsonl`: one line a step, in order.

    Args:
        first: step that the run continues from. Later steps, which are taken again, lose their
            lines, and so does what a killed run or a power cut has left half written.

    Raises:
        EasyRefError: the file cannot be written.
    """

    def __init__(self, folder: Path, first: int) -> None:
        self._path = folder / LOSSES
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._path.touch()
            kept = list(_lines_up_to(self._path, first))
            if sum(map(len, kept)) != self._path.stat().st_size:
                write_atomically(self._path, lambda file: file.write_bytes(b"".join(kept)))

    def write(self, step: int, loss: float) -> None:
        """
        Raises:
            EasyRefError: the file cannot be written.
        """
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "loss": loss}) + "\n")


def _lines_up_to(path: Path, last: int) -> Iterator[bytes]:
    """Whole lines of ever later steps."""
    before = 0
    with open_regular(path) as file:
        for line in file:
            try:
                step = json.loads(line)["step"]
                later = before < step <= last and line.endswith(b"\n")
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            if later:
                before = step
                yield line


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
