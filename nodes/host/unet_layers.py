"""Which attention slot of ComfyUI's UNet each attention layer is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import comfy.utils
from comfy.model_patcher import ModelPatcher
from torch import nn

BlockKey = tuple[str, int, int]
"""("input" | "middle" | "output", block number, transformer index), ComfyUI's key for attention
replacements."""

_QUERY = re.compile(r"^(?P<layer>.+\.(?P<kind>attn[12]))\.to_q\.weight$")
_BLOCK = re.compile(
    r"^(?P<side>input|middle|output)_blocks?\.(?P<number>\d+)\.(?:\d+\.)?"
    r"transformer_blocks\.(?P<index>\d+)\.attn[12]$"
)


@dataclass(frozen=True)
class CrossAttentionLayer:
    """One layer of the UNet.

    Attributes:
        block: its slot.
        widths: (query width, context width).
    """

    block: BlockKey
    widths: tuple[int, int]


@dataclass(frozen=True)
class SelfAttentionLayer:
    """One layer of the UNet.

    Attributes:
        block: its slot.
        module: its name in the UNet.
        width: of its inputs.
    """

    block: BlockKey
    module: str
    width: int


def cross_attention_layers(model: ModelPatcher) -> dict[str, CrossAttentionLayer]:
    """diffusers' layer name -> ComfyUI's layer. Empty if the model is no such UNet."""
    return {
        layer: CrossAttentionLayer(block, (module.to_q.in_features, module.to_k.in_features))
        for layer, block, _, module in _attention_layers(model, "attn2")
    }


def self_attention_layers(model: ModelPatcher) -> dict[str, SelfAttentionLayer]:
    """diffusers' layer name -> ComfyUI's layer. Empty if the model is no such UNet."""
    return {
        layer: SelfAttentionLayer(block, name, module.to_q.in_features)
        for layer, block, name, module in _attention_layers(model, "attn1")
    }


def _attention_layers(
    model: ModelPatcher, kind: str
) -> Iterator[tuple[str, BlockKey, str, nn.Module]]:
    """(diffusers' name, slot, ComfyUI's name, module) of each layer of a kind."""
    base = model.model
    config = getattr(getattr(base, "model_config", None), "unet_config", None) or {}
    unet = getattr(base, "diffusion_model", None)
    if unet is None or not hasattr(unet, "input_blocks"):
        return
    for diffusers_name, weight in comfy.utils.unet_to_diffusers(config).items():
        match = _QUERY.match(diffusers_name)
        name = weight.removesuffix(".to_q.weight")
        block = _BLOCK.match(name)
        if match is None or block is None or match["kind"] != kind:
            continue
        number = 0 if block["side"] == "middle" else int(block["number"])
        slot = (block["side"], number, int(block["index"]))
        yield match["layer"], slot, name, unet.get_submodule(name)


def group_of(block: BlockKey) -> str:
    """A slot's group of layers, such as `output_1`; the middle block is one group."""
    side, number, _ = block
    return side if side == "middle" else f"{side}_{number}"


def model_name(model: ModelPatcher) -> str:
    """For messages."""
    return f"The model ({type(model.model).__name__})"
