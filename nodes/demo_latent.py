"""EasyRef Demo Latent: the sampler's latent, at the demo models' size where they are in use."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .host.demo_latents import shrink_latent
from .link_types import EasyRef, EasyRefModel
from .newer_core import found_by


class EasyRefDemoLatent(io.ComfyNode):
    """A node of its own, so that another batch size or shape runs the sampler again and no more."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefDemoLatent",
            display_name="EasyRef Demo Latent",
            category="EasyRef",
            description="Passes a latent on. With the demo models it is made as small as their "
            "pictures are, with the same shape and batch.",
            inputs=[
                io.Latent.Input(
                    "latent",
                    tooltip="What the sampler starts from, such as Empty Latent Image.",
                ),
                EasyRef.Input(
                    "easyref",
                    tooltip="From EasyRef Demo Models; tells whether the demo models are in use.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="latent",
                    tooltip="Yours; for the demo models a smaller one. For KSampler.",
                )
            ],
            **found_by("demo", "empty latent"),
        )

    @classmethod
    def execute(cls, latent: dict[str, Any], easyref: EasyRefModel) -> io.NodeOutput:
        if easyref.picture_side is None:
            return io.NodeOutput(latent)
        return io.NodeOutput(shrink_latent(latent, easyref.picture_side))
