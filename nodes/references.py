"""EasyRef References: a group of pictures of any sizes, with a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from comfy_api.latest import io

from ..easyref_core.errors import EasyRefError
from .checked import checked
from .gallery.gallery import checked_gallery, gallery_references, gallery_stamps
from .inputs import Numbered, accepted, connected, references_from_batch
from .link_types import EasyRefReferenceGroup, References
from .newer_core import found_by


@checked
class EasyRefReferences(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefReferences",
            display_name="EasyRef References",
            category="EasyRef",
            description="Collects reference pictures of any sizes into one group: files in the "
            "gallery, each with its weight and crop, and connected pictures. Several of these "
            "nodes can be chained.",
            inputs=[
                # First, as sockets after growing ones change their index.
                EasyRefReferenceGroup.Input(
                    "previous",
                    optional=True,
                    tooltip="References that come before these in the group.",
                ),
                io.Autogrow.Input(
                    "images",
                    template=Numbered(io.Image.Input("image", optional=True)),
                    optional=True,
                    tooltip="Pictures or batches of pictures; a new input appears as you connect, "
                    "up to 100. Inputs may differ in size; nothing is cropped.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.0,
                    max=5.0,
                    step=0.05,
                    tooltip="How much attention the reference tokens pay to these pictures: 1 as "
                    "trained, 2 twice as much, 0 none.",
                ),
                io.String.Input(
                    "gallery",
                    optional=True,
                    default="",
                    socketless=True,
                    tooltip="The gallery as text: files in ComfyUI's input folder with weights and "
                    "crops. They come after previous and before image_1.",
                ),
            ],
            outputs=[
                EasyRefReferenceGroup.Output(
                    display_name="references", tooltip="The group, in order."
                )
            ],
            **found_by("reference images, multi image, image batch, gallery, load images, folder"),
        )

    @classmethod
    def validate_inputs(
        cls, gallery: str | None = None, images: Mapping[str, Any] | None = None
    ) -> bool | str:
        # ComfyUI passes growing inputs too; gallery is None if it is linked.
        return accepted(lambda: checked_gallery(gallery or ""))

    @classmethod
    def fingerprint_inputs(cls, gallery: str | None = None, **_: Any) -> Any:
        return gallery_stamps(gallery or "")

    @classmethod
    def execute(
        cls,
        weight: float = 1.0,
        previous: References | None = None,
        images: Mapping[str, torch.Tensor] | None = None,
        gallery: str = "",
    ) -> io.NodeOutput:
        group: References = (previous or ()) + gallery_references(gallery, weight)
        for number, batch in connected(images, "images", "image"):
            group += references_from_batch(batch, f"image_{number}", weight)
        if not group:
            raise EasyRefError(
                "EasyRef References has no picture. Drop picture files onto the node, or connect "
                "pictures to image_1."
            )
        return io.NodeOutput(group)
