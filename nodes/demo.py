"""EasyRef Demo Models: a complete small model set, and the switch between it and real models."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..easyref_core.errors import EasyRefError
from .host.demo_latents import empty_latent, shrink_latent
from .host.demo_models import load_demo_set
from .link_types import EasyRef, EasyRefModel
from .newer_core import found_by

_NEEDED = ("model", "clip", "vae", "easyref")
_NO_CONTROL_NET = (
    "control_net of EasyRef Demo Models is used, but nothing is connected to its control_net "
    "input, and the demo ControlNet does not fit real models. Connect Load ControlNet Model, or "
    "mute all loaders to run on the demo models."
)
_NO_LATENT = (
    "latent of EasyRef Demo Models is used, but nothing is connected to its latent input. Connect "
    "Empty Latent Image, or mute all loaders to run on the demo models."
)


class EasyRefDemoModels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefDemoModels",
            display_name="EasyRef Demo Models",
            category="EasyRef",
            description="Passes your models on. With none connected, or with their loaders muted, "
            "it gives small stand-ins for all of them, for trying a graph out on any computer. "
            "They know drawn characters in simple scenes.",
            inputs=[
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Your SDXL model. Connect all of model, clip, vae and easyref, or "
                    "none of them for the demo models.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Its text encoders."),
                io.Vae.Input("vae", optional=True, tooltip="Its autoencoder."),
                EasyRef.Input("easyref", optional=True, tooltip="From EasyRef Loader."),
                io.ControlNet.Input(
                    "control_net",
                    optional=True,
                    tooltip="Your ControlNet, if the graph uses one.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="Better left free: a change here runs all that uses the models again. "
                    "EasyRef Demo Latent makes a latent fit without that.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="Yours, or a small UNet built like SDXL's."
                ),
                io.Clip.Output(display_name="clip", tooltip="Yours, or the demo's text encoders."),
                io.Vae.Output(display_name="vae", tooltip="Yours, or the demo's autoencoder."),
                EasyRef.Output(
                    display_name="easyref", tooltip="Yours, or the demo's adapter and MLLM."
                ),
                io.ControlNet.Output(
                    display_name="control_net", tooltip="Yours, or the demo's ControlNet."
                ),
                io.Latent.Output(
                    display_name="latent", tooltip="Yours; for the demo models a smaller one."
                ),
            ],
            **found_by("demo", "example models", "tiny models", "test"),
        )

    @classmethod
    def execute(
        cls,
        model: Any = None,
        clip: Any = None,
        vae: Any = None,
        easyref: EasyRefModel | None = None,
        control_net: Any = None,
        latent: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        given = dict(zip(_NEEDED, (model, clip, vae, easyref), strict=True))
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == len(given) and control_net is None:
            return io.NodeOutput(*_demo_models(latent))
        if missing:
            present = [name for name in given if name not in missing]
            present += ["control_net"] if control_net is not None else []
            raise EasyRefError(
                f"EasyRef Demo Models has {', '.join(present)} connected, but not "
                f"{', '.join(missing)}: demo and real models do not fit together. Connect "
                "what is missing, or disconnect or mute all loaders to run on the demo models."
            )
        if control_net is None:
            control_net = ExecutionBlocker(_NO_CONTROL_NET)
        if latent is None:
            latent = ExecutionBlocker(_NO_LATENT)
        return io.NodeOutput(*given.values(), control_net, latent)


def _demo_models(latent: dict[str, Any] | None) -> tuple[Any, ...]:
    """The demo set and a latent of its size, in the order of the outputs."""
    demo = load_demo_set()
    if demo.control_net is None:
        raise EasyRefError(
            f"The demo set in {demo.directory} has no ControlNet. Install EasyRef again."
        )
    easyref = EasyRefModel.of(demo.adapter_file, demo.mllm_directory, picture_side=demo.side)
    latent = empty_latent(demo.side) if latent is None else shrink_latent(latent, demo.side)
    return demo.model, demo.clip, demo.vae, easyref, demo.control_net, latent
