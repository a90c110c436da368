"""The adapter on a diffusers `UNet2DConditionModel`, for use without ComfyUI and for training.

As in the official code, the UNet's encoder states are text states followed by N reference tokens,
and each layer splits them. The adapter's weights are `<layer>.easyref.to_k_ip.weight`,
`<layer>.easyref.to_q_lora.down.weight`, ...; `official_name` gives the checkpoint's keys.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from torch import nn

from ..adapter.checkpoint import AdapterCheckpoint
from ..adapter.key_values import check_model_layers, check_tokens, read_finite
from ..adapter.parts import LORA
from ..errors import EasyRefError
from ..tokens.reference_tokens import ReferenceTokens
from ..untrusted import escaped, kind_of, number, whole_number
from .adapter_layer import CHILD, AdapterLayer, Attachment, LowRank
from .unet_layers import (
    attached,
    attachment_for,
    attentions,
    check_in_memory,
    check_layers,
    check_not_merged,
    identity_hook,
    is_cross_attention,
    put,
    take_off,
    widths,
)

_MAX_RANK = 4096  # above every width of SDXL


def cross_attention_layers(unet: UNet2DConditionModel) -> dict[str, tuple[int, int]]:
    """Cross-attention layers of a UNet -> (query width, context width)."""
    return {n: widths(a) for n, a in attentions(unet).items() if is_cross_attention(n)}


def new_adapter(
    unet: UNet2DConditionModel, num_tokens: int, rank: int = 0, identity_rank: int = 0
) -> None:
    """Put an untrained adapter on a UNet: to_k_ip and to_v_ip start from the base's to_k and to_v
    (official training), LoRA and identity LoRA from zero. On a UNet on the meta device it is on the
    meta device too.

    Raises:
        EasyRefError: the UNet holds the LoRA of an adapter already; its layers are not diffusers'
            own; a number is no count.
    """
    num_tokens = whole_number(num_tokens, "num_tokens", low=1)
    rank = whole_number(rank, "rank", low=0, high=_MAX_RANK)
    identity_rank = whole_number(identity_rank, "identity_rank", low=0, high=_MAX_RANK)
    attachment = attachment_for(unet, "new_adapter")
    layers = _new_layers(unet, rank, attachment, dict.fromkeys(attentions(unet), identity_rank))
    for name, layer in layers.items():
        if layer.is_cross_attention:
            attn = unet.get_submodule(name)
            layer.to_k_ip.load_state_dict({"weight": attn.to_k.weight})
            layer.to_v_ip.load_state_dict({"weight": attn.to_v.weight})
    _install(unet, layers)
    attachment.checkpoint, attachment.references = None, num_tokens
    attachment.text, attachment.scale = None, 1.0


def attach_adapter(
    unet: UNet2DConditionModel,
    checkpoint: AdapterCheckpoint,
    scale: float = 1.0,
    new_lora_rank: int = 0,
    new_identity_rank: int = 0,
) -> None:
    """Put a trained adapter on a UNet, LoRA included (it stays on at every scale, as officially).

    It replaces another adapter. The encoder states' last rows are the adapter's reference tokens
    until `append_tokens` or `set_tokens` says otherwise.

    Args:
        scale: see `set_scale`.
        new_lora_rank: rank of a new LoRA, starting from zero, for an adapter without one; 0 for
            none.
        new_identity_rank: the same for the identity LoRA, which acts in runs with an `IdentityRun`.

    Raises:
        EasyRefError: the adapter was made for another UNet, or is damaged; the UNet's weights are
            not in memory, or hold the LoRA of an adapter already; its layers are not diffusers'
            own; a number is not finite. Nothing is changed then.
    """
    scale = number(scale, "scale")
    new_lora_rank = whole_number(new_lora_rank, "new_lora_rank", low=0, high=_MAX_RANK)
    new_identity_rank = whole_number(new_identity_rank, "new_identity_rank", low=0, high=_MAX_RANK)
    check_model_layers(checkpoint, cross_attention_layers(unet), type(unet).__name__)
    check_in_memory(unet, "attach_adapter")
    attachment = attachment_for(unet, "attach_adapter")
    new = set()
    if new_lora_rank and not checkpoint.lora:
        new.add("lora")
    if new_identity_rank and not checkpoint.identity_lora:
        new.add("identity_lora")
    identity = checkpoint.identity_lora or (attentions(unet) if "identity_lora" in new else ())
    rank = checkpoint.identity_lora_rank or new_identity_rank
    # Weights that all come from the file need no memory and no random numbers before.
    with nullcontext() if new else torch.device("meta"):
        layers = _new_layers(
            unet,
            checkpoint.lora_rank or new_lora_rank,
            attachment,
            dict.fromkeys(identity, rank),
        )
    sources = {name: _sources(checkpoint, name) for name in layers}
    unknown = sorted((checkpoint.lora.keys() | checkpoint.identity_lora.keys()) - layers.keys())
    if unknown:
        raise EasyRefError(
            f"{checkpoint.name} holds a LoRA for {escaped(unknown[0])}, which the UNet does not "
            "have. Use the UNet it was trained with."
        )
    for name, layer in layers.items():
        _check_shapes(checkpoint, layer, sources[name], new)
    place = {"device": unet.device, "dtype": unet.dtype}  # diffusers searches all layers for them
    with checkpoint.file.open() as get:
        for name, layer in layers.items():
            weights = layer.state_dict()
            for own, source in sources[name].items():
                weights[own] = read_finite(checkpoint, get, source).to(**place)
            layer.load_state_dict(weights, assign=True)
    _install(unet, layers)
    attachment.checkpoint, attachment.references = checkpoint, checkpoint.num_tokens
    attachment.text, attachment.scale = None, scale


def detach_adapter(unet: UNet2DConditionModel) -> None:
    """Remove the adapter: the UNet is as it was before `attach_adapter`.

    Raises:
        EasyRefError: there is no adapter, or its LoRA has been merged.
    """
    attachment = attached(unet)
    check_not_merged(attachment, "detach_adapter")
    for attn in attentions(unet).values():
        take_off(attn, identity_hook(unet) is not None)
    attachment.references, attachment.text = 0, None  # for a ControlNet of `hide_references`


def set_scale(unet: UNet2DConditionModel, scale: float) -> None:
    """Set the weight of the reference tokens; 0 leaves only the LoRA.

    Raises:
        EasyRefError: there is no adapter on the UNet, or the scale is no finite number.
    """
    attached(unet).scale = number(scale, "scale")


def set_tokens(unet: UNet2DConditionModel, tokens: ReferenceTokens | None) -> None:
    """Set which tokens end the encoder states from now on; `append_tokens` calls it.

    Args:
        tokens: None for a prompt without references: all rows are text. The LoRA stays on. An
            untrained adapter accepts any.

    Raises:
        EasyRefError: there is no adapter on the UNet, or another one made the tokens.
    """
    attachment = attached(unet)
    if tokens is not None:
        _check_type(tokens)
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
        EasyRefError: see `set_tokens`; texts of another width, or not as many as groups; `text` and
            `negative` of different shapes. Nothing is changed then.
    """
    for states in (text,) if negative is None else (text, negative):
        if not isinstance(states, torch.Tensor) or states.ndim != 3 or states.shape != text.shape:
            raise EasyRefError(
                "text and negative must be text states of one shape [B, T, W], as encode_prompt "
                f"returns them; here are {_shape(text)} and {_shape(negative)}."
            )
    count, rows, width = text.shape
    _check_type(tokens)
    if tokens.width != width or tokens.batch not in (1, count):
        raise EasyRefError(
            f"{count} texts of width {width} cannot be followed by reference tokens of "
            f"{tokens.batch} groups of width {tokens.width}. Encode one group for all prompts or "
            "one for each, and use the text encoders of SDXL."
        )
    set_tokens(unet, tokens)
    attached(unet).text = rows

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
        EasyRefError: there is no adapter; the UNet's weights are not in memory, fused, or cannot be
            added to. Nothing is changed then.
    """
    attachment = attached(unet)
    check_in_memory(unet, "merge_lora")
    merges: list[tuple[AdapterLayer, str, LowRank, nn.Parameter]] = []
    for name, attn in attentions(unet).items():
        layer = getattr(attn, CHILD)
        for part in LORA:
            lora = layer.lora(part)
            if lora is None:
                continue
            if isinstance(attn.processor, FusedAttnProcessor2_0):
                raise EasyRefError(
                    f"merge_lora: {name} computes with fused copies of its weights. Call "
                    "pipe.unfuse_qkv_projections(), then merge_lora, and fuse last."
                )
            linear = attn.to_out[0] if part == "to_out" else getattr(attn, part)
            if len(getattr(linear, "lora_magnitude_vector", ())):
                raise EasyRefError(
                    f"merge_lora: a DoRA is loaded at {name}.{part}, whose result depends on the "
                    "weight that would be changed. Call pipe.unload_lora_weights(), then this; or "
                    "use the adapter without merging."
                )
            weight = _base_weight(linear)
            if not weight.is_floating_point() or weight.itemsize == 1:
                raise EasyRefError(
                    f"merge_lora: {name}.{part} is kept as {weight.dtype}, to which a LoRA cannot "
                    "be added. Use the adapter without merging, or a UNet in bfloat16."
                )
            merges.append((layer, part, lora, weight))
    for layer, part, lora, weight in merges:
        attachment.merged = True
        # Wherever this is interrupted, each LoRA counts once: beside its weight, or in it.
        weight.data += (lora.up.weight.float() @ lora.down.weight.float()).to(weight)
        delattr(layer, f"{part}_lora")


def hide_references(controlnet: ControlNetModel, unet: UNet2DConditionModel) -> None:
    """Give a ControlNet, or several in a `MultiControlNetModel`, the text alone, as in the official
    code, whatever tokens the UNet gets.

    To be called again when the UNet has another adapter after `detach_adapter`.

    Raises:
        EasyRefError: there is no adapter on the UNet; the ControlNet's layers are not diffusers'
            own.
    """
    attachment = attached(unet)
    found = controlnet.named_modules()
    crosses = {n: m for n, m in found if is_cross_attention(n) and isinstance(m, Attention)}
    layers = [getattr(attn, CHILD, None) for attn in crosses.values()]
    if any(layer is not None and layer.adds_references for layer in layers):
        raise EasyRefError(
            "hide_references: this ControlNet is a UNet with an adapter. Pass the ControlNet "
            "first, then the UNet."
        )
    check_layers(crosses, "hide_references")
    for name, attn in crosses.items():
        hidden = AdapterLayer(name, widths(attn), 0, True, attachment, adds_references=False)
        put(attn, hidden)


def _sources(checkpoint: AdapterCheckpoint, layer: str) -> dict[str, str]:
    """A layer's weights by name -> name in the adapter's file."""
    cross = checkpoint.cross_attention.get(layer, {})
    kinds = {"lora": checkpoint.lora, "identity_lora": checkpoint.identity_lora}
    return {f"{part}.weight": name for part, name in cross.items()} | {
        f"{part}_{kind}.{half}.weight": name
        for kind, lora in kinds.items()
        for part, halves in lora.get(layer, {}).items()
        for half, name in halves.items()
    }


def _check_shapes(
    checkpoint: AdapterCheckpoint,
    layer: AdapterLayer,
    sources: Mapping[str, str],
    new: Collection[str],
) -> None:
    """Raise EasyRefError unless the file has exactly the layer's weights, the `new` ones aside."""
    wanted = {n: list(w.shape) for n, w in layer.state_dict().items()}
    for own, shape in wanted.items():
        kind = own.partition(".")[0].split("_", 2)[-1]  # "lora" of to_q_lora.down.weight
        if own not in sources and kind not in new:
            raise EasyRefError(
                f"{checkpoint.name} lacks {own} for {layer.name} of the UNet. Use the UNet it was "
                "trained with, or download the adapter again."
            )
        found = shape if own not in sources else list(checkpoint.file.tensors[sources[own]].shape)
        if found != shape:
            raise EasyRefError(
                f"{checkpoint.name}: {sources[own]} has the shape {found}, but {layer.name} of the "
                f"UNet needs {shape}. Use the UNet it was trained with, or download the adapter "
                "again."
            )


def _base_weight(linear: nn.Module) -> nn.Parameter:
    """A layer's own weight; PEFT wraps layers to put a LoRA beside them."""
    while hasattr(linear, "base_layer"):
        linear = linear.base_layer
    return linear.weight


def _new_layers(
    unet: UNet2DConditionModel,
    rank: int,
    attachment: Attachment,
    identity_ranks: Mapping[str, int],
) -> dict[str, AdapterLayer]:
    """Untrained weights for every attention layer; identity LoRA for self-attention alone."""
    layers = {}
    for name, attn in attentions(unet).items():
        cross = is_cross_attention(name)
        own = 0 if cross else identity_ranks.get(name, 0)
        layers[name] = AdapterLayer(name, widths(attn), rank, cross, attachment, identity_rank=own)
    return layers


def _install(unet: UNet2DConditionModel, layers: Mapping[str, AdapterLayer]) -> None:
    device, dtype = unet.device, unet.dtype
    for name, attn in attentions(unet).items():
        put(attn, layers[name].to(device, dtype))


def _check_type(tokens: Any) -> None:
    if not isinstance(tokens, ReferenceTokens):
        raise EasyRefError(
            f"The tokens are {kind_of(tokens)}; reference tokens are needed, which "
            "encode_references and load_tokens return."
        )


def _shape(states: Any) -> str:
    return str(list(states.shape)) if isinstance(states, torch.Tensor) else kind_of(states)
