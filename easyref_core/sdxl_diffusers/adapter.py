"""The adapter on a diffusers `UNet2DConditionModel`, for use without ComfyUI and for training.

As in the official code, the UNet's encoder states are text states followed by N reference tokens,
and each processor splits them. The processors' state dict has the official checkpoint's keys
(`<layer>.processor.to_k_ip.weight`, `<layer>.processor.to_q_lora.down.weight`, ...).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..adapter.checkpoint import AdapterCheckpoint
from ..adapter.key_values import check_model_layers, check_tokens, read_finite
from ..adapter.parts import LORA
from ..errors import EasyRefError
from ..tokens.reference_tokens import ReferenceTokens
from .processors import (
    Attachment,
    EasyRefProcessor,
    LowRank,
    TextOnlyProcessor,
)

if TYPE_CHECKING:
    from diffusers import ControlNetModel, UNet2DConditionModel

_SUFFIX = ".processor"


def cross_attention_layers(unet: UNet2DConditionModel) -> dict[str, tuple[int, int]]:
    """Cross-attention layers of a UNet -> (query width, context width)."""
    return {
        name.removesuffix(_SUFFIX): _widths(unet, name)
        for name in unet.attn_processors
        if _is_cross_attention(name)
    }


def new_adapter(unet: UNet2DConditionModel, num_tokens: int, rank: int = 0) -> None:
    """Put an untrained adapter on a UNet: to_k_ip and to_v_ip start from the base's to_k and to_v
    (official training), LoRA from zero. On a UNet on the meta device it is on the meta device too.

    Raises:
        EasyRefError: the UNet holds the LoRA of an adapter already.
    """
    attachment = _attachment_for(unet, "new_adapter")
    processors = _processors(unet, rank, attachment)
    for name, processor in processors.items():
        if processor.is_cross_attention:
            attn = unet.get_submodule(name.removesuffix(_SUFFIX))
            processor.to_k_ip.load_state_dict({"weight": attn.to_k.weight})
            processor.to_v_ip.load_state_dict({"weight": attn.to_v.weight})
    _install(unet, processors, attachment)
    attachment.checkpoint, attachment.references = None, num_tokens


def attach_adapter(
    unet: UNet2DConditionModel,
    checkpoint: AdapterCheckpoint,
    scale: float = 1.0,
    new_lora_rank: int = 0,
) -> None:
    """Put a trained adapter on a UNet, LoRA included (it stays on at every scale, as officially).

    It replaces another adapter. The encoder states' last rows are the adapter's reference tokens
    until `append_tokens` or `set_tokens` says otherwise.

    Args:
        scale: see `set_scale`.
        new_lora_rank: rank of a new LoRA, starting from zero, for an adapter without one; 0 for
            none.

    Raises:
        EasyRefError: the adapter was made for another UNet, or is damaged; the UNet's weights are
            not in memory, or hold the LoRA of an adapter already. Nothing is changed then.
    """
    check_model_layers(checkpoint, cross_attention_layers(unet), type(unet).__name__)
    _check_in_memory(unet, "attach_adapter")
    attachment = _attachment_for(unet, "attach_adapter")
    new_lora = bool(new_lora_rank) and not checkpoint.lora
    # Weights that all come from the file need no memory and no random numbers before.
    with nullcontext() if new_lora else torch.device("meta"):
        processors = _processors(unet, checkpoint.lora_rank or new_lora_rank, attachment)
    like = next(unet.parameters())
    with checkpoint.file.open() as get:
        for name, processor in processors.items():
            layer = name.removesuffix(_SUFFIX)
            state = processor.state_dict()
            weights = {own: state[own] for own in state if new_lora and "_lora." in own}
            for own, source in _sources(checkpoint, layer).items():
                weight = read_finite(checkpoint, get, source)
                # A copy: a mapped tensor changes, or crashes, when its file is overwritten.
                weights[own] = weight.to(like.device, like.dtype, copy=True)
            try:
                processor.load_state_dict(weights, assign=True)
            except RuntimeError as error:
                raise EasyRefError(
                    f"{checkpoint.name} does not fit the UNet at {layer}: {error} "
                    "Use the UNet it was trained with."
                ) from error
    _install(unet, processors, attachment)
    attachment.checkpoint, attachment.references = checkpoint, checkpoint.num_tokens
    attachment.scale = scale


def detach_adapter(unet: UNet2DConditionModel) -> None:
    """Remove the adapter: the UNet is as it was before `attach_adapter`.

    Raises:
        EasyRefError: there is no adapter, or its LoRA has been merged.
    """
    attachment = _attached(unet)
    _check_not_merged(attachment, "detach_adapter")
    unet.set_attn_processor(dict(attachment.before))
    attachment.references, attachment.text = 0, None  # for a ControlNet of `hide_references`


def set_scale(unet: UNet2DConditionModel, scale: float) -> None:
    """Set the weight of the reference tokens; 0 leaves only the LoRA.

    Raises:
        EasyRefError: there is no adapter on the UNet.
    """
    _attached(unet).scale = scale


def set_tokens(unet: UNet2DConditionModel, tokens: ReferenceTokens | None) -> None:
    """Set which tokens end the encoder states from now on; `append_tokens` calls it.

    Args:
        tokens: None for a prompt without references: all rows are text. The LoRA stays on. An
            untrained adapter accepts any.

    Raises:
        EasyRefError: there is no adapter on the UNet, or another one made the tokens.
    """
    attachment = _attached(unet)
    if tokens is not None and attachment.checkpoint is not None:
        check_tokens(attachment.checkpoint, tokens)
    attachment.references = 0 if tokens is None else tokens.num_tokens
    attachment.text = None


def append_tokens(
    unet: UNet2DConditionModel,
    tokens: ReferenceTokens,
    text: torch.Tensor,
    negative: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Append reference tokens to text states; the UNet expects the result from now on.

    Args:
        tokens: of one group for all prompts, or of one group each.
        text, negative: [B, T, W] as `encode_prompt` returns them; None without guidance.

    Returns:
        `prompt_embeds` and `negative_prompt_embeds`, [B, T + N, W] like the text.

    Raises:
        EasyRefError: see `set_tokens`; texts of another width, or not as many as groups.
    """
    count, rows, width = text.shape
    if tokens.width != width or tokens.batch not in (1, count):
        raise EasyRefError(
            f"{count} texts of width {width} cannot be followed by reference tokens of "
            f"{tokens.batch} groups of width {tokens.width}. Encode one group for all prompts or "
            "one for each, and use the text encoders of SDXL."
        )
    set_tokens(unet, tokens)
    _attached(unet).text = rows

    def joined(states: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return torch.cat((states, own.to(states).expand(len(states), -1, -1)), dim=1)

    return (
        joined(text, tokens.cond),
        None if negative is None else joined(negative, tokens.uncond),
    )


@torch.no_grad()
def merge_lora(unet: UNet2DConditionModel) -> None:
    """Merge the LoRA into the UNet's own weights: the same result at no cost in sampling. Other
    LoRAs of diffusers (`load_lora_weights`) stay unmerged.

    Raises:
        EasyRefError: there is no adapter; the UNet's weights are not in memory, or cannot be added
            to. Nothing is changed then.
    """
    attachment = _attached(unet)
    _check_in_memory(unet, "merge_lora")
    merges: list[tuple[EasyRefProcessor, str, LowRank, nn.Parameter]] = []
    for name, processor in unet.attn_processors.items():
        layer = name.removesuffix(_SUFFIX)
        attn = unet.get_submodule(layer)
        for part in LORA:
            lora = processor.lora(part) if isinstance(processor, EasyRefProcessor) else None
            if lora is None:
                continue
            weight = _base_weight(attn.to_out[0] if part == "to_out" else getattr(attn, part))
            if not weight.is_floating_point() or weight.itemsize == 1:
                raise EasyRefError(
                    f"merge_lora: {layer}.{part} is kept as {weight.dtype}, to which a LoRA cannot "
                    "be added. Use the adapter without merging, or a UNet in bfloat16."
                )
            merges.append((processor, part, lora, weight))
    for processor, part, lora, weight in merges:
        attachment.merged = True
        # Wherever this is interrupted, each LoRA counts once: beside its weight, or in it.
        weight.data += (lora.up.weight.float() @ lora.down.weight.float()).to(weight)
        delattr(processor, f"{part}_lora")


def hide_references(controlnet: ControlNetModel, unet: UNet2DConditionModel) -> None:
    """Give a ControlNet the text alone, as in the official code, whatever tokens the UNet gets.

    To be called again after `detach_adapter`.

    Raises:
        EasyRefError: there is no adapter on the UNet.
    """
    controlnet.set_attn_processor(TextOnlyProcessor(_attached(unet)))


def _sources(checkpoint: AdapterCheckpoint, layer: str) -> dict[str, str]:
    """A processor's weights by name -> name in the adapter's file."""
    cross, lora = checkpoint.cross_attention.get(layer, {}), checkpoint.lora.get(layer, {})
    return {f"{part}.weight": name for part, name in cross.items()} | {
        f"{part}_lora.{half}.weight": name
        for part, halves in lora.items()
        for half, name in halves.items()
    }


def _is_cross_attention(processor: str) -> bool:
    return processor.endswith(f"attn2{_SUFFIX}")


def _widths(unet: UNet2DConditionModel, processor: str) -> tuple[int, int]:
    attn = unet.get_submodule(processor.removesuffix(_SUFFIX))
    return attn.to_q.in_features, attn.to_k.in_features


def _base_weight(linear: nn.Module) -> nn.Parameter:
    """A layer's own weight; PEFT wraps layers to put a LoRA beside them."""
    while hasattr(linear, "base_layer"):
        linear = linear.base_layer
    return linear.weight


def _processors(
    unet: UNet2DConditionModel, rank: int, attachment: Attachment
) -> dict[str, EasyRefProcessor]:
    """Untrained processors for every attention layer, by diffusers' name."""
    return {
        name: EasyRefProcessor(*_widths(unet, name), rank, _is_cross_attention(name), attachment)
        for name in unet.attn_processors
    }


def _install(
    unet: UNet2DConditionModel, processors: dict[str, EasyRefProcessor], attachment: Attachment
) -> None:
    like = next(unet.parameters())
    unet.set_attn_processor({n: p.to(like.device, like.dtype) for n, p in processors.items()})
    attachment.text, attachment.scale = None, 1.0  # another adapter may have set them


def _attachment_of(unet: UNet2DConditionModel) -> Attachment | None:
    processors = unet.attn_processors.values()
    return next((p.attachment for p in processors if isinstance(p, EasyRefProcessor)), None)


def _attached(unet: UNet2DConditionModel) -> Attachment:
    attachment = _attachment_of(unet)
    if attachment is None:
        raise EasyRefError(
            "There is no EasyRef adapter on this UNet. Call attach_adapter first, and after "
            "whatever replaces attention processors, such as attention slicing, xFormers, an "
            "IP-Adapter or set_default_attn_processor."
        )
    return attachment


def _attachment_for(unet: UNet2DConditionModel, what: str) -> Attachment:
    """The attachment of a new adapter: that of the processors it replaces, where there are any."""
    attachment = _attachment_of(unet)
    if attachment is None:
        return Attachment(unet.attn_processors)
    _check_not_merged(attachment, what)
    return attachment


def _check_in_memory(unet: UNet2DConditionModel, what: str) -> None:
    if any(weight.is_meta for weight in unet.parameters()):
        raise EasyRefError(
            f"{what}: the UNet's weights are not in memory (device meta), as after "
            "enable_sequential_cpu_offload. Call pipe.remove_all_hooks(), then this, and enable "
            "the offload last."
        )


def _check_not_merged(attachment: Attachment, what: str) -> None:
    if attachment.merged:
        raise EasyRefError(
            f"{what}: the adapter's LoRA has been merged into this UNet's weights, which cannot "
            "be undone. Load the UNet again."
        )
