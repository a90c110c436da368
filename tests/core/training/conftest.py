"""A tiny SDXL directory, a tiny MLLM and drawn groups: enough to run every stage in seconds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image, ImageDraw
from sdxl_directory import write_sdxl_directory

from easyref_core.training.config import Settings, load_settings
from workshop.demo.tiny import write_tiny_set

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread, which is faster here."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class TrainingSet:
    """Folders of the fixture."""

    base: Path
    mllm: Path
    data: Path

    @property
    def records(self) -> Path:
        return self.data / "groups.json"


@pytest.fixture(scope="session")
def training_set(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    root = tmp_path_factory.mktemp("training")
    tiny = write_tiny_set(root / "tiny")
    base = write_sdxl_directory(root / "base", tiny)
    _draw_groups(root / "data")
    return TrainingSet(base, tiny / "mllm", root / "data")


def _draw_groups(folder: Path) -> None:
    """Six groups of four pictures of different sizes; each group has its colour."""
    folder.mkdir(parents=True)
    records = []
    for group in range(6):
        names = []
        for number in range(4):
            picture = Image.new("RGB", (72 + 8 * number, 80), (30 + 20 * number, 60, 90))
            colour = (40 * group, 220 - 30 * group, 120)
            corner = (8 + 4 * number, 10, 52 + 4 * number, 60)
            ImageDraw.Draw(picture).ellipse(corner, fill=colour)
            names.append(f"group{group}_{number}.png")
            picture.save(folder / names[-1])
        texts = [f"scene {group}", "a ball"]
        records.append({"image_file": names[1:], "text": texts, "target": names[0]})
    (folder / "groups.json").write_text(json.dumps(records))


ALL_PARTS = ["final_layers", "projector", "cross_attention", "mllm", "lora"]


@pytest.fixture
def recipe(training_set: TrainingSet, tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe; keyword `section_key` sets section.key."""

    def write(name: str = "recipe.yaml", **changes: Any) -> Path:
        content: dict[str, Any] = {
            "stage": "alignment",
            "seed": 3,
            "model": {
                "base": str(training_set.base),
                "mllm": str(training_set.mllm),
                "reference_tokens": 4,
                "lora_rank": 2,
            },
            "data": {
                "files": [str(training_set.records)],
                "root": str(training_set.data),
                "resolution": 64,
                "crop": "center",
                "image_size": 56,
                "workers": 0,
            },
            "optimiser": {
                "parts": list(ALL_PARTS),
                "steps": 4,
                "learning_rate": 1e-3,
                "batch_size": 2,
                "precision": "no",
                "gradient_checkpointing": False,
            },
            "output": {"folder": str(tmp_path / "run"), "save_every": 2, "trackers": []},
        }
        for key, value in changes.items():
            section, _, setting = key.partition("_")
            if setting and section in content:
                content[section][setting] = value
            else:
                content[key] = value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture
def settings(recipe: Callable[..., Path]) -> Callable[..., Settings]:
    """Settings of such a recipe."""

    def load(**changes: Any) -> Settings:
        return load_settings(recipe(**changes))

    return load
