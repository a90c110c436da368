"""The command `bench`: a table of `easyref bench` on the demo models.

Two processes share the images, as on several GPUs. The same command again goes on with a run that
was stopped.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from easyref_core.demo_set import SET_FILE, shipped_set
from easyref_core.errors import EasyRefError
from easyref_core.evaluation.methods import Method
from easyref_core.evaluation.metrics import Metric
from easyref_core.evaluation.settings import BenchSettings, make_bench_settings
from easyref_core.evaluation.trials import Trial
from easyref_core.training.processes import world_size

from ..rows import SamplingSettings
from .drawn_groups import GroupOptions, read_facts, write_groups
from .options import CLIP, DINO, IP_ADAPTER, BenchOptions, arguments
from .tables import TABLES

LORA_RANK, LORA_RATE, LORA_BATCH = 32, 3e-3, 4
_BATCH = 8
_PROCESSES = 2


def demo_bench(options: BenchOptions) -> int:
    """Make a table; returns the exit status: 0 where all that is expected holds, else 1.

    Raises:
        EasyRefError: models that are missing, a folder that cannot be used.
    """
    if world_size() > 1:  # one of the processes that `_in_processes` starts
        run(options)
        return 0
    prepare(options)
    if (os.cpu_count() or 1) > 1:
        _in_processes(options)
    else:
        run(options)
    return report(options)


def prepare(options: BenchOptions) -> None:
    """Draw the groups, and write the base model as diffusers reads it."""
    from .clip import write_image_encoder
    from .sdxl import write_sdxl

    bench_settings(options)  # before anything is drawn
    for path in (options.model(name) for name in (CLIP, DINO, IP_ADAPTER)):
        if not path.exists():
            raise EasyRefError(
                f"{path} is missing. Get it again, or train it: python -m workshop.demo "
                "bench-models"
            )
    table = TABLES[options.table]
    chosen = GroupOptions(options.groups or table.groups, splits=table.splits)
    write_groups(options.out / "groups", chosen)
    base = options.out / "base"
    if not (base / SET_FILE).exists():
        write_sdxl(shipped_set(), base)
        (base / SET_FILE).write_bytes((shipped_set() / SET_FILE).read_bytes())  # it is whole
    write_image_encoder(options.model(CLIP), options.out / "image_encoder")


def run(options: BenchOptions) -> None:
    """Generate and score, alone or as one of several processes."""
    from easyref_core.evaluation.run import run_bench

    run_bench(
        bench_settings(options),
        make_methods=_methods,
        make_metrics=_metrics,
        keep=partial(TABLES[options.table].keep, options),
        overwrite=options.overwrite,
    )


def bench_settings(options: BenchOptions) -> BenchSettings:
    """What `easyref bench` would be told."""
    table, sampling = TABLES[options.table], SamplingSettings()
    content: dict[str, Any] = {
        "groups": str(options.out / "groups"),
        "out": str(options.out / "run"),
        "methods": list(options.methods or table.methods),
        "base": str(options.out / "base"),
        "mllm": str(shipped_set() / "mllm"),
        "ip_adapter": str(options.model(IP_ADAPTER)),
        "image_encoder": str(options.out / "image_encoder"),
        "clip": str(options.model(CLIP)),
        "dino": str(options.model(DINO)),
        "offline": True,
        "steps": options.steps,
        "guidance": sampling.cfg,
        "negative": sampling.negative,
        "size": sampling.side,
        "lora_rank": LORA_RANK,
        "lora_steps": options.lora_steps,
        "batch_size": _BATCH,
        "device": "cpu",
    }
    content |= table.settings(options)
    counts = list(options.counts or table.counts)
    content["vary"] = {"references": counts, **content.get("vary", {})}
    return make_bench_settings(content)


def report(options: BenchOptions) -> int:
    """Print what of the expected holds, and what else is found; returns the exit status."""
    folder, table = options.out / "run", TABLES[options.table]
    found = table.expected(folder / "scores.csv", options.methods or table.methods)
    for sentence in [*(verdict.sentence for verdict in found), *table.found(folder / "scores.csv")]:
        print(sentence)
    print(folder / "index.html")
    return 0 if all(verdict.holds for verdict in found) else 1


def _methods(
    settings: BenchSettings, trials: Sequence[Trial], device: torch.device
) -> Mapping[str, Method]:
    from easyref_core.evaluation.methods.load import load_methods
    from easyref_core.evaluation.methods.settings import generation_settings

    given = generation_settings(settings, device)
    # A small model on small pictures wants larger steps than SDXL, and fewer.
    lora = dataclasses.replace(given.lora, learning_rate=LORA_RATE, batch=LORA_BATCH)
    return load_methods(dataclasses.replace(given, lora=lora), trials)


def _metrics(
    settings: BenchSettings, device: torch.device
) -> tuple[Sequence[Metric], Sequence[str]]:
    from easyref_core.evaluation.metrics.load import load_metrics

    from .judge import Judge

    metrics, missing = load_metrics(settings.clip, settings.dino, offline=True, device=device)
    return [Judge(read_facts(Path(settings.groups)), device=device), *metrics], missing


def _in_processes(options: BenchOptions) -> None:
    """
    Raises:
        EasyRefError: a process failed.
    """
    plain = dataclasses.asdict(options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(_PROCESSES), "-m", "workshop.demo", "bench"]
    threads = max(1, (os.cpu_count() or 1) // _PROCESSES)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([*command, *arguments(plain)], env=environment, check=False)
    if done.returncode == 130 or done.returncode < 0:
        raise KeyboardInterrupt
    if done.returncode:
        raise EasyRefError("The benchmark stopped; its messages are above.")
