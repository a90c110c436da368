"""EasyRef Region: reference tokens for a part of the picture."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..easyref_core.adapter.layer_weights import LayerWeights
from ..easyref_core.tokens.reference_tokens import ReferenceTokens
from .checked import checked
from .inputs import collect_weights, weight_input
from .link_types import (
    EasyRefCurve,
    EasyRefLayerWeightsLink,
    EasyRefRegions,
    EasyRefTokens,
    Regions,
    check_regions,
)
from .newer_core import found_by
from .sampling.weights import Effect, Weight


@checked
class EasyRefRegion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefRegion",
            display_name="EasyRef Region",
            category="EasyRef",
            description="Gives a part of the picture reference tokens of its own. Chain up to 16 "
            "of these; EasyRef Apply takes them all.",
            inputs=[
                EasyRefTokens.Input(
                    "tokens", tooltip="What acts in this region. All regions need one adapter."
                ),
                io.Mask.Input(
                    "mask",
                    tooltip="Where in the picture it acts (white), stretched to the picture's "
                    "shape. One for all latents, or one each. A small region costs little.",
                ),
                weight_input(
                    "How strongly the region's references act: 1 as trained. The weight "
                    "of EasyRef Apply multiplies it."
                ),
                EasyRefLayerWeightsLink.Input(
                    "layer_weights",
                    optional=True,
                    tooltip="From EasyRef Layer Weights: in which layers this region acts.",
                ),
                EasyRefCurve.Input(
                    "curve",
                    optional=True,
                    tooltip="From EasyRef Weight Curve or EasyRef Stages: multiplies this region's "
                    "weight over the sampling.",
                ),
                EasyRefRegions.Input(
                    "previous",
                    optional=True,
                    tooltip="Regions that come before this one, from another EasyRef Region.",
                ),
            ],
            outputs=[
                EasyRefRegions.Output(
                    display_name="regions",
                    tooltip="All regions so far, for EasyRef Apply or another EasyRef Region.",
                )
            ],
            **found_by("regional, mask, attention mask, several characters, two people"),
        )

    @classmethod
    def execute(
        cls,
        tokens: ReferenceTokens,
        mask: torch.Tensor,
        weight: float,
        layer_weights: LayerWeights | None = None,
        curve: Weight | None = None,
        previous: Regions | None = None,
    ) -> io.NodeOutput:
        effect = Effect(tokens, collect_weights(weight, mask, layer_weights, curve))
        regions = (*(previous or ()), effect)
        check_regions(regions)
        return io.NodeOutput(regions)
