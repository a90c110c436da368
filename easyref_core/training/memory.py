"""What a run will need of a device's memory, before its first step."""

from __future__ import annotations

from collections import Counter

import torch

from ..errors import EasyRefError
from .config import PARTS, Settings
from .model import TrainedModel, part_of

_ADAM_BYTES = 4 + 4 + 4  # gradient and two moments, float32


def parameters_by_part(model: TrainedModel) -> dict[str, tuple[int, int]]:
    """Part -> (parameters, of which trained); "base" is the frozen UNet."""
    total: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = part_of(model.official_name(name)) or "base"
        total[part] += parameter.numel()
        trained[part] += parameter.numel() if parameter.requires_grad else 0
    return {part: (total[part], trained[part]) for part in (*PARTS, "base") if total[part]}


def estimate_bytes(model: TrainedModel, settings: Settings) -> dict[str, int]:
    """Weights, optimiser and (roughly) activations of one process.

    Activations: with gradient checkpointing the inputs of every UNet block, without it about
    eight times that; measured shapes of SDXL, scaled by the latent's area.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    optimiser = sum(p.numel() for p in model.parameters() if p.requires_grad) * _ADAM_BYTES
    area = (settings.data.resolution // 8) ** 2
    channels = sum(model.unet.config.block_out_channels)
    width = 2 if settings.optimiser.precision != "no" else 4
    kept = 4 if settings.optimiser.gradient_checkpointing else 32
    activations = settings.optimiser.batch_size * area * channels * width * kept
    return {"weights": weights, "optimiser": optimiser, "activations": activations}


def check_fits(needed: dict[str, int], device: torch.device) -> None:
    """Raise EasyRefError where a GPU's free memory is less than the estimate."""
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    total = sum(needed.values())
    if total > free:
        parts = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in needed.items())
        raise EasyRefError(
            f"This run needs about {total / 1e9:.1f} GB ({parts}), but {device} has "
            f"{free / 1e9:.1f} GB free. Lower optimiser.batch_size and raise accumulation, turn "
            "on gradient_checkpointing, or use several GPUs with ZeRO-2."
        )
