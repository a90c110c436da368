"""EasyRef Demo Models: a complete small model set, so that every workflow runs with no download."""

from __future__ import annotations

from comfy_api.latest import io

from ..easyref_core.checkpoint import load_checkpoint
from ..easyref_core.errors import EasyRefError
from .host.demo_models import load_demo_set
from .host.encoder import HostedEncoder
from .host.key_values import KeyValueStore
from .link_types import EasyRef, EasyRefModel


class EasyRefDemoModels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefDemoModels",
            display_name="EasyRef Demo Models",
            category="EasyRef",
            description="Small stand-ins for all models of an EasyRef graph, for trying one out "
            "on any computer. Untrained so far: pictures are noise.",
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="A small UNet built like SDXL's."),
                io.Clip.Output(display_name="clip", tooltip="Its text encoders."),
                io.Vae.Output(display_name="vae", tooltip="Its autoencoder."),
                EasyRef.Output(display_name="easyref", tooltip="Its adapter and MLLM."),
                io.ControlNet.Output(display_name="control_net", tooltip="Its ControlNet."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        demo = load_demo_set()
        if demo.control_net is None:
            raise EasyRefError(
                f"The demo set in {demo.directory} has no ControlNet. Install EasyRef again."
            )
        checkpoint = load_checkpoint(demo.adapter_file)
        encoder = HostedEncoder(checkpoint, demo.mllm_directory, "auto")
        easyref = EasyRefModel(checkpoint, encoder, KeyValueStore(checkpoint))
        return io.NodeOutput(demo.model, demo.clip, demo.vae, easyref, demo.control_net)
