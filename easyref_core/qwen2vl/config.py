"""Sizes of a Qwen2-VL model, and how the shapes of its weights tell them.

Source: Hugging Face's Qwen2-VL configuration files; defaults are those of Qwen2-VL-2B.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import EasyRefError
from .names import BLOCKS, LAYERS, layer_numbers

MAX_LAYERS = 1000  # building more would take longer than anyone waits
HEAD, VISION_HEAD = 128, 80  # widths of the attention heads in every release of Qwen2-VL
RELEASED_WIDTHS = (1536, 3584, 8192)  # of Qwen2-VL-2B, 7B and 72B


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower. `hidden_size` is the width after the merger."""

    embed_dim: int = 1280
    depth: int = 32
    num_heads: int = 16
    mlp_dim: int = 5120
    hidden_size: int = 1536
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    in_channels: int = 3

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch, both temporal frames included."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class MllmConfig:
    """Sizes of the whole model; `num_layers` counts the decoder layers of the untruncated model."""

    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_layers: int = 28
    num_heads: int = 12
    num_kv_heads: int = 2
    vocab_size: int = 151936
    max_positions: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    vision: VisionConfig = VisionConfig()

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mark(self) -> str:
        """Eight hex digits that stand for the numbers which change the tokens and which no
        weight's shape tells: heads, epsilon, base of the positions. Empty for those of Qwen2-VL's
        releases.
        """
        heads = (self.num_heads, self.num_kv_heads, self.vision.num_heads)
        widths = (self.head_dim, self.vision.embed_dim // self.vision.num_heads)
        others = (self.rms_norm_eps, self.rope_theta)
        usual = (MllmConfig.rms_norm_eps, MllmConfig.rope_theta)
        if widths == (HEAD, VISION_HEAD) and others == usual:
            return ""
        return hashlib.sha256(f"{heads} {others}".encode()).hexdigest()[:8]


def config_from_shapes(
    shapes: Mapping[str, tuple[int, ...]], final_layers: int, source: str
) -> MllmConfig:
    """Infer the configuration from the body's weights alone, for adapters that carry the MLLM.

    No shape depends on the number of heads; Qwen2-VL's head sizes, 128 (language) and 80 (vision),
    are assumed.

    Args:
        shapes: body weights by name as in Hugging Face's files (`visual.*`, `model.*`).
        final_layers: decoder layers kept apart from the body.
        source: for messages.

    Raises:
        EasyRefError: the widths do not divide into such heads, so a directory is needed.
        KeyError, IndexError: a weight is missing, or has too few dimensions.
    """
    hidden = shapes["model.norm.weight"][0]
    query = shapes["model.layers.0.self_attn.q_proj.weight"][0]
    key = shapes["model.layers.0.self_attn.k_proj.weight"][0]
    embed_dim = shapes["visual.patch_embed.proj.weight"][0]
    heads, kv_heads, vision_heads = query // HEAD, key // HEAD, embed_dim // VISION_HEAD
    exact = (heads * HEAD, kv_heads * HEAD, vision_heads * VISION_HEAD) == (query, key, embed_dim)
    if not exact or not heads or not kv_heads or not vision_heads or heads % kv_heads:
        raise EasyRefError(
            f"{source} carries an MLLM of width {hidden} whose number of attention heads cannot "
            "be told from its weights (it is not a Qwen2-VL release size). Choose the MLLM "
            "directory it was trained from: its config.json says."
        )
    embedding = shapes.get("model.embed_tokens.weight") or shapes.get("lm_head.weight")
    return MllmConfig(
        hidden_size=hidden,
        intermediate_size=shapes["model.layers.0.mlp.gate_proj.weight"][0],
        num_layers=len(layer_numbers(shapes, LAYERS)) + final_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        vocab_size=embedding[0] if embedding else MllmConfig.vocab_size,
        vision=VisionConfig(
            embed_dim=embed_dim,
            depth=len(layer_numbers(shapes, BLOCKS)),
            num_heads=vision_heads,
            mlp_dim=shapes["visual.blocks.0.mlp.fc1.weight"][0],
            hidden_size=hidden,
        ),
    )
