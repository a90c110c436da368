"""A tiny SDXL, EasyRef adapter and IP-Adapters in their real layouts, and drawn groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ip_adapter_files import (
    plain_projection,
    plus_projection,
    write_image_encoder,
    write_ip_adapter,
)
from PIL import Image, ImageDraw
from sdxl_directory import write_sdxl_directory

from easyref_core.evaluation.groups import GroupPicture
from easyref_core.evaluation.methods import USES
from easyref_core.evaluation.methods.pipeline import GenerationPipeline
from easyref_core.evaluation.methods.settings import GenerationSettings, LoraSettings
from easyref_core.evaluation.trials import Trial, Variant
from easyref_core.training.records import PictureSource
from workshop.demo.tiny import write_tiny_set

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

STEPS = 2


@dataclass(frozen=True)
class TinyModels:
    """Files of the fixture."""

    base: Path
    mllm: Path
    adapter: Path
    ip_adapter: Path
    ip_adapter_plus: Path
    image_encoder: Path
    pictures: Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    root = tmp_path_factory.mktemp("methods")
    models = write_tiny_set(root / "tiny")
    base = write_sdxl_directory(root / "base", models)
    pictures = root / "pictures"
    pictures.mkdir()
    for group in range(3):
        for number in range(3):
            picture = Image.new("RGB", (72 + 8 * number, 80), (60 * group, 20, 90))
            ImageDraw.Draw(picture).ellipse((8, 10 + 5 * number, 52, 60), fill=(90, 80 * group, 9))
            picture.save(pictures / f"{group}_{number}.png")
    return TinyModels(
        base,
        models / "mllm",
        models / "easyref.safetensors",
        write_ip_adapter(root / "ip.safetensors", base, plain_projection),
        write_ip_adapter(root / "ip_plus.safetensors", base, plus_projection),
        write_image_encoder(root / "image_encoder"),
        pictures,
    )


@pytest.fixture(scope="session")
def settings(tiny: TinyModels) -> GenerationSettings:
    return GenerationSettings(
        base=tiny.base,
        adapter=tiny.adapter,
        mllm=tiny.mllm,
        ip_adapter=tiny.ip_adapter,
        image_encoder=tiny.image_encoder,
        size=64,
        lora=LoraSettings(rank=2, steps=2, learning_rate=1e-2),
    )


@pytest.fixture(scope="session")
def base(settings: GenerationSettings) -> GenerationPipeline:
    """The tiny SDXL; every method leaves it as it was."""
    return GenerationPipeline(settings)


@pytest.fixture(scope="session")
def make_trial(tiny: TinyModels) -> Callable[..., Trial]:
    """A trial of a method; keywords are fields of its variant."""

    def make(method: str, group: int = 0, seed: int = 1, count: int = 2, **fields: Any) -> Trial:
        if "image_size" in USES[method]:
            fields = {"image_size": 56, **fields}  # seconds faster than the adapter's own
        references = tuple(
            GroupPicture(PictureSource(tiny.pictures / f"{group}_{number}.png"), f"a ball {number}")
            for number in range(count)
        )
        return Trial(
            variant=replace(Variant(method, steps=STEPS), **fields),
            label=method,
            path=f"{method}/{group}/{seed}",
            group=f"group {group}",
            split="",
            kind="",
            references=references,
            targets=(),
            prompt=f"a ball on a hill {group}",
            seed=seed,
        )

    return make


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small take several times longer on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
