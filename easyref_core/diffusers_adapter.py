"""The adapter on a diffusers `UNet2DConditionModel`, for use without ComfyUI and for training.

As in the official code, the UNet's encoder states are text states followed by N reference tokens,
and each processor tells them apart. The processors' state dict has the official checkpoint's keys
(`<layer>.processor.to_k_ip.weight`, `<layer>.processor.to_q_lora.down.weight`, ...).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .adapter import check_model_layers
from .attention import add_references, sdpa
from .checkpoint import AdapterCheckpoint
from .errors import EasyRefError

if TYPE_CHECKING:
    from diffusers import ControlNetModel, UNet2DConditionModel

_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")
_SUFFIX = ".processor"


class LowRank(nn.Module):
    """up(down(x)), no alpha; starts as zero."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))


class EasyRefProcessor(nn.Module):
    """Attention processor: LoRA where `rank` > 0, reference tokens where `num_tokens` > 0.

    Args:
        width: of the queries.
        context_width: of what keys and values are made from (the text's, or `width`).
        num_tokens: reference tokens at the end of the encoder states; 0 for self-attention.
        rank: of the LoRA; 0 for none.
    """

    def __init__(self, width: int, context_width: int, num_tokens: int, rank: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.scale = 1.0
        self.has_lora = rank > 0
        if self.has_lora:
            self.to_q_lora = LowRank(width, width, rank)
            self.to_k_lora = LowRank(context_width, width, rank)
            self.to_v_lora = LowRank(context_width, width, rank)
            self.to_out_lora = LowRank(width, width, rank)
        if num_tokens:
            self.to_k_ip = nn.Linear(context_width, width, bias=False)
            self.to_v_ip = nn.Linear(context_width, width, bias=False)

    def forward(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, T, width] -> [B, T, width], as diffusers calls it.

        Raises:
            EasyRefError: an attention mask, or encoder states without room for the tokens.
        """
        if attention_mask is not None:
            raise EasyRefError(
                "An attention mask was given to a UNet with EasyRef, whose text states are never "
                "masked. Call the UNet without encoder_attention_mask."
            )
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        references = None
        if self.num_tokens:
            if context.shape[1] <= self.num_tokens:
                raise EasyRefError(
                    f"The encoder states have {context.shape[1]} rows; text states followed by "
                    f"{self.num_tokens} reference tokens are needed."
                )
            split = context.shape[1] - self.num_tokens
            context, references = context[:, :split], context[:, split:]
        query = self._project(attn.to_q, "to_q", hidden_states)
        key = self._project(attn.to_k, "to_k", context)
        value = self._project(attn.to_v, "to_v", context)
        out = sdpa(query, key, value, attn.heads)
        if references is not None:
            out = add_references(
                out,
                query,
                self.to_k_ip(references),
                self.to_v_ip(references),
                self.scale,
                lambda q, k, v: sdpa(q, k, v, attn.heads),
            )
        out = self._project(attn.to_out[0], "to_out", out)
        return attn.to_out[1](out)  # dropout

    def _project(self, linear: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x) + getattr(self, f"{name}_lora")(x) if self.has_lora else linear(x)


class TextOnlyProcessor:
    """For a ControlNet that is handed the UNet's encoder states: it drops the reference tokens."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        context = hidden_states
        if encoder_hidden_states is not None:
            context = encoder_hidden_states[:, : -self.num_tokens]
        out = sdpa(attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context), attn.heads)
        return attn.to_out[1](attn.to_out[0](out))


def cross_attention_layers(unet: UNet2DConditionModel) -> dict[str, tuple[int, int]]:
    """Cross-attention layers of a UNet -> (query width, context width)."""
    return {
        name.removesuffix(_SUFFIX): _widths(unet, name)
        for name in unet.attn_processors
        if name.endswith(f"attn2{_SUFFIX}")
    }


def _widths(unet: UNet2DConditionModel, processor: str) -> tuple[int, int]:
    attn = unet.get_submodule(processor.removesuffix(_SUFFIX))
    return attn.to_q.in_features, attn.to_k.in_features


def _processors(
    unet: UNet2DConditionModel, num_tokens: int, rank: int
) -> dict[str, EasyRefProcessor]:
    """Untrained processors for every attention layer, by diffusers' name."""
    return {
        name: EasyRefProcessor(
            *_widths(unet, name), num_tokens if name.endswith(f"attn2{_SUFFIX}") else 0, rank
        )
        for name in unet.attn_processors
    }


def _install(unet: UNet2DConditionModel, processors: dict[str, EasyRefProcessor]) -> None:
    like = next(unet.parameters())
    unet.set_attn_processor({n: p.to(like.device, like.dtype) for n, p in processors.items()})


def new_adapter(unet: UNet2DConditionModel, num_tokens: int, rank: int = 0) -> None:
    """Put an untrained adapter on a UNet: to_k_ip and to_v_ip start from the base's to_k and to_v
    (official training), LoRA from zero.
    """
    processors = _processors(unet, num_tokens, rank)
    for name, processor in processors.items():
        if processor.num_tokens:
            attn = unet.get_submodule(name.removesuffix(_SUFFIX))
            processor.to_k_ip.load_state_dict({"weight": attn.to_k.weight})
            processor.to_v_ip.load_state_dict({"weight": attn.to_v.weight})
    _install(unet, processors)


def attach_adapter(
    unet: UNet2DConditionModel,
    checkpoint: AdapterCheckpoint,
    scale: float = 1.0,
    new_lora_rank: int = 0,
) -> None:
    """Put a trained adapter on a UNet, LoRA included (it stays on at every scale, as officially).

    Args:
        scale: see `set_scale`.
        new_lora_rank: an adapter without LoRA gets one of this rank that starts from zero (0 for
            none); one that has a LoRA keeps it.

    Raises:
        EasyRefError: the adapter was made for another UNet; nothing is changed then.
    """
    check_model_layers(checkpoint, cross_attention_layers(unet), type(unet).__name__)
    rank = checkpoint.lora_rank or new_lora_rank
    processors = _processors(unet, checkpoint.num_tokens, rank)
    with checkpoint.file.open() as get:
        for name, processor in processors.items():
            layer = name.removesuffix(_SUFFIX)
            new = {} if checkpoint.lora else processor.state_dict()
            weights = {name: weight for name, weight in new.items() if "_lora." in name}
            weights |= {
                f"{part}.weight": get(source)
                for part, source in checkpoint.cross_attention.get(layer, {}).items()
            }
            weights |= {
                f"{part}_lora.{half}.weight": get(source)
                for part, halves in checkpoint.lora.get(layer, {}).items()
                for half, source in halves.items()
            }
            try:
                processor.load_state_dict(weights)
            except RuntimeError as error:
                raise EasyRefError(
                    f"{checkpoint.name} does not fit the UNet at {layer}: {error} "
                    "Use the UNet it was trained with."
                ) from error
    _install(unet, processors)
    set_scale(unet, scale)


def set_scale(unet: UNet2DConditionModel, scale: float) -> None:
    """How strongly the reference tokens act; 0 leaves only the LoRA."""
    for processor in unet.attn_processors.values():
        if isinstance(processor, EasyRefProcessor):
            processor.scale = scale


@torch.no_grad()
def merge_lora(unet: UNet2DConditionModel) -> None:
    """Fold the LoRA into the UNet's own weights: the same result, with no cost at run time."""
    for name, processor in unet.attn_processors.items():
        if not isinstance(processor, EasyRefProcessor) or not processor.has_lora:
            continue
        attn = unet.get_submodule(name.removesuffix(_SUFFIX))
        for part in _PROJECTIONS:
            linear = attn.to_out[0] if part == "to_out" else getattr(attn, part)
            low = getattr(processor, f"{part}_lora")
            linear.weight += (low.up.weight.float() @ low.down.weight.float()).to(linear.weight)
            delattr(processor, f"{part}_lora")
        processor.has_lora = False


def hide_references(controlnet: ControlNetModel, num_tokens: int) -> None:
    """Let a ControlNet see the text alone, as in the official code."""
    controlnet.set_attn_processor(TextOnlyProcessor(num_tokens))
