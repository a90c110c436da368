"""How much of everything is trained: `recipes/demo/pretraining.yaml`, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...training.config import build, read_recipe
from ..dataset.files import DatasetOptions
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
        EasyRefError: no such file, not YAML, unknown or missing keys, values of a wrong kind.
    """
    return build(Pretraining, read_recipe(path), "")
