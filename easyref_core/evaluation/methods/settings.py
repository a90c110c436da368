"""What all methods generate with: the base model, files, and settings that all of them share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..settings import BenchSettings

# Of the official demo.
NEGATIVE = "A collage of images, monochrome, lowres, bad anatomy, worst quality, low quality"


@dataclass(frozen=True)
class LoraSettings:
    """How a LoRA is trained on a group's references.

    Attributes:
        rank: the paper's is 32.
        steps: optimiser steps.
        batch: references a step.
    """

    rank: int = 32
    steps: int = 500
    learning_rate: float = 1e-4
    batch: int = 1
    seed: int = 0


@dataclass(frozen=True)
class GenerationSettings:
    """Models and settings of a run; trials hold the rest.

    Attributes:
        base: SDXL, a diffusers directory or one .safetensors file.
        base_config: diffusers directory of an SDXL from which a single file takes configurations
            and tokenizers (weights are not needed there); None for the hub's cache.
        adapter, mllm: EasyRef adapter file, Qwen2-VL directory.
        ip_adapter, image_encoder: IP-Adapter file and its CLIP vision directory.
        size: of the generated images, in pixels.
        negative: negative prompt.
        dtype: of weights and computation: float32, bfloat16 or float16. VAE and LoRA training keep
            float32 where they need it.
        offload: keep the MLLM in the computer's memory while images are sampled.
    """

    base: Path
    base_config: Path | None = None
    adapter: Path | None = None
    mllm: Path | None = None
    ip_adapter: Path | None = None
    image_encoder: Path | None = None
    size: int = 1024
    negative: str = NEGATIVE
    device: str = "cpu"
    dtype: str = "float32"
    offload: bool = False
    lora: LoraSettings = field(default_factory=LoraSettings)


def generation_settings(settings: BenchSettings, device: torch.device) -> GenerationSettings:
    """What a run's settings say of models and sampling."""

    def path(name: str) -> Path | None:
        return Path(name) if name else None

    return GenerationSettings(
        base=Path(settings.base),
        base_config=path(settings.base_config),
        adapter=path(settings.adapter),
        mllm=path(settings.mllm),
        ip_adapter=path(settings.ip_adapter),
        image_encoder=path(settings.image_encoder),
        size=settings.size,
        negative=NEGATIVE if settings.negative is None else settings.negative,
        device=str(device),
        dtype=settings.dtype,
        offload=settings.offload,
        lora=LoraSettings(settings.lora_rank, settings.lora_steps, seed=settings.seed),
    )
