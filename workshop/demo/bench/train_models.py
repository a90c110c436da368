"""The command `bench-models`: trains what the benchmark scores and compares with."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from pydantic.dataclasses import dataclass

from easyref_core.errors import EasyRefError
from easyref_core.training.recipe import STRICT, Count, Int, parse_settings, read_recipe

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
        ip_adapter_pictures: the first so many, for the IP-Adapter.
    """

    pictures: Count
    seed: Int
    clip: Schedule
    dino: Schedule
    ip_adapter_pictures: Count
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
    """Train one part unless it is finished; returns its directory or file.

    Raises:
        EasyRefError: an unknown part, or the IP-Adapter before the CLIP that it needs.
    """
    from .clip import train_clip
    from .dino import train_dino
    from .drawn_pictures import drawn_pictures, first_pictures
    from .ip_adapter import train_ip_adapter

    settings = load_recipe(recipe)
    if part not in PARTS:
        raise EasyRefError(f"There is no part {part!r}. Choose one of {', '.join(PARTS)}.")
    pictures = drawn_pictures(settings.pictures, settings.seed, folder / "pictures.pt")
    print(f"training {part}", file=sys.stderr, flush=True)
    if part == "clip":
        return train_clip(pictures, settings.clip, folder / part, device)
    if part == "dino":
        return train_dino(pictures, settings.dino, folder / part, device)
    clip = folder / "clip" / "model"
    if not (clip / "model.safetensors").is_file():
        raise EasyRefError("The IP-Adapter reads images by the part clip; train that first.")
    fewer = first_pictures(pictures, settings.ip_adapter_pictures)
    return train_ip_adapter(fewer, clip, settings.ip_adapter, folder / part, device)
