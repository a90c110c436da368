"""Tiny random EasyRef adapter in the official checkpoint layout, for a UNet and an MLLM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from .tiny_weights import RandomWeights, write_tensors

REFERENCE_TOKENS = 16
LORA_RANK = 4
# Merged LoRA weights change the base weights by about this much of their own size.
LORA_AMPLITUDE = 0.1


def write_adapter(
    path: Path,
    seed: int,
    unet: Mapping[str, torch.Tensor],
    mllm: Mapping[str, torch.Tensor],
) -> None:
    """Write the adapter checkpoint as float16 safetensors.

    Args:
        path: The file to write.
        seed: Seed of the set.
        unet: Weights of the base UNet by diffusers name.
        mllm: Weights of the base Qwen2-VL by their original names.
    """
    write_tensors(path, adapter_weights(seed, unet, mllm), torch.float16)


def adapter_weights(
    seed: int, unet: Mapping[str, torch.Tensor], mllm: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Random float32 weights of an adapter, by the official names.

    The MLLM part is the base MLLM with some noise on every tensor, as fine-tuning leaves it: all
    layers but the last under `multimodal_llm.`, the last one under `mllm_final_layer.layers.0.`.
    """
    weights = RandomWeights("easyref", seed)
    width = mllm["model.norm.weight"].shape[0]
    _add_final_layer(weights, mllm, width)
    tokens_width = _context_width(unet)
    weights.linear("image_proj_model.proj.0", width, width)
    weights.linear("image_proj_model.proj.2", width, tokens_width)
    weights.norm("image_proj_model.proj.3", tokens_width)
    for name, tensor in unet.items():
        layer, separator, projection = name.rpartition(".to_")
        if separator and name.endswith(".weight") and ".attn" in layer:
            _add_attention_weight(weights, layer, projection, tensor)
    return weights.tensors


def _add_final_layer(weights: RandomWeights, mllm: Mapping[str, torch.Tensor], width: int) -> None:
    layers = {int(name.split(".")[2]) for name in mllm if name.startswith("model.layers.")}
    last = f"model.layers.{max(layers)}."
    for name, tensor in mllm.items():
        if name.startswith(last):
            weights.tuned(f"mllm_final_layer.layers.0.{name.removeprefix(last)}", tensor)
        else:
            weights.tuned(f"multimodal_llm.{name}", tensor)
    # Official checkpoints store the tied output layer a second time.
    embeddings = weights.tensors["multimodal_llm.model.embed_tokens.weight"]
    weights.tensors["multimodal_llm.lm_head.weight"] = embeddings.clone()
    weights.tuned("mllm_final_layer.norm.weight", mllm["model.norm.weight"])
    weights.normal("mllm_final_layer.reference_tokens", (REFERENCE_TOKENS, width), 0.1)


def _context_width(unet: Mapping[str, torch.Tensor]) -> int:
    """Width of the text states, which the reference tokens share."""
    return next(t.shape[1] for name, t in unet.items() if name.endswith(".attn2.to_k.weight"))


def _add_attention_weight(
    weights: RandomWeights, layer: str, projection: str, original: torch.Tensor
) -> None:
    """Add the LoRA pair of one projection; for cross-attention keys and values their own twin."""
    kind = projection[0] if projection[0] in "qkv" else "out"
    outputs, inputs = original.shape
    name = f"unet.{layer}.processor.to_{kind}"
    weights.linear(f"{name}_lora.down", inputs, LORA_RANK, bias=False)
    weights.linear(f"{name}_lora.up", LORA_RANK, outputs, bias=False, gain=LORA_AMPLITUDE)
    if layer.endswith("attn2") and kind in "kv":
        weights.linear(f"{name}_ip", inputs, outputs, bias=False)
