"""EasyRef Demo Models: a complete set of small models, with reference pictures for them."""

from __future__ import annotations

from comfy_api.latest import io

from .checked import checked
from .host.demo_models import load_demo_set
from .link_types import EasyRef, EasyRefModel
from .newer_core import found_by


@checked
class EasyRefDemoModels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefDemoModels",
            display_name="EasyRef Demo Models",
            category="EasyRef",
            description="Loads the small models and reference pictures that come with EasyRef, to "
            "try it out on any computer. The models know drawn characters in simple scenes, at "
            "128 x 128 pixels.",
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="A small UNet built like SDXL's."),
                io.Clip.Output(display_name="clip", tooltip="Its two text encoders."),
                io.Vae.Output(display_name="vae", tooltip="Its autoencoder."),
                EasyRef.Output(display_name="easyref", tooltip="The adapter and its MLLM."),
                io.ControlNet.Output(
                    display_name="control_net", tooltip="A ControlNet for outlines of characters."
                ),
                io.Image.Output(
                    display_name="images", tooltip="Four pictures of one character, as references."
                ),
            ],
            **found_by("demo", "example models", "tiny models", "test"),
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        demo = load_demo_set()
        easyref = EasyRefModel.of(demo.adapter_file, demo.mllm_directory)
        return io.NodeOutput(
            demo.model, demo.clip, demo.vae, easyref, demo.control_net, demo.images
        )
