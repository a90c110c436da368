"""Sizes of a Qwen2-VL model, from its config.json or from the shapes of its weights.

Source: Hugging Face's Qwen2-VL configuration files; defaults are those of Qwen2-VL-2B.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import EasyRefError


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


def read_config(directory: str | Path) -> MllmConfig:
    """Read a Qwen2-VL directory's config.json.

    Raises:
        EasyRefError: no directory, no config.json, not JSON, or another model family.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise EasyRefError(
            f"No config.json in the MLLM directory {directory}. "
            "Choose the folder of a Qwen2-VL-2B-Instruct download, with all its files."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EasyRefError(
            f"{path} cannot be read as JSON ({error}). Download the MLLM directory again."
        ) from error
    if not isinstance(data, dict):
        raise EasyRefError(f"{path} holds no settings. Download the MLLM directory again.")
    return config_from_dict(data, str(path))


def config_from_dict(data: Mapping[str, Any], source: str) -> MllmConfig:
    """Build the configuration from config.json's content, flat (4.x) or nested (5.x).

    Raises:
        EasyRefError: another model family or a missing size, with `source` named.
    """
    family = data.get("model_type")
    if family != "qwen2_vl":
        raise EasyRefError(
            f"{source} describes a model of type {family!r}; EasyRef reads references with "
            "Qwen2-VL (model_type 'qwen2_vl'), and other families, Qwen2.5-VL included, have "
            "other weights. Choose a Qwen2-VL-2B-Instruct directory."
        )
    text = {**data, **(data.get("text_config") or {})}
    rope = text.get("rope_parameters") or {}
    vision = {"embed_dim": VisionConfig.embed_dim, **(data.get("vision_config") or {})}
    if "in_chans" in vision:
        vision.setdefault("in_channels", vision["in_chans"])
    own = {field.name for field in fields(VisionConfig)} - {"mlp_dim"}
    try:
        vision.setdefault("hidden_size", text["hidden_size"])
        return MllmConfig(
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            num_layers=text["num_hidden_layers"],
            num_heads=text["num_attention_heads"],
            num_kv_heads=text["num_key_value_heads"],
            vocab_size=text["vocab_size"],
            max_positions=text.get("max_position_embeddings", MllmConfig.max_positions),
            rms_norm_eps=text.get("rms_norm_eps", MllmConfig.rms_norm_eps),
            rope_theta=text.get("rope_theta") or rope.get("rope_theta", MllmConfig.rope_theta),
            vision=VisionConfig(
                mlp_dim=int(vision["embed_dim"] * vision.get("mlp_ratio", 4)),
                **{name: value for name, value in vision.items() if name in own},
            ),
        )
    except KeyError as error:
        raise EasyRefError(
            f"{source} lacks {error.args[0]!r}. Download the MLLM directory again."
        ) from error


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
    patch = shapes["visual.patch_embed.proj.weight"]  # [embed, channels, frames, size, size]
    embed_dim = patch[0]
    if query % 128 or key % 128 or embed_dim % 80:
        raise EasyRefError(
            f"{source} carries an MLLM of width {hidden} whose number of attention heads cannot "
            "be told from its weights (it is not a Qwen2-VL release size). Choose the MLLM "
            "directory it was trained from: its config.json says."
        )
    embedding = shapes.get("model.embed_tokens.weight") or shapes.get("lm_head.weight")
    merged = shapes["visual.merger.mlp.0.weight"][0]
    return MllmConfig(
        hidden_size=hidden,
        intermediate_size=shapes["model.layers.0.mlp.gate_proj.weight"][0],
        num_layers=_count_layers(shapes, "model.layers.") + final_layers,
        num_heads=query // 128,
        num_kv_heads=key // 128,
        vocab_size=embedding[0] if embedding else MllmConfig.vocab_size,
        vision=VisionConfig(
            embed_dim=embed_dim,
            depth=_count_layers(shapes, "visual.blocks."),
            num_heads=embed_dim // 80,
            mlp_dim=shapes["visual.blocks.0.mlp.fc1.weight"][0],
            hidden_size=hidden,
            patch_size=patch[-1],
            spatial_merge_size=round((merged / embed_dim) ** 0.5),
            temporal_patch_size=patch[2],
            in_channels=patch[1],
        ),
    )


def _count_layers(names: Mapping[str, Any], prefix: str) -> int:
    return len({n[len(prefix) :].split(".", 1)[0] for n in names if n.startswith(prefix)})
