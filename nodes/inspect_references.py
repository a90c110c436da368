"""EasyRef Inspect: the reference tokens' attention to each reference, and where in it."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..easyref_core.adapter.layer_pooling import POOLS
from ..easyref_core.encode.heat_maps import draw_heat_maps
from ..easyref_core.encode.inspection import report
from ..easyref_core.encode.mllm_layers import MllmLayerWeights
from .checked import checked
from .inputs import gather, image_size_input, images_input, mllm_layers_input, prompt_input
from .link_types import EasyRef, EasyRefModel, EasyRefReferenceGroup, References
from .newer_core import ADVANCED, found_by


@checked
class EasyRefInspect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefInspect",
            display_name="EasyRef Inspect",
            category="EasyRef",
            description="Shows how much attention the reference tokens pay to each reference, with "
            "a heat map over it.",
            inputs=[
                EasyRef.Input("easyref", tooltip="From EasyRef Loader."),
                images_input(),
                EasyRefReferenceGroup.Input(
                    "references",
                    optional=True,
                    tooltip="The same group as for EasyRef Encode, weights included.",
                ),
                prompt_input("The same prompt as for EasyRef Encode."),
                image_size_input("As in EasyRef Encode; 0: the size the adapter was trained with."),
                io.Combo.Input(
                    "aggregation",
                    options=["easyref", *POOLS],
                    default="easyref",
                    optional=True,
                    tooltip="As in EasyRef Encode.",
                    **ADVANCED,
                ),
                mllm_layers_input(),
            ],
            outputs=[
                io.Image.Output(
                    display_name="heat_maps",
                    tooltip="Each reference with its attention as colours, and its share below.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="One line per reference with its share, then the shares of prompt and "
                    "tokens.",
                ),
            ],
            **found_by("attention map, heat map, debug, explain, reference"),
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        easyref: EasyRefModel,
        prompt: str,
        image_size: int,
        images: torch.Tensor | None = None,
        references: References | None = None,
        aggregation: str = "easyref",
        mllm_layers: MllmLayerWeights | None = None,
    ) -> io.NodeOutput:
        group = gather(images, references)
        inspection = easyref.encoder.inspect(group, prompt, aggregation, image_size, mllm_layers)
        cards = draw_heat_maps(inspection, [reference.picture for reference in group])
        heat_maps = torch.stack(
            [torch.from_numpy(np.asarray(card, dtype=np.float32) / 255) for card in cards]
        )
        text = report(inspection)
        shown = {**ui.PreviewImage(heat_maps, cls=cls).as_dict(), "text": (text,)}
        return io.NodeOutput(heat_maps, text, ui=shown)
