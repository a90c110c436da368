"""Pipelines around the golden UNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
from diffusers import UNet2DConditionModel


@pytest.fixture(scope="module")
def vae() -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=1,
        layers_per_block=1,
    ).eval()


@pytest.fixture
def pipeline(vae: diffusers.AutoencoderKL) -> Callable[..., Any]:
    """A pipeline of a class around a UNet, without text encoders."""

    def make(kind: type, unet: UNet2DConditionModel, **parts: Any) -> Any:
        made = kind(
            vae=vae,
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=unet,
            scheduler=diffusers.EulerDiscreteScheduler(),
            add_watermarker=False,
            **parts,
        )
        made.set_progress_bar_config(disable=True)
        return made

    return make
