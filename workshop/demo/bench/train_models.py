"""The command `bench-models`: trains what the benchmark scores and compares with."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from pydantic.dataclasses import dataclass

from easyref_core.errors import EasyRefError
from easyref_core.training.recipe import STRICT, Count, Int, parse_settings, read_recipe

from ..pretraining.steps import Schedule
from ..train import RECIPES

RECIPE = RECIPES / "bench_models.yaml"
RESULTS = {  # part -> directory or file in the work folder
    "clip": "clip/model",
    "dino": "dino/model",
    "ip_adapter": "ip_adapter/ip-adapter_sdxl.safetensors",
}
PARTS = tuple(RESULTS)


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


def train_part(
    part: str,
    folder: Path,
    device: torch.device | None = None,
    recipe: Path = RECIPE,
) -> Path:
    """Train one part unless it is finished; returns its directory or file.

    Args:
        device: the CPU by default.

    Raises:
        EasyRefError: an unknown part, or the IP-Adapter before the CLIP that it needs.
    """
    from .clip import train_clip
    from .dino import train_dino
    from .drawn_pictures import drawn_pictures, first_pictures
    from .ip_adapter import train_ip_adapter

    device = device or torch.device("cpu")
    settings = load_recipe(recipe)
    if part not in PARTS:
        raise EasyRefError(f"There is no part {part!r}. Choose one of {', '.join(PARTS)}.")
    if is_done(part, folder):
        return folder / RESULTS[part]
    clip = folder / RESULTS["clip"]
    if part == "ip_adapter" and not is_done("clip", folder):
        raise EasyRefError("The IP-Adapter reads images by the part clip; train that first.")
    pictures = drawn_pictures(settings.pictures, settings.seed, folder / "pictures.pt")
    print(f"training {part}", file=sys.stderr, flush=True)
    if part == "clip":
        return train_clip(pictures, settings.clip, folder / part, device)
    if part == "dino":
        return train_dino(pictures, settings.dino, folder / part, device)
    fewer = first_pictures(pictures, settings.ip_adapter_pictures)
    return train_ip_adapter(fewer, clip, settings.ip_adapter, folder / part, device)


def is_done(part: str, folder: Path) -> bool:
    """Whether a part's result is there; its last file is written last."""
    result = folder / RESULTS[part]
    return result.is_file() or (result / "preprocessor_config.json").is_file()


def copy_models(folder: Path, to: Path) -> Path:
    """Copy finished models to a folder for `bench --models`; returns that folder.

    Raises:
        EasyRefError: one is missing.
    """
    for part in PARTS:
        if not is_done(part, folder):
            raise EasyRefError(f"The part {part} is not trained yet. Train it first.")
    for name, part in (("clip", "clip"), ("dino", "dino")):
        shutil.copytree(folder / RESULTS[part], to / name, dirs_exist_ok=True)
    shutil.copy(folder / RESULTS["ip_adapter"], to)
    return to


def check_models(folder: Path) -> Iterator[str]:
    """How well CLIP and DINOv2 do their task on held-out characters, a sentence each; the benchmark
    itself tells of the IP-Adapter.
    """
    from .check_models import check_clip, check_dino, held_out_pictures

    drawn = held_out_pictures()
    yield _line("clip", check_clip(folder / RESULTS["clip"], drawn))
    yield _line("dino", check_dino(folder / RESULTS["dino"], drawn))


def _line(part: str, shares: Mapping[str, float]) -> str:
    return f"{part}: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
