"""The command `bench`: the whole comparison of `easyref bench` on the demo models.

Two processes share the images, as on several GPUs. The same command again goes on with a run that
was stopped.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from easyref_core.demo_set import SET_FILE, TRAINED_SET, shipped_set
from easyref_core.errors import EasyRefError
from easyref_core.evaluation.methods import Method
from easyref_core.evaluation.metrics import Metric
from easyref_core.evaluation.settings import BenchSettings, make_bench_settings
from easyref_core.evaluation.trials import Trial, Variant
from easyref_core.training.processes import world_size

from ..rows import SamplingSettings
from .drawn_groups import GroupOptions, read_facts, write_groups
from .ordering import verdicts

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
SCORE_MODELS = TRAINED_SET / "score"
CLIP, DINO, IP_ADAPTER = "clip", "dino", "ip-adapter_sdxl.safetensors"
OUT = Path("runs/bench")
COUNTS = (1, 2, 4, 8, 16)  # of references
LORA_COUNT = 4  # a LoRA is trained on so many references only
LORA_RANK, LORA_STEPS, LORA_RATE, LORA_BATCH = 32, 80, 3e-3, 4
METHODS = ("easyref", "average", "concatenate", "ip-adapter", "lora", "lora-other", "none")
_BATCH = 8
_PROCESSES = 2


@dataclass(frozen=True)
class BenchOptions:
    """
    Attributes:
        out: folder of everything: groups, the base model as a directory, the run in "run".
        models: folder of `CLIP`, `DINO` and `IP_ADAPTER`; those of the repository by default.
        groups: of each split and kind.
        counts: of references.
        methods: of `METHODS`.
    """

    out: Path = OUT
    models: Path | None = None
    groups: int = 6
    steps: int = SamplingSettings().steps
    counts: tuple[int, ...] = COUNTS
    methods: tuple[str, ...] = METHODS
    lora_steps: int = LORA_STEPS
    overwrite: bool = False

    def model(self, name: str) -> Path:
        """`CLIP`, `DINO` or `IP_ADAPTER`."""
        own = WEIGHTS if name == IP_ADAPTER else SCORE_MODELS
        return (self.models or own) / name


def demo_bench(options: BenchOptions) -> int:
    """Run the comparison; returns the exit status: 0 where the expected ordering holds, else 1.

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

    for path in (options.model(name) for name in (CLIP, DINO, IP_ADAPTER)):
        if not path.exists():
            raise EasyRefError(
                f"{path} is missing. Get it again, or train it: python -m workshop.demo "
                "bench-models"
            )
    write_groups(options.out / "groups", GroupOptions(options.groups))
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
        keep=_kept,
        overwrite=options.overwrite,
    )


def bench_settings(options: BenchOptions) -> BenchSettings:
    """What `easyref bench` would be told."""
    models, sampling = shipped_set(), SamplingSettings()
    content: dict[str, Any] = {
        "groups": str(options.out / "groups"),
        "out": str(options.out / "run"),
        "methods": list(options.methods),
        "base": str(options.out / "base"),
        "adapter": str(models / "easyref.safetensors"),
        "mllm": str(models / "mllm"),
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
        "vary": {"references": list(options.counts)},
    }
    return make_bench_settings(content)


def report(options: BenchOptions) -> int:
    """Print the table and what of the expected ordering holds; returns the exit status."""
    folder = options.out / "run"
    found = verdicts(folder / "scores.csv", options.methods)
    for verdict in found:
        print(verdict.sentence)
    print(folder / "index.html")
    return 0 if all(verdict.holds for verdict in found) else 1


def _kept(variant: Variant) -> bool:
    """One reference leaves nothing to combine. LoRAs take most of the time: one number of
    references must do.
    """
    if variant.method in ("average", "concatenate"):
        return variant.references > 1
    return not variant.method.startswith("lora") or variant.references == LORA_COUNT


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


def arguments(options: Mapping[str, Any]) -> list[str]:
    """The command line of these options."""
    found = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            found.append(option)
        elif isinstance(value, tuple):
            found += [option, *map(str, value)]
        elif value not in (False, None):
            found += [option, str(value)]
    return found
