"""What the command `bench` is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyref_core.demo_set import TRAINED_SET

from ..rows import SamplingSettings

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
SCORE_MODELS = TRAINED_SET / "score"
CLIP, DINO, IP_ADAPTER = "clip", "dino", "ip-adapter_sdxl.safetensors"
LORA_STEPS = 80


@dataclass(frozen=True)
class BenchOptions:
    """
    Attributes:
        out: folder of everything: groups, the base model as a directory, the run in "run".
        models: folder of `CLIP`, `DINO` and `IP_ADAPTER`; those of the repository by default.
        table: a name of `tables.TABLES`.
        groups: of each split and kind; 0 for the table's number.
        counts: of references; empty for the table's.
        methods: names of `easyref bench`; empty for the table's.
        adapters: "NAME=FILE", in place of those that the table compares.
    """

    out: Path
    models: Path | None = None
    table: str = "methods"
    groups: int = 0
    steps: int = SamplingSettings().steps
    counts: tuple[int, ...] = ()
    methods: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    lora_steps: int = LORA_STEPS
    overwrite: bool = False

    def model(self, name: str) -> Path:
        """`CLIP`, `DINO` or `IP_ADAPTER`."""
        own = WEIGHTS if name == IP_ADAPTER else SCORE_MODELS
        return (self.models or own) / name


def arguments(options: Mapping[str, Any]) -> list[str]:
    """The command line of these options."""
    found = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            found.append(option)
        elif isinstance(value, tuple):
            found += [option, *map(str, value)] if value else []
        elif value not in (False, None):
            found += [option, str(value)]
    return found
