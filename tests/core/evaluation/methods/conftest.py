"""A tiny SDXL, EasyRef adapter and IP-Adapters in their real layouts, and drawn groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
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
EMBEDDING, HIDDEN = 24, 32  # widths of the tiny image encoder


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


def write_ip_adapter(
    path: Path, base: Path, projection: Callable[[int], dict[str, tuple[int, ...]]], **changes: Any
) -> Path:
    """An IP-Adapter with random weights for the UNet of `base`.

    Args:
        projection: context width -> shapes of the image projection's weights.
        changes: of the UNet's configuration.
    """
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(base / "unet") | changes
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    shapes = {f"image_proj.{n}": s for n, s in projection(config["cross_attention_dim"]).items()}
    names = [n.removesuffix(".processor") for n in unet.attn_processors]
    for number, name in enumerate(names):
        if name.endswith("attn2"):
            for part in ("to_k", "to_v"):
                weight = unet.get_submodule(f"{name}.{part}").weight
                shapes[f"ip_adapter.{number}.{part}_ip.weight"] = tuple(weight.shape)
    generator = torch.Generator().manual_seed(5)
    weights = {n: 0.3 * torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    save_file(weights, path)
    return path


def plain_projection(width: int) -> dict[str, tuple[int, ...]]:
    """As in ip-adapter_sdxl.safetensors."""
    return {
        "proj.weight": (4 * width, EMBEDDING),
        "proj.bias": (4 * width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }


def plus_projection(width: int) -> dict[str, tuple[int, ...]]:
    """As in ip-adapter-plus_sdxl_vit-h.safetensors: a resampler of four layers."""
    inner = 64  # one head
    shapes: dict[str, tuple[int, ...]] = {"latents": (1, 3, inner)}
    for name, outputs, inputs in (("proj_in", inner, HIDDEN), ("proj_out", width, inner)):
        shapes |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    shapes |= {"norm_out.weight": (width,), "norm_out.bias": (width,)}
    for layer in (f"layers.{number}" for number in range(4)):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"{layer}.{norm}.{part}": (inner,) for part in ("weight", "bias")}
        shapes |= {
            f"{layer}.0.to_q.weight": (inner, inner),
            f"{layer}.0.to_kv.weight": (2 * inner, inner),
            f"{layer}.0.to_out.weight": (inner, inner),
            f"{layer}.1.1.weight": (4 * inner, inner),
            f"{layer}.1.3.weight": (inner, 4 * inner),
        }
    return shapes


def write_image_encoder(folder: Path, **changes: Any) -> Path:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "projection_dim": EMBEDDING,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    with torch.random.fork_rng([]):
        torch.manual_seed(6)
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes | changes))
    for weight in model.parameters():
        weight.data *= 3  # CLIP's initial weights are so small that all pictures look alike
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small take several times longer on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
