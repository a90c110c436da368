"""ComfyUI's model patchers, by the class that this ComfyUI uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


def new_patcher(
    model: torch.nn.Module,
    load_device: torch.device,
    offload_device: torch.device,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """A patcher; newer cores have a subclass for models that they may load dynamically.

    Args:
        disable_dynamic: the plain class, for nodes that work on the weights themselves.
    """
    import comfy.model_patcher

    plain = comfy.model_patcher.ModelPatcher
    kind = plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)
    return kind(model, load_device=load_device, offload_device=offload_device)


def is_dynamic(patcher: ModelPatcher) -> bool:
    """Whether ComfyUI moves this model's weights one by one, when they are used."""
    dynamic = getattr(patcher, "is_dynamic", None)
    return dynamic is not None and dynamic()


def loads_dynamically() -> bool:
    """Whether this ComfyUI does so by default; weights may then stay in their file."""
    try:
        import comfy.memory_management
    except ImportError:  # an older core
        return False
    return getattr(comfy.memory_management, "aimdo_enabled", False)
