"""EasyRef Encode: references and prompt into reference tokens."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..easyref_core.encode.group import AGGREGATIONS
from ..easyref_core.encode.mllm_layers import MllmLayerWeights
from .checked import checked
from .inputs import gather, image_size_input, images_input, mllm_layers_input, prompt_input
from .link_types import EasyRef, EasyRefModel, EasyRefReferenceGroup, EasyRefTokens, References
from .newer_core import ADVANCED, found_by


@checked
class EasyRefEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefEncode",
            display_name="EasyRef Encode",
            category="EasyRef",
            description="Encodes all references and the prompt together with the MLLM: what they "
            "have in common becomes reference tokens.",
            inputs=[
                EasyRef.Input("easyref", tooltip="From EasyRef Loader."),
                images_input(),
                EasyRefReferenceGroup.Input(
                    "references",
                    optional=True,
                    tooltip="Reference pictures of any sizes, from EasyRef References.",
                ),
                prompt_input(),
                io.Combo.Input(
                    "aggregation",
                    options=list(AGGREGATIONS),
                    default="easyref",
                    tooltip="easyref: all pictures in one pass of the MLLM. dla, lap: the same, "
                    "reading all its layers, with adapters trained for it. average, concatenate: "
                    "one pass per picture, for comparison.",
                    **ADVANCED,
                ),
                image_size_input(
                    "0: the size the adapter was trained with (336 for the released weights). "
                    "Otherwise 56 or more: each picture is resized to about the area of a square "
                    "with this side in pixels, keeping its aspect ratio. Larger costs time and "
                    "memory."
                ),
                EasyRefReferenceGroup.Input(
                    "negative_references",
                    optional=True,
                    tooltip="Pictures to avoid, from EasyRef References. They replace the black "
                    "picture in the negative branch, so they act at a CFG above 1.",
                ),
                mllm_layers_input(),
            ],
            outputs=[
                EasyRefTokens.Output(display_name="tokens", tooltip="Reference tokens to apply.")
            ],
            **found_by(
                "ip-adapter, ipadapter, reference, multi image, qwen2-vl, clip vision, image prompt"
            ),
        )

    @classmethod
    def execute(
        cls,
        easyref: EasyRefModel,
        prompt: str,
        aggregation: str,
        image_size: int,
        images: torch.Tensor | None = None,
        references: References | None = None,
        negative_references: References | None = None,
        mllm_layers: MllmLayerWeights | None = None,
    ) -> io.NodeOutput:
        group = gather(images, references)
        tokens = easyref.encoder.encode(
            group, prompt, aggregation, image_size, negative_references or (), mllm_layers
        )
        return io.NodeOutput(tokens)
