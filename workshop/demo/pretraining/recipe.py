"""The steps of everything that is pretrained: `recipes/demo/pretraining.yaml`, checked."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from pydantic.dataclasses import dataclass

from easyref_core.errors import EasyRefError
from easyref_core.training.recipe import STRICT, Count, parse_settings, read_recipe

from ..dataset.files import DatasetOptions
from .pictures import SIDE
from .steps import Schedule


@dataclass(frozen=True, config=STRICT)
class Pretraining:
    """All parts that come before EasyRef's own stages.

    Attributes:
        vae_details_from: step of the autoencoder's training from which details have more weight.
        base_pictures: number of drawn pictures that the base model and the ControlNet learn from.
    """

    data: DatasetOptions
    vae: Schedule
    mllm: Schedule
    base: Schedule
    controlnet: Schedule
    judge: Schedule
    decoder: Schedule
    base_pictures: Count
    vae_details_from: Count

    def schedules(self) -> dict[str, Schedule]:
        """Part -> its schedule."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Schedule)}


def load_pretraining(path: str | Path) -> Pretraining:
    """
    Raises:
        EasyRefError: no such file, not YAML, unknown or missing keys, values of a wrong type or
            out of range.
    """
    try:
        recipe = parse_settings(Pretraining, read_recipe(path))
        for part, schedule in recipe.schedules().items():
            before = schedule.warmup
            for restart in schedule.restarts:
                if not before < restart.step < schedule.steps:
                    raise EasyRefError(
                        f"{part}.restarts has step {restart.step}; it must be after step "
                        f"{before}, from where the rate falls, and before the end, "
                        f"{schedule.steps}."
                    )
                before = restart.step
        if recipe.data.pictures < 5:
            raise EasyRefError(
                f"data.pictures is {recipe.data.pictures}; it must be 5 or more: a target and 4 "
                "references."
            )
        if recipe.data.side != SIDE:
            raise EasyRefError(
                f"data.side is {recipe.data.side}; it must be {SIDE}, the models' size."
            )
    except EasyRefError as error:
        raise EasyRefError(f"{path}: {error}") from error
    return recipe
