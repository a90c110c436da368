"""EasyRef Set Conditioning: a prompt that carries its own reference tokens."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..easyref_core.adapter.layer_weights import LayerWeights
from ..easyref_core.errors import EasyRefError
from ..easyref_core.tokens.reference_tokens import ReferenceTokens
from .checked import checked
from .inputs import collect_weights, weight_input
from .link_types import EasyRefLayerWeightsLink, EasyRefTokens
from .newer_core import found_by
from .sampling.conditionings import carry
from .sampling.weights import Effect


@checked
class EasyRefSetConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefSetConditioning",
            display_name="EasyRef Set Conditioning",
            category="EasyRef",
            description="Gives a prompt reference tokens of its own, which take the place of "
            "EasyRef Apply's. The model must have gone through EasyRef Apply with their adapter.",
            inputs=[
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="A prompt, before or after nodes that set its area, mask or timestep "
                    "range. In the negative prompt, references to avoid.",
                ),
                EasyRefTokens.Input(
                    "tokens", tooltip="The prompt's reference tokens, from EasyRef Encode."
                ),
                weight_input(
                    "How strongly these references act: 1 as trained, 0 none for this "
                    "prompt. The weight of EasyRef Apply multiplies it."
                ),
                EasyRefLayerWeightsLink.Input(
                    "layer_weights",
                    optional=True,
                    tooltip="From EasyRef Layer Weights: in which layers these references act.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="The prompt with its references."
                )
            ],
            **found_by("reference, regional prompt, prompt with references"),
        )

    @classmethod
    def execute(
        cls,
        conditioning: list[list[Any]],
        tokens: ReferenceTokens,
        weight: float,
        layer_weights: LayerWeights | None = None,
    ) -> io.NodeOutput:
        if not conditioning:
            raise EasyRefError(
                "The conditioning is empty, so there is no prompt to carry the tokens. Connect a "
                "CLIP Text Encode."
            )
        effect = Effect(tokens, collect_weights(weight, layer_weights=layer_weights))
        return io.NodeOutput(carry(conditioning, effect))
