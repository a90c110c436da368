"""The demo set as an SDXL that diffusers' pipelines load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from ..pretraining.base import NOISE
from ..stored_text import load_text
from ..stored_weights import load_stored
from ..tiny_weights import write_json


def demo_pipeline(models: Path) -> StableDiffusionXLPipeline:
    """The pipeline of a model set, in float32.

    Its scheduler is that of `DemoModels`, except that the pipeline starts from noise of variance 1,
    not from that of the first timestep, 0.995.
    """
    text = load_text(models / "text_encoders")
    parts: dict[str, Any] = {
        "vae": load_stored(AutoencoderTiny, models / "vae"),
        "unet": load_stored(UNet2DConditionModel, models / "unet"),
        "text_encoder": text.small,
        "text_encoder_2": text.large,
        "tokenizer": text.tokenizers.small,
        "tokenizer_2": text.tokenizers.large,
        "scheduler": DDIMScheduler(**NOISE, set_alpha_to_one=True),
    }
    # An empty negative prompt was trained; one of zeros was not.
    return StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=False)


def write_sdxl(models: Path, to: Path) -> Path:
    """Write a model set as a diffusers directory; returns `to`."""
    demo_pipeline(models).save_pretrained(to)
    vae = to / "vae" / "config.json"
    config = json.loads(vae.read_text(encoding="utf-8"))
    config.pop("block_out_channels", None)  # diffusers writes it, and warns when reading it
    write_json(vae, config)
    return to
