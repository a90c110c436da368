"""EasyRef Crop: crops references by mask or box."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..easyref_core.pictures.crop import Box, crop_pictures, mask_boxes
from .checked import checked
from .inputs import references_from_batch, share_input
from .link_types import EasyRefReferenceGroup, References
from .newer_core import found_by


@checked
class EasyRefCrop(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefCrop",
            display_name="EasyRef Crop",
            category="EasyRef",
            description="Crops references to a mask or a box, so that a face fills the frame. "
            "Several masks on one picture give several crops.",
            inputs=[
                io.Image.Input("images", tooltip="A picture, or a batch of pictures of one size."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="What to keep (white): one mask for all pictures, one per picture, or "
                    "several for one picture. It is resized to the picture.",
                ),
                share_input(
                    "x",
                    0.0,
                    "Left side of the box as a fraction of the picture's width. Only used without "
                    "a mask, as are y, width and height.",
                ),
                share_input("y", 0.0, "Top of the box as a fraction of the picture's height."),
                share_input("width", 1.0, "Width of the box as a fraction of the picture's width."),
                share_input(
                    "height", 1.0, "Height of the box as a fraction of the picture's height."
                ),
                io.Float.Input(
                    "padding",
                    default=0.25,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Margin on every side of the mask or box, as a fraction of its longer "
                    "side.",
                ),
                io.Boolean.Input(
                    "square",
                    default=True,
                    tooltip="Extend the crop to a square as far as the picture allows. Nothing "
                    "inside the mask or box is ever cut off.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images",
                    tooltip="The crops as a list, as their sizes differ.",
                    is_output_list=True,
                ),
                EasyRefReferenceGroup.Output(
                    display_name="references",
                    tooltip="The crops as one group, for EasyRef Encode.",
                ),
            ],
            **found_by("face, crop face, mask to crop, reference"),
        )

    @classmethod
    def execute(
        cls,
        images: torch.Tensor,
        x: float,
        y: float,
        width: float,
        height: float,
        padding: float,
        square: bool,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        boxes = mask_boxes(mask) if mask is not None else [Box(x, y, width, height)]
        crops = crop_pictures(images, boxes, padding, square)
        group: References = ()
        for number, crop in enumerate(crops, start=1):
            group += references_from_batch(crop, f"crop {number}" if len(crops) > 1 else "crop")
        return io.NodeOutput(crops, group)
