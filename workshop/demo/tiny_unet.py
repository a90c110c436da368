"""Tiny random UNet and ControlNet in the diffusers layout, with the block structure of SDXL.

The shape is SDXL divided by ten: channels 32, 64, 128 (factors 1, 2, 4), two residual blocks a
level, attention on the last two levels and in the middle, heads of width 64. Every transformer
of SDXL has its counterpart under the same name; where SDXL stacks ten layers, here is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .tiny_weights import RandomWeights, write_json, write_tensors

TEXT_WIDTH = 96
POOLED_WIDTH = 64
# Each of the six size and crop numbers is embedded this wide. ComfyUI fixes 256 for SDXL.
NUMBER_WIDTH = 256

_SHARED_CONFIG: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": NUMBER_WIDTH,
    # As in SDXL, diffusers reads this field as the number of heads of each level.
    "attention_head_dim": [1, 1, 2],
    "block_out_channels": [32, 64, 128],
    "class_embed_type": None,
    "cross_attention_dim": TEXT_WIDTH,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": 6 * NUMBER_WIDTH + POOLED_WIDTH,
    "resnet_time_scale_shift": "default",
    "transformer_layers_per_block": [1, 2, 1],
    "upcast_attention": None,
    "use_linear_projection": True,
}

UNET_CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    **_SHARED_CONFIG,
    "center_input_sample": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "out_channels": 4,
    "sample_size": 16,
    "time_embedding_type": "positional",
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}

CONTROLNET_CONFIG: dict[str, Any] = {
    "_class_name": "ControlNetModel",
    **_SHARED_CONFIG,
    "conditioning_channels": 3,
    # ComfyUI fixes these four widths for every ControlNet of this kind.
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
    "controlnet_conditioning_channel_order": "rgb",
    "global_pool_conditions": False,
}


def write_unet(directory: Path, seed: int) -> dict[str, torch.Tensor]:
    """Write `config.json` and the float16 weights of the tiny UNet.

    Returns:
        The weights in float32 by diffusers name; the adapter takes its layer shapes from them.
    """
    weights = unet_weights(UNET_CONFIG, seed)
    write_json(directory / "config.json", UNET_CONFIG)
    write_tensors(directory / "diffusion_pytorch_model.safetensors", weights, torch.float16)
    return weights


def write_controlnet(directory: Path, seed: int) -> None:
    """Write `config.json` and the float16 weights of a ControlNet for the tiny UNet."""
    weights = controlnet_weights(CONTROLNET_CONFIG, seed)
    write_json(directory / "config.json", CONTROLNET_CONFIG)
    write_tensors(directory / "diffusion_pytorch_model.safetensors", weights, torch.float16)


def unet_weights(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Random float32 weights of a diffusers UNet with this configuration, by name."""
    weights = RandomWeights("unet", seed)
    skips = _add_down_and_middle(weights, config)
    channels = config["block_out_channels"]
    depths = config["transformer_layers_per_block"]
    width = channels[-1]
    for block, level in enumerate(reversed(range(len(channels)))):
        prefix = f"up_blocks.{block}"
        for layer in range(config["layers_per_block"] + 1):
            inputs = width + skips.pop()
            width = channels[level]
            _add_resnet(weights, f"{prefix}.resnets.{layer}", inputs, width, channels[0] * 4)
            if config["up_block_types"][block].startswith("CrossAttn"):
                name = f"{prefix}.attentions.{layer}"
                _add_transformer(weights, name, width, config, depths[level])
        if level > 0:
            weights.conv(f"{prefix}.upsamplers.0.conv", width, width)
    weights.norm("conv_norm_out", channels[0])
    weights.conv("conv_out", channels[0], config["out_channels"])
    return weights.tensors


def controlnet_weights(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Random float32 weights of a diffusers ControlNet, by name.

    Its output convolutions, zero in an untrained ControlNet, are small and random here: the
    control picture has to change the result.
    """
    weights = RandomWeights("controlnet", seed)
    outputs = _add_down_and_middle(weights, config)
    widths = config["conditioning_embedding_out_channels"]
    hint = "controlnet_cond_embedding"
    # The gain makes up for the activations in between, which would shrink the picture to nothing.
    weights.conv(f"{hint}.conv_in", config["conditioning_channels"], widths[0], gain=2.0)
    for index, width in enumerate(widths[:-1]):
        weights.conv(f"{hint}.blocks.{2 * index}", width, width, gain=1.8)
        weights.conv(f"{hint}.blocks.{2 * index + 1}", width, widths[index + 1], gain=1.8)
    weights.conv(f"{hint}.conv_out", widths[-1], config["block_out_channels"][0], gain=1.8)
    for index, width in enumerate(outputs):
        weights.conv(f"controlnet_down_blocks.{index}", width, width, 1, gain=0.3)
    width = config["block_out_channels"][-1]
    weights.conv("controlnet_mid_block", width, width, 1, gain=0.3)
    return weights.tensors


def _add_down_and_middle(weights: RandomWeights, config: Mapping[str, Any]) -> list[int]:
    """Add the half that UNet and ControlNet share; return the width of every skip connection."""
    channels = config["block_out_channels"]
    depths = config["transformer_layers_per_block"]
    time_width = channels[0] * 4
    weights.conv("conv_in", config["in_channels"], channels[0])
    added_width = config["projection_class_embeddings_input_dim"]
    for name, inputs in (("time_embedding", channels[0]), ("add_embedding", added_width)):
        weights.linear(f"{name}.linear_1", inputs, time_width)
        weights.linear(f"{name}.linear_2", time_width, time_width)

    width = channels[0]
    skips = [width]
    for level, level_width in enumerate(channels):
        prefix = f"down_blocks.{level}"
        for layer in range(config["layers_per_block"]):
            _add_resnet(weights, f"{prefix}.resnets.{layer}", width, level_width, time_width)
            width = level_width
            if config["down_block_types"][level].startswith("CrossAttn"):
                name = f"{prefix}.attentions.{layer}"
                _add_transformer(weights, name, width, config, depths[level])
            skips.append(width)
        if level < len(channels) - 1:
            weights.conv(f"{prefix}.downsamplers.0.conv", width, width)
            skips.append(width)

    _add_resnet(weights, "mid_block.resnets.0", width, width, time_width)
    _add_transformer(weights, "mid_block.attentions.0", width, config, depths[-1])
    _add_resnet(weights, "mid_block.resnets.1", width, width, time_width)
    return skips


def _add_resnet(
    weights: RandomWeights, name: str, inputs: int, outputs: int, time_width: int
) -> None:
    weights.norm(f"{name}.norm1", inputs)
    weights.conv(f"{name}.conv1", inputs, outputs)
    weights.linear(f"{name}.time_emb_proj", time_width, outputs)
    weights.norm(f"{name}.norm2", outputs)
    weights.conv(f"{name}.conv2", outputs, outputs)
    if inputs != outputs:
        weights.conv(f"{name}.conv_shortcut", inputs, outputs, 1)


def _add_transformer(
    weights: RandomWeights, name: str, width: int, config: Mapping[str, Any], depth: int
) -> None:
    weights.norm(f"{name}.norm", width)
    weights.linear(f"{name}.proj_in", width, width)
    for index in range(depth):
        block = f"{name}.transformer_blocks.{index}"
        for attention, context in (("attn1", width), ("attn2", config["cross_attention_dim"])):
            weights.linear(f"{block}.{attention}.to_q", width, width, bias=False)
            weights.linear(f"{block}.{attention}.to_k", context, width, bias=False)
            weights.linear(f"{block}.{attention}.to_v", context, width, bias=False)
            weights.linear(f"{block}.{attention}.to_out.0", width, width)
        for number in (1, 2, 3):
            weights.norm(f"{block}.norm{number}", width)
        # The first feed-forward layer yields values and gates side by side.
        weights.linear(f"{block}.ff.net.0.proj", width, 8 * width)
        weights.linear(f"{block}.ff.net.2", 4 * width, width)
    weights.linear(f"{name}.proj_out", width, width)
