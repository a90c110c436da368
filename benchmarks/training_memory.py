"""Memory of tensors saved for the backward pass at real size, counted without computing.

Runs SDXL's UNet with an adapter, Qwen2-VL-2B's vision tower, its decoder layers and a pool over
their hidden states on PyTorch's meta device, in bfloat16, and sums the tensors saved for the
backward pass. Attention counts as a fused kernel, which saves its inputs and its result.

    python benchmarks/training_memory.py

Prints one JSON object. Each "factor" is bytes over the unit that `easyref_core.training.memory`
multiplies by a constant; tests/core/training compare factor and constant.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from easyref_core.adapter.layer_pooling import PoolingSizes, new_sizes
from easyref_core.encode.layer_pooling import LayerPools
from easyref_core.qwen2vl.config import MllmConfig
from easyref_core.qwen2vl.decoder import DecoderLayer, rope
from easyref_core.qwen2vl.vision import VisionTower
from easyref_core.sdxl_diffusers.adapter import new_adapter

META, HALF = torch.device("meta"), torch.bfloat16
_WIDTH = HALF.itemsize
SIDE, PATCHES, LENGTH = (
    128,
    576,
    1024,
)  # side of a latent; patches per image; length of a token sequence
SDXL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


class _Fused(torch.autograd.Function):
    """Attention that saves what a fused kernel saves; only its forward pass is run."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


class _SavedTensors:
    """Counts bytes of tensors saved for the backward pass: each storage once, weights excluded."""

    def __init__(self, module: nn.Module) -> None:
        self._weights = {p.untyped_storage()._cdata for p in module.parameters()}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def add(self, tensor: object) -> None:
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._weights:
                self._storages[storage._cdata] = storage

    def checkpointed(self, module: Callable[..., Any], *inputs: Any) -> Any:
        """Run a block under gradient checkpointing: only its inputs are saved."""
        for tensor in inputs:
            self.add(tensor)
        return checkpoint(module, *inputs, use_reentrant=False)

    def count(self, run: Callable[[], Any]) -> int:
        """Bytes saved by a forward pass."""

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            self.add(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = run()
        del result
        return sum(storage.nbytes() for storage in self._storages.values())


def unet_bytes(checkpointing: bool, side: int = SIDE) -> tuple[int, int]:
    """(bytes saved for one sample, unit of the factor)"""
    from diffusers import UNet2DConditionModel

    with META:
        unet = UNet2DConditionModel(**SDXL).requires_grad_(False)
        new_adapter(unet, num_tokens=64, rank=128)
    for parameter in unet.parameters():
        parameter.data = parameter.data.to(HALF)
    saved = _SavedTensors(unet)
    if checkpointing:
        unet.train()
        unet.enable_gradient_checkpointing(saved.checkpointed)
    states = torch.empty(1, 77 + 64, 2048, device=META, dtype=HALF, requires_grad=True)
    added = {"text_embeds": (1, 1280), "time_ids": (1, 6)}
    conditions = {n: torch.empty(s, device=META, dtype=HALF) for n, s in added.items()}
    noisy = torch.empty(1, 4, side, side, device=META, dtype=HALF)
    time = torch.empty(1, device=META)
    count = saved.count(lambda: unet(noisy, time, states, added_cond_kwargs=conditions).sample)
    return count, side**2 * sum(unet.config.block_out_channels) * _WIDTH


def vision_bytes(checkpointing: bool) -> tuple[int, int]:
    """(bytes saved for one image, unit of the factor)"""
    config = MllmConfig().vision
    tower = VisionTower(config, nn, device=META, dtype=HALF)
    saved = _SavedTensors(tower)
    angles = torch.empty(PATCHES, config.embed_dim // config.num_heads, device=META)
    given = ((angles, angles), [PATCHES])
    patches = torch.empty(1, PATCHES, config.patch_dim, device=META, dtype=HALF)

    def run() -> torch.Tensor:
        x = tower.patch_embed(patches)
        for block in tower.blocks:
            x = saved.checkpointed(block, x, *given) if checkpointing else block(x, *given)
        return tower.merger(x)

    return saved.count(run), PATCHES * config.embed_dim * config.depth * _WIDTH


def decoder_bytes(checkpointing: bool) -> tuple[int, int]:
    """(bytes saved for one token sequence, unit of the factor)"""
    config = MllmConfig()
    layers = nn.ModuleList(
        DecoderLayer(config, nn, device=META, dtype=HALF) for _ in range(config.num_layers)
    )
    saved = _SavedTensors(layers)
    position = rope(config, LENGTH, META, HALF)
    embeds = torch.empty(1, LENGTH, config.hidden_size, device=META, dtype=HALF)

    def run() -> torch.Tensor:
        x = embeds
        for layer in layers:
            x = saved.checkpointed(layer, x, position) if checkpointing else layer(x, position)
        return x

    return saved.count(run), LENGTH * config.hidden_size * config.num_layers * _WIDTH


def pooling_bytes(checkpointing: bool) -> tuple[int, int]:
    """(bytes saved for the pooled hidden states of one token sequence, unit of the factor)"""
    config = MllmConfig()
    count = config.num_layers
    sizes = PoolingSizes((("all", new_sizes("blocks", config.hidden_size)),), tuple(range(count)))
    pool = LayerPools(config, sizes, device=META, dtype=HALF)["all"].requires_grad_(True)
    saved = _SavedTensors(pool)
    states = torch.empty(LENGTH, count, config.hidden_size, device=META, dtype=HALF)

    def run() -> torch.Tensor:
        return saved.checkpointed(pool, states) if checkpointing else pool(states)

    return saved.count(run), LENGTH * count * config.hidden_size * _WIDTH


def measure() -> dict[str, dict[str, float]]:
    """Part and mode -> gigabytes and factor."""
    measured = {}
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, *_, **__: _Fused.apply(q, k, v)
    try:
        for name, part in (
            ("UNet", unet_bytes),
            ("vision tower", vision_bytes),
            ("decoder", decoder_bytes),
            ("layer pooling", pooling_bytes),
        ):
            for mode, checkpointing in (("plain", False), ("checkpointed", True)):
                saved, unit = part(checkpointing)
                entry = {"gigabytes": round(saved / 1e9, 3), "factor": round(saved / unit, 2)}
                measured[f"{name}, {mode}"] = entry
    finally:
        F.scaled_dot_product_attention = original
    return measured


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
