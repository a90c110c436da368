"""The demo's ControlNet, for outlines."""

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
    edge_mask,
    noise_loss,
    time_ids,
)
from .pictures import DrawnPictures
from .steps import Schedule, run_steps
from .text_encoders import load_text_encoders

CONTROLNET = {**CONTROLNET_CONFIG, **SIZES}


class _ControlledUNet(nn.Module):
    """A frozen UNet with a ControlNet."""

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
    """Train a ControlNet for a base model; writes and returns its directory `folder`/model.

    Args:
        outlines: of the images' figures, [N, 3, S, S] uint8.
        latents: of the images.
        base: diffusers directory.
    """
    whole = {"torch_dtype": torch.float32, "local_files_only": True}
    unet = UNet2DConditionModel.from_pretrained(base / "unet", **whole)
    text = load_text_encoders(base)
    conditions = Conditions(pictures, text.tokenizers)
    edges = edge_mask(outlines)
    torch.manual_seed(schedule.seed)
    controlnet = ControlNetModel.from_config(CONTROLNET)
    _copy_shared_weights(unet, controlnet)
    controlnet.set_attn_processor(AttnProcessor())
    unet.set_attn_processor(AttnProcessor())
    model = _ControlledUNet(unet, controlnet).to(device)
    alphas_cumprod = DDPMScheduler(**NOISE).alphas_cumprod
    text.to(device)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        numbers, ids = conditions.batch(schedule.batch, generator)
        with torch.no_grad():
            states, pooled = text(*ids)
        hints = outlines[numbers].to(device).float() / 255

        def residuals(noisy: torch.Tensor, timesteps: torch.Tensor) -> dict[str, Any]:
            added = {"text_embeds": pooled, "time_ids": time_ids(len(noisy), device)}
            return control_residuals(controlnet, noisy, timesteps, states, hints, added)

        sample = latents[numbers], edges[numbers]
        return noise_loss(
            unet, *sample, states, pooled, alphas_cumprod, generator, device, residuals
        )

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
    """A ControlNet's residuals, as arguments of the UNet.

    Args:
        states: text states, [B, L, W].
        hints: [B, 3, S, S] in 0..1.
        added: SDXL's pooled text and time ids.
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


def _copy_shared_weights(unet: UNet2DConditionModel, controlnet: ControlNetModel) -> None:
    own = controlnet.state_dict()
    controlnet.load_state_dict(own | {n: w for n, w in unet.state_dict().items() if n in own})
