"""EasyRef Apply: reference tokens into a model's cross-attention."""

from __future__ import annotations

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..easyref_core.adapter.key_values import check_model_layers, check_tokens
from ..easyref_core.adapter.layer_weights import LayerWeights
from ..easyref_core.tokens.reference_tokens import ReferenceTokens
from .checked import checked
from .host.unet_layers import cross_attention_layers, group_of, model_name
from .inputs import share_input, weight_input, weights_in_range
from .link_types import (
    EasyRef,
    EasyRefCurve,
    EasyRefLayerWeightsLink,
    EasyRefModel,
    EasyRefRegions,
    EasyRefTokens,
    Regions,
    check_regions,
)
from .newer_core import ADVANCED, found_by
from .sampling.patch import ReferencePatch
from .sampling.weights import Weight


@checked
class EasyRefApply(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefApply",
            display_name="EasyRef Apply",
            category="EasyRef",
            description="Steers an SDXL model with reference tokens. Several of these nodes add "
            "up; ControlNets, LoRAs and other attention nodes may stand before or after.",
            inputs=[
                io.Model.Input("model", tooltip="An SDXL model."),
                EasyRef.Input("easyref", tooltip="The adapter that made the tokens."),
                EasyRefTokens.Input(
                    "tokens",
                    optional=True,
                    tooltip="From EasyRef Encode or Load Tokens. May be left out if regions are "
                    "connected, or if prompts carry tokens (EasyRef Set Conditioning).",
                ),
                weight_input(
                    "How strongly the references act: 1 as trained, 0 not at all, below 0 "
                    "away from them."
                ),
                share_input(
                    "start_percent",
                    0.0,
                    "From which part of the sampling on the references act. Later leaves the "
                    "composition to the prompt.",
                ),
                share_input(
                    "end_percent", 1.0, "Until which part of the sampling the references act."
                ),
                weight_input(
                    "Strength of the LoRA that was trained with the adapter; it acts "
                    "during the whole sampling whatever the weight. 1 as trained. Of several "
                    "Apply nodes with one adapter, the last one's counts.",
                    "lora_strength",
                    **ADVANCED,
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the picture the references act (white), stretched to the "
                    "picture's shape. One for all latents, or one each.",
                ),
                EasyRefLayerWeightsLink.Input(
                    "layer_weights",
                    optional=True,
                    tooltip="From EasyRef Layer Weights: more or less of the references in some "
                    "layers, as for style or composition alone.",
                ),
                EasyRefCurve.Input(
                    "curve",
                    optional=True,
                    tooltip="From EasyRef Weight Curve or EasyRef Stages: multiplies the weight "
                    "over the sampling.",
                ),
                EasyRefRegions.Input(
                    "regions",
                    optional=True,
                    tooltip="From EasyRef Region: up to 16 groups, each where its mask is white. "
                    "They are added to tokens, within this node's weight, mask and other settings.",
                ),
                io.Boolean.Input(
                    "normalise",
                    default=False,
                    optional=True,
                    tooltip="Where regions overlap: off adds them up, on shares the weight between "
                    "them so that it never sums above 1. The tokens count as a region too.",
                    **ADVANCED,
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The steered model.")],
            **found_by(
                "ip-adapter, ipadapter, reference, character, style, "
                "consistent, face, apply reference"
            ),
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        easyref: EasyRefModel,
        tokens: ReferenceTokens | None = None,
        weight: float = 1.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        lora_strength: float = 1.0,
        mask: torch.Tensor | None = None,
        layer_weights: LayerWeights | None = None,
        curve: Weight | None = None,
        regions: Regions | None = None,
        normalise: bool = False,
    ) -> io.NodeOutput:
        weights = weights_in_range(weight, start_percent, end_percent, mask, layer_weights, curve)
        checkpoint = easyref.checkpoint
        if tokens is not None:
            check_tokens(checkpoint, tokens)
        if regions is not None:
            check_regions(regions)
            for region in regions:
                check_tokens(checkpoint, region.tokens)
        layers = cross_attention_layers(model)
        kind = model_name(model)
        check_model_layers(checkpoint, {n: layer.widths for n, layer in layers.items()}, kind)
        blocks = {layer: layers[layer].block for layer in checkpoint.cross_attention}
        groups = {group_of(block) for block in blocks.values()}
        for used in (weights, *(region.weights for region in regions or ())):
            for one in used:
                one.check_layers(groups, kind)
        inner = tuple(region.within(weights) for region in regions or ())
        patch = ReferencePatch(
            checkpoint, easyref.key_values, blocks, weights, tokens, inner, normalise
        )
        steered = model.clone()
        easyref.lora.apply(steered, lora_strength)
        patch.add_to(steered)
        return io.NodeOutput(steered)
