"""How much of everything is trained: `recipes/demo/pretraining.yaml`, checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from easyref_core.errors import EasyRefError
from easyref_core.training.config import build, read_recipe

from ..dataset.files import DatasetOptions
from .pictures import SIDE
from .steps import Schedule


@dataclass(frozen=True)
class Pretraining:
    """All parts that come before EasyRef's own stages.

    Attributes:
        base_pictures: so many of the drawn pictures teach the base model and the ControlNet.
    """

    data: DatasetOptions
    vae: Schedule
    mllm: Schedule
    base: Schedule
    controlnet: Schedule
    judge: Schedule
    decoder: Schedule
    base_pictures: int


def load_pretraining(path: str | Path) -> Pretraining:
    """
    Raises:
        EasyRefError: no such file, not YAML, unknown or missing keys, values of a wrong kind or
            out of range.
    """
    recipe = build(Pretraining, read_recipe(path), "")
    for name, value, fits, wanted in _limits(recipe):
        if not fits:
            raise EasyRefError(f"{path}: {name} is {value}; it must be {wanted}.")
    return recipe


def _limits(recipe: Pretraining) -> Iterator[tuple[str, object, bool, str]]:
    """(name, value, whether it fits, what would)"""
    for part in fields(recipe):
        schedule = getattr(recipe, part.name)
        if isinstance(schedule, Schedule):
            for name in ("steps", "batch", "learning_rate"):
                value = getattr(schedule, name)
                yield f"{part.name}.{name}", value, value > 0, "more than 0"
            for name in ("ema", "beta"):
                value = getattr(schedule, name)
                yield f"{part.name}.{name}", value, 0 <= value < 1, "from 0 to less than 1"
            restart, after = schedule.restart, schedule.warmup
            fits = restart == 0 or after < restart < schedule.steps
            wanted = f"0, or between the warm-up's {after} steps and {schedule.steps}"
            yield f"{part.name}.restart", restart, fits, wanted
    yield "base_pictures", recipe.base_pictures, recipe.base_pictures > 0, "more than 0"
    data = recipe.data
    yield "data.pictures", data.pictures, data.pictures >= 5, "5 or more: a target, 4 references"
    yield "data.side", data.side, data.side == SIDE, f"{SIDE}, which the models are made for"
