"""Which attention slot of ComfyUI's UNet each cross-attention layer of the adapter is."""

from __future__ import annotations

import re
from dataclasses import dataclass

import comfy.utils
from comfy.model_patcher import ModelPatcher

BlockKey = tuple[str, int, int]

_QUERY = re.compile(r"^(?P<layer>.+\.attn2)\.to_q\.weight$")
_BLOCK = re.compile(
    r"^(?P<side>input|middle|output)_blocks?\.(?P<number>\d+)\.(?:\d+\.)?"
    r"transformer_blocks\.(?P<index>\d+)\.attn2$"
)


@dataclass(frozen=True)
class CrossAttentionLayer:
    """One layer of the UNet.

    Attributes:
        block: ("input" | "middle" | "output", block number, transformer index), ComfyUI's key for
            attention replacements.
        widths: (query width, context width).
    """

    block: BlockKey
    widths: tuple[int, int]


def cross_attention_layers(model: ModelPatcher) -> dict[str, CrossAttentionLayer]:
    """diffusers' layer name -> ComfyUI's layer. Empty if the model is no such UNet."""
    base = model.model
    config = getattr(getattr(base, "model_config", None), "unet_config", None) or {}
    unet = getattr(base, "diffusion_model", None)
    if unet is None or not hasattr(unet, "input_blocks"):
        return {}
    layers: dict[str, CrossAttentionLayer] = {}
    for diffusers_name, name in comfy.utils.unet_to_diffusers(config).items():
        match = _QUERY.match(diffusers_name)
        block = _BLOCK.match(name.removesuffix(".to_q.weight"))
        if match is None or block is None:
            continue
        attention = unet.get_submodule(name.removesuffix(".to_q.weight"))
        number = 0 if block["side"] == "middle" else int(block["number"])
        layers[match["layer"]] = CrossAttentionLayer(
            (block["side"], number, int(block["index"])),
            (attention.to_q.in_features, attention.to_k.in_features),
        )
    return layers


def group_of(block: BlockKey) -> str:
    """A slot's group of layers, such as `output_1`; the middle block is one group."""
    side, number, _ = block
    return side if side == "middle" else f"{side}_{number}"


def model_name(model: ModelPatcher) -> str:
    """For messages."""
    return f"The model ({type(model.model).__name__})"
