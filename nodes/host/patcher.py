"""ComfyUI's handle on a model, whichever class this core wants for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


def new_patcher(
    model: torch.nn.Module, load_device: torch.device, offload_device: torch.device
) -> ModelPatcher:
    """Newer cores want their own subclass for models that they may load dynamically."""
    import comfy.model_patcher

    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return kind(model, load_device=load_device, offload_device=offload_device)
