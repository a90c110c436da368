"""EasyRef Identity: fine detail of reference pictures into a model's self-attention."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..easyref_core.adapter.identity import IdentityLora
from ..easyref_core.adapter.key_values import identity_lora_weights
from ..easyref_core.adapter.layer_weights import LayerWeights
from ..easyref_core.errors import EasyRefError
from ..easyref_core.untrusted import escaped
from .checked import checked
from .host.reference_latents import ReferenceLatents
from .host.unet_layers import SelfAttentionLayer, group_of, model_name, self_attention_layers
from .inputs import gather, images_input, share_input, weight_input, weights_in_range
from .link_types import (
    EasyRef,
    EasyRefCurve,
    EasyRefLayerWeightsLink,
    EasyRefModel,
    EasyRefReferenceGroup,
    References,
)
from .newer_core import ADVANCED, found_by
from .sampling.identity import IdentityPatch
from .sampling.weights import Weight

MAX_REUSE = 100


@checked
class EasyRefIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="EasyRefIdentity",
            display_name="EasyRef Identity",
            category="EasyRef",
            description="Carries fine detail of reference pictures into the picture: in each step "
            "the model also reads the pictures' latents, and its self-attention attends to them. "
            "Needs no adapter; goes beside EasyRef Apply.",
            inputs=[
                io.Model.Input("model", tooltip="An SDXL model."),
                io.Vae.Input("vae", tooltip="The model's VAE; it encodes the pictures."),
                images_input(),
                EasyRefReferenceGroup.Input(
                    "references",
                    optional=True,
                    tooltip="From EasyRef References or Gallery. A picture of weight 0 is left "
                    "out; other weights do not count here.",
                ),
                weight_input(
                    "How strongly the pictures act: 0 not at all, 1 as if they were part of the "
                    "picture, below 0 away from them."
                ),
                share_input(
                    "start_percent",
                    0.0,
                    "From which part of the sampling on the pictures act. Later leaves the "
                    "composition to prompt and tokens.",
                ),
                share_input(
                    "end_percent", 1.0, "Until which part of the sampling the pictures act."
                ),
                io.Int.Input(
                    "reuse_steps",
                    default=1,
                    min=1,
                    max=MAX_REUSE,
                    step=1,
                    tooltip="For how many steps one reading of the pictures serves. 1 reads them "
                    "in every step; more is faster and less exact, by an error that is shown "
                    "here after the sampling.",
                    **ADVANCED,
                ),
                EasyRef.Input(
                    "easyref",
                    optional=True,
                    tooltip="An adapter with a trained identity LoRA. Without one the pictures "
                    "act untrained.",
                ),
                EasyRefCurve.Input(
                    "curve",
                    optional=True,
                    tooltip="From EasyRef Weight Curve or EasyRef Stages: multiplies the weight "
                    "over the sampling.",
                ),
                EasyRefLayerWeightsLink.Input(
                    "layer_weights",
                    optional=True,
                    tooltip="From EasyRef Layer Weights: more or less of the pictures in some "
                    "layers.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the picture the references act (white), stretched to the "
                    "picture's shape. One for all latents, or one each.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The steered model.")],
            hidden=[io.Hidden.unique_id],
            **found_by(
                "reference only, self-attention, consistent, character, face, detail, vae reference"
            ),
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        vae: Any,
        weight: float = 1.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        reuse_steps: int = 1,
        images: torch.Tensor | None = None,
        references: References | None = None,
        easyref: EasyRefModel | None = None,
        curve: Weight | None = None,
        layer_weights: LayerWeights | None = None,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        weights = weights_in_range(weight, start_percent, end_percent, mask, layer_weights, curve)
        group = tuple(one for one in gather(images, references) if one.weight > 0)
        if not group:
            raise EasyRefError(
                "There are no reference pictures, or all have weight 0. Connect images, or "
                "references from EasyRef References."
            )
        latents = ReferenceLatents(vae, group)
        kind, layers = model_name(model), self_attention_layers(model)
        if not layers:
            raise EasyRefError(
                f"{kind} has no self-attention layers that EasyRef knows. Connect an SDXL model."
            )
        for one in weights:
            one.check_layers({group_of(layer.block) for layer in layers.values()}, kind)
        lora = _identity_lora(easyref, layers, kind) if easyref is not None else {}
        patch = IdentityPatch(latents, layers, weights, reuse_steps, lora, _node_id(cls))
        steered = model.clone()
        patch.add_to(steered)
        return io.NodeOutput(steered)


def _identity_lora(
    easyref: EasyRefModel, layers: dict[str, SelfAttentionLayer], model: str
) -> dict[str, IdentityLora]:
    """The adapter's identity LoRA.

    Raises:
        EasyRefError: it has none, or it is for another model.
    """
    checkpoint = easyref.checkpoint
    weights = identity_lora_weights(checkpoint)
    if not weights:
        raise EasyRefError(
            f"{checkpoint.name} has no identity LoRA. Disconnect easyref, and the pictures act "
            "untrained; or train one with recipes/5_identity.yaml."
        )
    for layer, lora in weights.items():
        found = layers.get(layer)
        if found is None or lora.key_down.shape[1] != found.width:
            width = "no such layer" if found is None else f"width {found.width} there"
            raise EasyRefError(
                f"{checkpoint.name} has an identity LoRA of width {lora.key_down.shape[1]} for "
                f"{escaped(layer)}, but {model} has {width}. Connect a model of the architecture "
                "the adapter was trained on (SDXL base)."
            )
    return weights


def _node_id(node: type[io.ComfyNode]) -> str | None:
    """Of the node in the graph that runs; None outside a graph."""
    return getattr(node.hidden, "unique_id", None)
