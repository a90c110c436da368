"""Models for the checks: random weights of released size, and the golden models."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from comfyhost import GOLDEN, GOLDEN_MLLM, Pack
from goldens import ADAPTER, MLLM, UNET
from safetensors.torch import save_file

from ..random_models import random_weights, unet_shapes, write_adapter

UNETS = "models/diffusion_models"


@dataclass(frozen=True)
class ModelSet:
    """Models by their names in ComfyUI's lists, and sizes that fit them.

    Attributes:
        context, pooled: widths of text states and pooled text embedding.
        latent: side of a square latent, in latent pixels.
        image_size: for EasyRef Encode; 0: as trained.
        few, many: numbers of references to encode.
        sides: smallest and largest side of reference images, in pixels.
    """

    adapter: str
    mllm: str
    unet: str
    context: int
    pooled: int
    latent: int
    image_size: int
    few: int
    many: int
    sides: tuple[int, int]


REAL = ModelSet(
    adapter="random.safetensors",
    mllm="from adapter",
    unet="sdxl.safetensors",
    context=2048,
    pooled=1280,
    latent=128,
    image_size=0,
    few=8,
    many=64,
    sides=(448, 1024),
)
SMALL = ModelSet(
    adapter=GOLDEN,
    mllm=GOLDEN_MLLM,
    unet="golden.safetensors",
    context=96,
    pooled=32,
    latent=16,
    image_size=84,
    few=2,
    many=4,
    sides=(80, 160),
)


def write_small(pack: Pack) -> None:
    """Put the golden models into ComfyUI's folders, the UNet as one file."""
    for source, folder, name in (
        (ADAPTER, "easyref", SMALL.adapter),
        (MLLM, "LLM", SMALL.mllm),
    ):
        place = pack.base / "models" / folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            os.symlink(source, place)
    path = pack.base / UNETS / SMALL.unet
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        load = pack.part("nodes.host.demo_models").load_unet_directory
        _save(load(UNET, torch.float32).model.diffusion_model.state_dict(), path)


def write_real(pack: Pack, device: torch.device) -> None:
    """Write adapter (5.5 GB) and UNet (5.1 GB, in float16, as SDXL is published)."""
    adapter = pack.base / "models" / "easyref" / REAL.adapter
    if not adapter.exists():
        _write_whole(adapter, lambda path: write_adapter(path, device))
    unet = pack.base / UNETS / REAL.unet
    if not unet.exists():
        unet.parent.mkdir(parents=True, exist_ok=True)
        weights = dict(random_weights(unet_shapes(), torch.float16, device, seed=1))
        _write_whole(unet, lambda path: _save(weights, path))


@contextmanager
def small_unet_recognised(pack: Pack) -> Iterator[None]:
    """Let ComfyUI's loaders accept the golden UNet as an SDXL of its size."""
    import comfy.model_detection
    import comfy.supported_models
    from safetensors import safe_open

    layout = pack.part("nodes.host.diffusers_layout")
    config = layout.read_config(UNET)
    with safe_open(pack.base / UNETS / SMALL.unet, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    detected = comfy.model_detection.detect_unet_config(weights, "")
    heads = layout.comfy_unet_config(config, str(UNET))["num_head_channels"]

    class GoldenSDXL(comfy.supported_models.SDXL):
        unet_config: ClassVar = {
            name: detected[name]
            for name in ("model_channels", "context_dim", "adm_in_channels", "transformer_depth")
        }
        unet_extra_config: ClassVar = {"num_heads": -1, "num_head_channels": heads}

        def get_model(self, *args: Any, **kwargs: Any) -> Any:
            model = super().get_model(*args, **kwargs)
            model.embedder = type(model.embedder)(config["addition_time_embed_dim"])
            return model

    known = comfy.supported_models.models
    known.insert(0, GoldenSDXL)
    try:
        yield
    finally:
        known.remove(GoldenSDXL)


def _save(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path)


def _write_whole(path: Path, write: Any) -> None:
    """Write to a temporary name first, so that a killed process leaves no partial file."""
    unfinished = path.with_suffix(".unfinished")
    write(unfinished)
    unfinished.rename(path)
