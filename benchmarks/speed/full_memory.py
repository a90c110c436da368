"""A sampling step with two EasyRef Apply and masks while the computer's memory is nearly full.

    python -m benchmarks.speed.full_memory COMFYUI FOLDER

times a step at SDXL's widths with memory free, fills it until only little more is left than a step
takes, and times it again; the plain model beside it. Seconds are those on the wall, as the system
may read or move memory meanwhile. Prints JSON. Linux only.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .comfyui_models import part, random_tokens, random_unet, start
from .processes import give_back_free, in_process, peak_bytes, reset_peak, resident_bytes
from .sampling import UNET, WIDTHS, random_easyref, sample_once
from .timing import Amount

BAR = 1.25
_SPARE = 400_000_000  # bytes left beside what a step takes
_STEPS, _TIMES = 2, 3
PLAIN, STEERED = "plain model", "two EasyRef Apply with masks"


def full_memory(comfyui: Path, work: Path) -> list[Amount]:
    """Amounts of the table."""
    return as_amounts(in_process("full_memory", str(comfyui), str(work)))


def as_amounts(found: dict[str, dict[str, float]]) -> list[Amount]:
    """The seconds of a step with full memory, by those of the plain model then, and those of each
    with free memory."""
    name = "with memory nearly full"
    share = found[STEERED]["full"] / found[PLAIN]["full"]
    return [
        Amount(f"{name}: a step of {STEERED}, of the plain model's", share, "", BAR),
        *(
            Amount(f"{name}: {subject}, of a step with memory free", one["full"] / one["free"], "")
            for subject, one in found.items()
        ),
    ]


def _measure(comfyui: Path, work: Path) -> dict[str, dict[str, float]]:
    nodes = start(comfyui, work)
    widths = WIDTHS[0]
    with torch.inference_mode():
        model = random_unet(UNET | {"model_channels": widths.channels})
        layers = part("nodes.host.unet_layers").cross_attention_layers(model)
        easyref = random_easyref(nodes, work, layers, widths.channels)
        left = torch.zeros(1, 64, 64)
        left[:, :, :32] = 1
        steered = model
        for seed, mask in ((1, left), (2, 1 - left)):
            tokens = random_tokens(easyref, seed)
            steered = nodes["EasyRefApply"].execute(steered, easyref, tokens, mask=mask)[0]
        runs = {
            name: partial(sample_once, widths.side, one, _STEPS)
            for name, one in ((PLAIN, model), (STEERED, steered))
        }
        for run in runs.values():
            run()
        resident = resident_bytes()
        reset_peak()
        free = {name: _seconds(run) for name, run in runs.items()}
        room = peak_bytes() - resident + _SPARE
        give_back_free()
        filling = _filling(room)
        full = {name: _seconds(run) for name, run in runs.items()}
        del filling
    return {name: {"free": free[name], "full": full[name]} for name in runs}


def _filling(room: int) -> torch.Tensor:
    """Memory in use, such that so many bytes are left."""
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    available = int(re.search(r"MemAvailable:\s*(\d+) kB", text).group(1)) * 1024
    return torch.ones(max(0, available - room), dtype=torch.uint8)


def _seconds(run: Callable[[], Any]) -> float:
    def once() -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    return statistics.median(once() for _ in range(_TIMES)) / _STEPS


if __name__ == "__main__":
    print(json.dumps(_measure(*map(Path, sys.argv[1:]))))
