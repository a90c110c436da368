"""The golden values of the UNet, and how it is asked."""

from __future__ import annotations

from typing import Any

import goldens
import torch
from diffusers import UNet2DConditionModel

from easyref_core.adapter.checkpoint import load_checkpoint
from easyref_core.tokens.reference_tokens import ReferenceTokens

TOLERANCE = 5e-5


def golden(name: str) -> torch.Tensor:
    return goldens.expected()[f"unet.{name}"]


def modules(model: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, type]]:
    """All parts by name, and what they are: to compare a model with itself later."""
    return {name: (module, type(module)) for name, module in model.named_modules()}


@torch.no_grad()
def predict(
    unet: UNet2DConditionModel,
    tokens: torch.Tensor | None,
    text: torch.Tensor | None = None,
    pooled: torch.Tensor | None = None,
) -> torch.Tensor:
    text = golden("text_states") if text is None else text
    pooled = golden("pooled_text") if pooled is None else pooled
    count = text.shape[0]
    return unet(
        golden("latents").repeat(count, 1, 1, 1),
        golden("timestep"),
        encoder_hidden_states=text if tokens is None else torch.cat((text, tokens), dim=1),
        added_cond_kwargs={
            "text_embeds": pooled,
            "time_ids": golden("time_ids").repeat(count, 1),
        },
    ).sample


def is_golden(unet: UNet2DConditionModel, tokens: str | None = "ref_tokens") -> bool:
    """Whether the golden adapter acts as it should, with its tokens or without any."""
    found = predict(unet, golden(tokens) if tokens else None)
    wanted = golden("noise_pred.scale_1.0" if tokens else "noise_pred.scale_0.0")
    return goldens.difference(found, wanted) <= TOLERANCE


def made(times: int = 1, **changes: Any) -> ReferenceTokens:
    """The golden tokens, repeated, which leaves attention to them unchanged."""
    given = {
        "cond": golden("ref_tokens").repeat(1, times, 1),
        "uncond": golden("uncond_ref_tokens").repeat(1, times, 1),
        "adapter": load_checkpoint(goldens.ADAPTER).identity,
    }
    return ReferenceTokens(**given | changes)
