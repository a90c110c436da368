"""EasyRef Layer Weights: in which layers of SDXL references act."""

from __future__ import annotations

from comfy_api.latest import io

from ..easyref_core.adapter.layer_weights import PROFILES, LayerWeights
from .checked import checked
from .inputs import weight_input
from .link_types import EasyRefLayerWeightsLink
from .newer_core import found_by


@checked
class EasyRefLayerWeights(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefLayerWeights",
            display_name="EasyRef Layer Weights",
            category="EasyRef",
            description="Says in which of SDXL's 11 groups of layers references act: a profile, "
            "and a factor for each group.",
            inputs=[
                io.Combo.Input(
                    "profile",
                    options=list(PROFILES),
                    default="all",
                    tooltip="all: every group as trained. style: output_1. composition: input_8. "
                    "fine detail: output_3 to output_5. The other groups are off.",
                ),
                weight_input(
                    "Multiplies the profile in the first fine layers; text shows the "
                    "result. 0 leaves these layers to the prompt.",
                    name="input_4",
                ),
                weight_input("Multiplies the profile in the second fine layers.", name="input_5"),
                weight_input("Multiplies the profile in the first coarse layers.", name="input_7"),
                weight_input(
                    "Multiplies the profile in the layers known for composition.", name="input_8"
                ),
                weight_input("Multiplies the profile in the middle layers.", name="middle"),
                weight_input(
                    "Multiplies the profile in the layers known for content.", name="output_0"
                ),
                weight_input(
                    "Multiplies the profile in the layers known for style and colour.",
                    name="output_1",
                ),
                weight_input("Multiplies the profile in the last coarse layers.", name="output_2"),
                weight_input(
                    "Multiplies the profile in the first of the fine layers "
                    "before the picture is done.",
                    name="output_3",
                ),
                weight_input(
                    "Multiplies the profile in the fine layers after those.", name="output_4"
                ),
                weight_input("Multiplies the profile in the very last layers.", name="output_5"),
            ],
            outputs=[
                EasyRefLayerWeightsLink.Output(
                    display_name="layer_weights",
                    tooltip="For EasyRef Apply, EasyRef Region or EasyRef Set Conditioning.",
                ),
                io.String.Output(
                    display_name="text", tooltip="The resulting weights, one line a group."
                ),
            ],
            **found_by("block weights, style only, composition, layers, ip-adapter weights"),
        )

    @classmethod
    def execute(cls, profile: str, **factors: float) -> io.NodeOutput:
        weights = PROFILES[profile].times(LayerWeights(factors))
        text = weights.text()
        return io.NodeOutput(weights, text, ui={"text": (text,)})
