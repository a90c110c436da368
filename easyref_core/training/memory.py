"""An estimate of the device memory that a run needs, before its first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..adapter.layer_pooling import POOLS
from ..encode.layer_pooling import chunk_length
from ..errors import EasyRefError
from ..out_of_memory import lack_of_memory
from ..pictures.sizes import MERGE, PATCH
from ..sdxl_diffusers.unet_layers import attentions, is_cross_attention, widths
from ..untrusted import escaped
from .base import Base
from .config import PARTS, Settings
from .model import TrainedModel, part_of

SMALLER = (
    "Lower optimiser.batch_size and raise accumulation, turn on gradient_checkpointing, set ema to "
    "null, or use several GPUs with ZeRO-2."
)
# Part -> (plain, with gradient checkpointing): activations stored for the backward pass per element
# of a layer's input (of a level's, in the UNet). Measured by benchmarks/training_memory.py.
FACTORS = {
    "UNet": (84.11, 6.65),
    "vision tower": (22.66, 1.16),
    "decoder": (37.27, 1.0),
    "layer pooling": (22.67, 1.0),
}
# The same for identity, per element of the inputs of all self-attention layers, for the sample and
# again for each reference; then with gradient checkpointing, for each reference: these inputs, keys
# and values. tests/core/training/test_training_identity.py counts them.
_IDENTITY, _IDENTITY_KEPT = 3.1, 3.0
_UNET_BLOCKS = 20  # the largest block stores a 20th of all
_ADAM_BYTES = 4 + 4 + 4  # gradient and two moments, float32
_CHAT = 100  # about as many prompt tokens beside those of the images


def parameters_by_part(model: TrainedModel) -> dict[str, tuple[int, int]]:
    """Part -> (parameters, of which trained); "base" is the frozen UNet."""
    total: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = part_of(model.checkpoint_name(name)) or "base"
        total[part] += parameter.numel()
        trained[part] += parameter.numel() if parameter.requires_grad else 0
    return {part: (total[part], trained[part]) for part in (*PARTS, "base") if total[part]}


def estimate_bytes(
    model: TrainedModel,
    base: Base,
    settings: Settings,
    references: int,
    shards: tuple[int, int] = (1, 1),
) -> dict[str, int]:
    """Bytes that one process needs, by purpose.

    Args:
        references: images of the largest group.
        shards: over how many processes the weights, and the optimiser's state, are sharded.
    """
    optimiser = settings.optimiser
    width = 4 if optimiser.precision == "no" else 2
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) // shards[0]
    if width == 2:
        weights += trained * width  # autocast's copies
    frozen = sum(p.numel() * 4 for p in base.vae.parameters())
    frozen += sum(p.numel() * width for e in base.text_encoders for p in e.parameters())
    needed = {
        "weights": weights + frozen,
        "optimiser": trained * _ADAM_BYTES // shards[1],
        "activations": round(_activations(model, settings, references) * width),
    }
    if optimiser.ema is not None:
        needed["average"] = trained * 4
    return needed


def _activations(model: TrainedModel, settings: Settings, references: int) -> float:
    """Number of activations that are stored for the backward pass."""
    config, parts = model.encoder.config, settings.optimiser.parts
    patches = references * (settings.data.image_size // PATCH) ** 2
    length = patches // MERGE**2 + _CHAT + model.encoder.num_tokens
    # Frozen layers with no trained one before them store nothing.
    layers = config.num_layers if "mllm" in parts else len(model.encoder.mllm_final_layer.layers)
    depth = config.vision.depth if "mllm" in parts else 0
    pools, trains_pools = model.encoder.mllm_layer_pooling, {"layer_pooling", "mllm"} & {*parts}
    states = 0
    if pools is not None and settings.model.aggregation in POOLS and trains_pools:
        states = len(pools.sizes.layers)
    chunk = chunk_length(max(1, states), config.hidden_size, model.encoder.compute_dtype)
    area, levels = (settings.data.resolution // 8) ** 2, settings.optimiser.noise_levels
    stored = {  # part -> (elements, blocks)
        "UNet": (area * sum(model.unet.config.block_out_channels) * levels, _UNET_BLOCKS),
        "vision tower": (patches * config.vision.embed_dim * depth, depth),
        "decoder": (length * config.hidden_size * layers, layers),
        "layer pooling": (length * config.hidden_size * states, length // chunk),
    }
    total = 0.0
    for name, (unit, blocks) in stored.items():
        plain, checkpointed = FACTORS[name]
        if settings.optimiser.gradient_checkpointing:
            # Plus those of the one block that is recomputed.
            total += unit * (checkpointed + plain / max(1, blocks))
        else:
            total += unit * plain
    if own := settings.model.identity_references:
        unit = levels * _self_attention_inputs(model, area)
        recomputed = 1 / _UNET_BLOCKS if settings.optimiser.gradient_checkpointing else 1.0
        total += unit * _IDENTITY * (1 + own) * recomputed
        if settings.optimiser.gradient_checkpointing:
            total += unit * _IDENTITY_KEPT * own
    return settings.optimiser.batch_size * total


def _self_attention_inputs(model: TrainedModel, area: int) -> int:
    """Elements of the inputs of all self-attention layers, for latents of `area` positions."""
    deepest = len(model.unet.config.block_out_channels) - 1
    elements = 0
    for name, attn in attentions(model.unet).items():
        side, _, rest = name.partition("_blocks.")
        number = int(rest.partition(".")[0] or 0)
        depth = {"down": number, "up": deepest - number}.get(side, deepest)
        if not is_cross_attention(name):
            elements += area // 4**depth * widths(attn)[0]
    return elements


def check_fits(needed: dict[str, int], device: torch.device) -> None:
    """
    Raises:
        EasyRefError: a GPU's free memory, or on a CPU all memory, is less than the estimate.
    """
    if device.type == "cuda":
        has = torch.cuda.mem_get_info(device)[0]
        room = f"{device} has {has / 1e9:.1f} GB free"
    elif device.type == "cpu":
        import psutil

        has = psutil.virtual_memory().total
        room = f"this computer has {has / 1e9:.1f} GB"
    else:
        return
    total = sum(needed.values())
    if total > has:
        parts = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in needed.items())
        raise EasyRefError(
            f"This run needs about {total / 1e9:.1f} GB ({parts}), but {room}. {SMALLER}"
        )


@contextmanager
def explaining_lack_of_memory() -> Iterator[None]:
    """
    Raises:
        EasyRefError: in place of whatever says that a GPU or the computer ran out of memory.
    """
    try:
        yield
    except Exception as error:
        reason = lack_of_memory(error)
        if reason is None:
            raise
        raise EasyRefError(f"There is not enough memory ({escaped(reason)}). {SMALLER}") from error
