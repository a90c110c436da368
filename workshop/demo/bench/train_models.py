"""The command `bench-models`: trains what the benchmark scores and compares with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic.dataclasses import dataclass

from easyref_core.errors import EasyRefError
from easyref_core.training.recipe import STRICT, Count, Int, parse_settings, read_recipe

from ..pretraining.pictures import DrawnPictures
from ..pretraining.steps import Schedule
from ..train import RECIPES

RECIPE = RECIPES / "bench_models.yaml"
PARTS = ("clip", "dino", "ip_adapter")


@dataclass(frozen=True, config=STRICT)
class BenchModels:
    """
    Attributes:
        pictures: how many are drawn, of training characters and styles.
        seed: of the drawing.
    """

    pictures: Count
    seed: Int
    clip: Schedule
    dino: Schedule
    ip_adapter: Schedule


def load_recipe(path: Path = RECIPE) -> BenchModels:
    """
    Raises:
        EasyRefError: no such file, not YAML, keys or values that are not known.
    """
    try:
        return parse_settings(BenchModels, read_recipe(path))
    except EasyRefError as error:
        raise EasyRefError(f"{path}: {error}") from error


def train_part(part: str, folder: Path, device: torch.device, recipe: Path = RECIPE) -> Path:
    """Train one part unless it is finished; returns its directory.

    Raises:
        EasyRefError: an unknown part, or the IP-Adapter before the CLIP it needs.
    """
    from ..pretraining.steps import run_steps  # noqa: F401
    from .clip import train_clip
    from .dino import train_dino
    from .drawn_pictures import drawn_pictures

    trainers: dict[str, Callable[[DrawnPictures, Schedule, Path, torch.device], Path]] = {
        "clip": train_clip,
        "dino": train_dino,
    }
    settings = load_recipe(recipe)
    pictures = drawn_pictures(settings.pictures, settings.seed, folder / "pictures.pt")
    print(f"training {part}", file=sys.stderr, flush=True)
    return trainers[part](pictures, getattr(settings, part), folder / part, device)
