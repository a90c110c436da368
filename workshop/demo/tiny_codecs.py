"""Tiny random autoencoder and text encoders.

The autoencoder has exactly TAESD's shape, in diffusers' `AutoencoderTiny` layout. The two text
encoders are CLIP text models with CLIP's own vocabulary, in the layout of transformers, one for
each of SDXL's two slots.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .tiny_unet import POOLED_WIDTH, TEXT_WIDTH
from .tiny_weights import RandomWeights, write_json, write_tensors

VAE_WIDTH = 64

VAE_CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderTiny",
    "act_fn": "relu",
    "decoder_block_out_channels": [VAE_WIDTH] * 4,
    "encoder_block_out_channels": [VAE_WIDTH] * 4,
    "force_upcast": False,
    "in_channels": 3,
    "latent_channels": 4,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "num_decoder_blocks": [3, 3, 3, 1],
    "num_encoder_blocks": [1, 3, 3, 3],
    "out_channels": 3,
    # TAESD works on the UNet's scaled latents, not on those of SDXL's own autoencoder.
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
}

_CLIP_CONFIG: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    # SDXL reads the second to last layer, for which ComfyUI asks for three layers at least.
    "num_hidden_layers": 3,
    "pad_token_id": 1,
    "torch_dtype": "float16",
    "vocab_size": 49408,
}

# ComfyUI projects the pooled state to the width it has, so hidden and projection width agree.
CLIP_G_CONFIG: dict[str, Any] = {
    "architectures": ["CLIPTextModelWithProjection"],
    **_CLIP_CONFIG,
    "hidden_act": "gelu",
    "hidden_size": POOLED_WIDTH,
    "intermediate_size": 2 * POOLED_WIDTH,
    "num_attention_heads": 2,
    "projection_dim": POOLED_WIDTH,
}

CLIP_L_CONFIG: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    **_CLIP_CONFIG,
    "hidden_act": "quick_gelu",
    "hidden_size": TEXT_WIDTH - POOLED_WIDTH,
    "intermediate_size": 2 * (TEXT_WIDTH - POOLED_WIDTH),
    "num_attention_heads": 2,
    "projection_dim": TEXT_WIDTH - POOLED_WIDTH,
}


def write_vae(directory: Path, seed: int) -> None:
    """Write `config.json` and the float16 weights of the tiny autoencoder."""
    write_json(directory / "config.json", VAE_CONFIG)
    weights = vae_weights(seed)
    write_tensors(directory / "diffusion_pytorch_model.safetensors", weights, torch.float16)


def write_text_encoders(directory: Path, seed: int) -> None:
    """Write `clip_l/` and `clip_g/`, each with `config.json` and float16 `model.safetensors`."""
    for name, config in (("clip_l", CLIP_L_CONFIG), ("clip_g", CLIP_G_CONFIG)):
        weights = clip_weights(name, config, seed)
        write_json(directory / name / "config.json", config)
        write_tensors(directory / name / "model.safetensors", weights, torch.float16)


def vae_weights(seed: int) -> dict[str, torch.Tensor]:
    """Random float32 weights of an `AutoencoderTiny` with the default shape, by name.

    The indices count every entry of the two stacks, activations and upsamplers included.
    """
    weights = RandomWeights("vae", seed)
    blocks, latents = VAE_CONFIG["num_encoder_blocks"], VAE_CONFIG["latent_channels"]
    weights.conv("encoder.layers.0", VAE_CONFIG["in_channels"], VAE_WIDTH, gain=2.0)
    index = 1
    for stage, count in enumerate(blocks):
        if stage > 0:  # halves the size
            weights.conv(f"encoder.layers.{index}", VAE_WIDTH, VAE_WIDTH, bias=False)
            index += 1
        for _ in range(count):
            _add_vae_block(weights, f"encoder.layers.{index}")
            index += 1
    weights.conv(f"encoder.layers.{index}", VAE_WIDTH, latents)

    weights.conv("decoder.layers.0", latents, VAE_WIDTH)
    index = 2  # after the first activation
    for count in VAE_CONFIG["num_decoder_blocks"][:-1]:
        for _ in range(count):
            _add_vae_block(weights, f"decoder.layers.{index}")
            index += 1
        weights.conv(f"decoder.layers.{index + 1}", VAE_WIDTH, VAE_WIDTH, bias=False)
        index += 2  # the upsampler and the convolution after it
    _add_vae_block(weights, f"decoder.layers.{index}")
    # Around mid grey with room on both sides, so that different latents give different images.
    last = f"decoder.layers.{index + 1}"
    weights.conv(last, VAE_WIDTH, VAE_CONFIG["out_channels"], gain=0.2, bias_mean=0.5)
    return weights.tensors


def _add_vae_block(weights: RandomWeights, name: str) -> None:
    weights.conv(f"{name}.conv.0", VAE_WIDTH, VAE_WIDTH, gain=1.4)
    weights.conv(f"{name}.conv.2", VAE_WIDTH, VAE_WIDTH, gain=1.4)
    weights.conv(f"{name}.conv.4", VAE_WIDTH, VAE_WIDTH, gain=0.5)


def clip_weights(name: str, config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Random float32 weights of a CLIP text model with this configuration, by name."""
    weights = RandomWeights(name, seed)
    width = config["hidden_size"]
    tables = "text_model.embeddings"
    weights.normal(f"{tables}.token_embedding.weight", (config["vocab_size"], width), 1.0)
    positions = config["max_position_embeddings"]
    weights.normal(f"{tables}.position_embedding.weight", (positions, width), 0.5)
    for index in range(config["num_hidden_layers"]):
        layer = f"text_model.encoder.layers.{index}"
        weights.norm(f"{layer}.layer_norm1", width)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weights.linear(f"{layer}.self_attn.{projection}", width, width)
        weights.norm(f"{layer}.layer_norm2", width)
        weights.linear(f"{layer}.mlp.fc1", width, config["intermediate_size"])
        weights.linear(f"{layer}.mlp.fc2", config["intermediate_size"], width)
    weights.norm("text_model.final_layer_norm", width)
    if "CLIPTextModelWithProjection" in config["architectures"]:
        weights.linear("text_projection", width, config["projection_dim"], bias=False)
    return weights.tensors
