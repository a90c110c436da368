"""EasyRef References: a group of pictures of any sizes, with a weight."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..easyref_core.errors import EasyRefError
from .host.gallery import checked_gallery, gallery_references, gallery_stamps
from .inputs import references_from_batch
from .link_types import EasyRefReferenceGroup, References

_COUNT = 8


class EasyRefReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefReferences",
            display_name="EasyRef References",
            category="EasyRef",
            description="Gathers reference pictures of any sizes into one group: files dropped "
            "into the gallery, each with its weight and crop, and connected pictures. Several of "
            "these nodes can be chained.",
            inputs=[
                io.Image.Input(
                    f"image_{number}",
                    optional=True,
                    tooltip="A picture, or a batch of pictures of one size. Each input may have "
                    "another size; nothing is cropped.",
                )
                for number in range(1, _COUNT + 1)
            ]
            + [
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.0,
                    max=5.0,
                    step=0.05,
                    tooltip="How much attention the reference tokens pay to these pictures: 1 as "
                    "trained, 2 twice as much, 0 none.",
                ),
                EasyRefReferenceGroup.Input(
                    "previous",
                    optional=True,
                    tooltip="References that come before these in the group.",
                ),
                io.String.Input(
                    "gallery",
                    optional=True,
                    default="",
                    socketless=True,
                    tooltip="Pictures of ComfyUI's input folder with their weights and crops, as "
                    "text. They come after previous and before image_1. The gallery in the node "
                    "writes it.",
                ),
            ],
            outputs=[
                EasyRefReferenceGroup.Output(
                    display_name="references", tooltip="The group, in order."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, gallery: str | None = None) -> bool | str:
        try:
            checked_gallery(gallery or "")  # None where another node will give it
        except EasyRefError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, gallery: str | None = None, **_: Any) -> Any:
        return gallery_stamps(gallery or "")

    @classmethod
    def execute(
        cls,
        image_1: torch.Tensor | None = None,
        weight: float = 1.0,
        previous: References | None = None,
        gallery: str = "",
        **images: torch.Tensor | None,
    ) -> io.NodeOutput:
        images = {"image_1": image_1, **images}
        group: References = (previous or ()) + gallery_references(gallery, weight)
        for number in range(1, _COUNT + 1):
            batch = images.get(f"image_{number}")
            if batch is not None:
                group += references_from_batch(batch, f"image_{number}", weight)
        if not group:
            raise EasyRefError(
                "EasyRef References has no picture. Drop picture files onto the node, or connect "
                "pictures to image_1."
            )
        return io.NodeOutput(group)
