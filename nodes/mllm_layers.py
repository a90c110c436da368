"""EasyRef MLLM Layers: how much each of the MLLM's layers counts."""

from __future__ import annotations

from comfy_api.latest import io

from ..easyref_core.encode.mllm_layers import MAX_FACTOR, PRESETS, MllmLayerWeights, parse_factors
from .checked import checked
from .link_types import EasyRefMllmLayersLink
from .newer_core import found_by

SHOWN = 28
"""Hidden states that are shown: those of Qwen2-VL-2B. An adapter may read another number."""


@checked
class EasyRefMllmLayers(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefMllmLayers",
            display_name="EasyRef MLLM Layers",
            category="EasyRef",
            description="Says how much each of the MLLM's layers counts, for adapters that read "
            "many (aggregation dla or lap).",
            inputs=[
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="even",
                    tooltip="even: as trained. early, late: more of the first or the last layers. "
                    "text-heavy, picture-heavy: twice the attention to the prompt or to the "
                    "pictures.",
                    extra_dict={"bars": {preset: _bars(preset) for preset in PRESETS}},
                ),
                io.String.Input(
                    "text_layers",
                    default="1",
                    tooltip="Factors of the layers for text tokens, from the first layer to the "
                    "last, with commas between them; fewer than there are layers are spread "
                    "evenly. They multiply the preset.",
                ),
                io.String.Input(
                    "picture_layers",
                    default="1",
                    tooltip="Factors of the layers for picture tokens, from the first layer to the "
                    "last, with commas between them; fewer than there are layers are spread "
                    "evenly. They multiply the preset.",
                ),
                io.Float.Input(
                    "text_weight",
                    default=1.0,
                    min=0.0,
                    max=MAX_FACTOR,
                    step=0.05,
                    tooltip="Multiplies the attention that reference tokens pay to the text; it "
                    "multiplies the preset.",
                ),
                io.Float.Input(
                    "picture_weight",
                    default=1.0,
                    min=0.0,
                    max=MAX_FACTOR,
                    step=0.05,
                    tooltip="Multiplies the attention that reference tokens pay to all pictures; "
                    "it multiplies the preset.",
                ),
            ],
            outputs=[
                EasyRefMllmLayersLink.Output(
                    display_name="mllm_layers", tooltip="For EasyRef Encode or EasyRef Inspect."
                ),
                io.String.Output(
                    display_name="text",
                    tooltip="The resulting factors with 28 layers, a line for text and a line for "
                    "pictures.",
                ),
            ],
            **found_by("dla, layer aggregation, mllm layers, text encoder layers, layer weights"),
        )

    @classmethod
    def execute(
        cls,
        preset: str,
        text_layers: str,
        picture_layers: str,
        text_weight: float,
        picture_weight: float,
    ) -> io.NodeOutput:
        weights = MllmLayerWeights(
            preset,
            parse_factors(text_layers, "text_layers"),
            parse_factors(picture_layers, "picture_layers"),
            text_weight,
            picture_weight,
        )
        text = weights.text_for(SHOWN)
        return io.NodeOutput(weights, text, ui={"text": (text,)})


def _bars(preset: str) -> dict[str, list[float]]:
    """What a preset shows on the node, in the page."""
    weights = MllmLayerWeights(preset)
    text, picture = weights.factors(SHOWN)
    return {"text": list(text), "picture": list(picture), "attention": list(weights.attention)}
