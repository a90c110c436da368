"""Sampling with references under dynamic VRAM, on a stand-in for the GPU."""

from __future__ import annotations

import comfyhost
import dynamic_vram
from comfyhost import Pack
from dynamic_vram import Gpu

SIGMAS = (10.0, 4.0, 1.0)


def test_a_plain_model_is_sampled_without_waiting(pack: Pack, gpu: Gpu) -> None:
    guider = comfyhost.guider(comfyhost.golden_unet(pack), 7.5)
    first, *later = dynamic_vram.sample(gpu, guider, comfyhost.latents(), SIGMAS)
    assert first.moved > sum(record.moved for record in later)
    assert later[0] == later[1]  # ComfyUI moves the texts anew for each call
