"""EasyRef Apply: reference tokens into a model's cross-attention."""

from __future__ import annotations

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..easyref_core.adapter import check_model_layers, check_tokens
from ..easyref_core.errors import EasyRefError
from ..easyref_core.tokens import ReferenceTokens
from .host.layers import cross_attention_layers, model_name
from .host.lora import apply_lora
from .host.masks import Mask
from .host.patch import Application
from .link_types import EasyRef, EasyRefModel, EasyRefTokens


class EasyRefApply(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefApply",
            display_name="EasyRef Apply",
            category="EasyRef",
            description="Steers an SDXL model with reference tokens. Several of these nodes add "
            "up; ControlNets, LoRAs and other attention nodes may stand before or behind.",
            inputs=[
                io.Model.Input("model", tooltip="An SDXL model."),
                EasyRef.Input("easyref", tooltip="The adapter that made the tokens."),
                EasyRefTokens.Input("tokens", tooltip="From EasyRef Encode or Load Tokens."),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-1.0,
                    max=3.0,
                    step=0.05,
                    tooltip="How strongly the references act: 1 as trained, 0 not at all, below 0 "
                    "away from them.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="From which part of the sampling on the references act. Later leaves "
                    "the composition to the prompt.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Until which part of the sampling the references act.",
                ),
                io.Float.Input(
                    "lora_strength",
                    default=1.0,
                    min=-1.0,
                    max=3.0,
                    step=0.05,
                    tooltip="Strength of the LoRA that was trained with the adapter; it acts "
                    "during the whole sampling whatever the weight. 1 as trained. Of several "
                    "Apply nodes with one adapter, the last one's counts.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the picture the references act (white), stretched to the "
                    "picture's shape. One for all latents, or one each.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The steered model.")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        easyref: EasyRefModel,
        tokens: ReferenceTokens,
        weight: float,
        start_percent: float,
        end_percent: float,
        lora_strength: float,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        if start_percent > end_percent:
            raise EasyRefError(
                f"start_percent ({start_percent}) lies behind end_percent ({end_percent}), so the "
                "references would never act. Swap them, or set weight to 0."
            )
        checkpoint = easyref.checkpoint
        check_tokens(checkpoint, tokens)
        layers = cross_attention_layers(model)
        check_model_layers(
            checkpoint, {name: layer.widths for name, layer in layers.items()}, model_name(model)
        )
        application = Application(
            tokens,
            easyref.key_values,
            {name: layers[name].block for name in checkpoint.cross_attention},
            weight,
            start_percent,
            end_percent,
            Mask(mask) if mask is not None else None,
        )
        steered = model.clone()
        apply_lora(steered, checkpoint, lora_strength)
        if weight != 0:
            application.add_to(steered)
        return io.NodeOutput(steered)
