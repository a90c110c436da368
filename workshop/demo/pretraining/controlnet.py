"""The demo's ControlNet: draws what an outline shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from ..tiny_unet import CONTROLNET_CONFIG
from ..tiny_weights import write_json, write_tensors
from .base import (
    NOISE,
    SIZES,
    Conditions,
    edge_places,
    load_text_encoders,
    noise_loss,
    size_numbers,
)
from .pictures import DrawnPictures
from .steps import Schedule, run_steps

CONTROLNET = {**CONTROLNET_CONFIG, **SIZES}


class _Steered(nn.Module):
    """A frozen UNet with a ControlNet at its side."""

    def __init__(self, unet: UNet2DConditionModel, controlnet: ControlNetModel) -> None:
        super().__init__()
        self.unet = unet.requires_grad_(False)
        self.controlnet = controlnet


def train_controlnet(
    pictures: DrawnPictures,
    outlines: torch.Tensor,
    latents: torch.Tensor,
    base: Path,
    schedule: Schedule,
    folder: Path,
    device: torch.device,
) -> Path:
    """Train a ControlNet for a base model and write its directory to `folder`/model, returned.

    Args:
        outlines: of the pictures' figures, [N, 3, S, S] uint8.
        latents: of the pictures.
        base: diffusers directory.
    """
    unet = UNet2DConditionModel.from_pretrained(base / "unet", torch_dtype=torch.float32)
    text = load_text_encoders(base)
    conditions = Conditions(pictures, text.tokenizers)
    edges = edge_places(outlines)
    torch.manual_seed(schedule.seed)
    controlnet = ControlNetModel.from_config(CONTROLNET)
    _start_from(controlnet, unet)
    controlnet.set_attn_processor(AttnProcessor())
    unet.set_attn_processor(AttnProcessor())
    model = _Steered(unet, controlnet).to(device)
    noise_levels = DDPMScheduler(**NOISE).alphas_cumprod
    text.to(device)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        numbers, ids = conditions.batch(schedule.batch, generator)
        with torch.no_grad():
            states, pooled = text(*ids)
        hints = outlines[numbers].to(device).float() / 255

        def residuals(noisy: torch.Tensor, timesteps: torch.Tensor) -> dict[str, Any]:
            sizes = size_numbers(len(noisy), device)
            added = {"text_embeds": pooled, "time_ids": sizes}
            return control_residuals(controlnet, noisy, timesteps, states, hints, added)

        shown = latents[numbers], edges[numbers]
        return noise_loss(unet, *shown, states, pooled, noise_levels, generator, device, residuals)

    run_steps(model, loss, schedule, folder, device)
    directory = folder / "model"
    write_json(directory / "config.json", CONTROLNET)
    path = directory / "diffusion_pytorch_model.safetensors"
    write_tensors(path, controlnet.state_dict(), torch.float16)
    return directory


def control_residuals(
    controlnet: ControlNetModel,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    states: torch.Tensor,
    hints: torch.Tensor,
    added: dict[str, torch.Tensor],
    strength: float = 1.0,
) -> dict[str, Any]:
    """What a ControlNet adds to the UNet, as arguments of its call.

    Args:
        states: of the text only, [B, L, W].
        hints: [B, 3, S, S] in 0..1.
        added: SDXL's pooled text and sizes.
    """
    down, middle = controlnet(
        noisy,
        timesteps,
        states,
        hints,
        conditioning_scale=strength,
        added_cond_kwargs=added,
        return_dict=False,
    )
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


def _start_from(controlnet: ControlNetModel, unet: UNet2DConditionModel) -> None:
    """What both have starts as the UNet has it."""
    known = unet.state_dict()
    own = controlnet.state_dict()
    controlnet.load_state_dict({name: known[name] if name in known else own[name] for name in own})
