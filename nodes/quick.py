"""EasyRef Quick: EasyRef Encode and EasyRef Apply in one node."""

from __future__ import annotations

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from .apply import EasyRefApply
from .checked import checked
from .encode import EasyRefEncode
from .inputs import images_input, prompt_input, weight_input
from .link_types import EasyRef, EasyRefModel, EasyRefReferenceGroup, References
from .newer_core import found_by


@checked
class EasyRefQuick(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefQuick",
            display_name="EasyRef Quick",
            category="EasyRef",
            description="EasyRef Encode and EasyRef Apply in one, with their defaults: the node to "
            "start with.",
            inputs=[
                io.Model.Input("model", tooltip="An SDXL model."),
                EasyRef.Input("easyref", tooltip="From EasyRef Loader."),
                images_input(),
                prompt_input(),
                weight_input(
                    "How strongly the references act: 1 as trained, 0 not at all, below 0 "
                    "away from them."
                ),
                EasyRefReferenceGroup.Input(
                    "references",
                    optional=True,
                    tooltip="Reference pictures of any sizes, from EasyRef References or EasyRef "
                    "Crop.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The steered model.")],
            **found_by(
                "ip-adapter, ipadapter, reference, character, style, "
                "consistent, face, multi image, image prompt"
            ),
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        easyref: EasyRefModel,
        prompt: str,
        weight: float,
        images: torch.Tensor | None = None,
        references: References | None = None,
    ) -> io.NodeOutput:
        (tokens,) = EasyRefEncode.execute(
            easyref=easyref,
            prompt=prompt,
            aggregation="easyref",
            image_size=0,
            images=images,
            references=references,
        ).args
        return EasyRefApply.execute(
            model=model,
            easyref=easyref,
            tokens=tokens,
            weight=weight,
            start_percent=0.0,
            end_percent=1.0,
            lora_strength=1.0,
        )
