"""EasyRef Layer Weights: in which layers of SDXL references act."""

from __future__ import annotations

from comfy_api.latest import io

from ..easyref_core.layer_weights import PROFILES, LayerWeights
from .link_types import EasyRefLayerWeightsLink


def _factor(group: str, tooltip: str) -> io.Float.Input:
    return io.Float.Input(group, default=1.0, min=-1.0, max=3.0, step=0.05, tooltip=tooltip)


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
                _factor(
                    "input_4",
                    tooltip="Multiplies the profile in the first fine layers; text shows the "
                    "result. 0 leaves these layers to the prompt.",
                ),
                _factor("input_5", tooltip="Multiplies the profile in the second fine layers."),
                _factor("input_7", tooltip="Multiplies the profile in the first coarse layers."),
                _factor(
                    "input_8",
                    tooltip="Multiplies the profile in the layers known for composition.",
                ),
                _factor("middle", tooltip="Multiplies the profile in the middle layers."),
                _factor(
                    "output_0", tooltip="Multiplies the profile in the layers known for content."
                ),
                _factor(
                    "output_1",
                    tooltip="Multiplies the profile in the layers known for style and colour.",
                ),
                _factor("output_2", tooltip="Multiplies the profile in the last coarse layers."),
                _factor(
                    "output_3",
                    tooltip="Multiplies the profile in the first of the fine layers "
                    "before the picture is done.",
                ),
                _factor(
                    "output_4", tooltip="Multiplies the profile in the fine layers after those."
                ),
                _factor("output_5", tooltip="Multiplies the profile in the very last layers."),
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
        )

    @classmethod
    def execute(cls, profile: str, **factors: float) -> io.NodeOutput:
        weights = PROFILES[profile].times(LayerWeights(factors))
        text = weights.text()
        return io.NodeOutput(weights, text, ui={"text": (text,)})
