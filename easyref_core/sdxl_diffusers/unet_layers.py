"""A diffusers model's attention layers, and the adapter on them."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from ..errors import EasyRefError
from .adapter_layer import CHILD, AdapterLayer, Attachment
from .layers import EasyRefAttention

_FORWARDS = (Attention.forward, EasyRefAttention.forward)


def official_name(name: str) -> str:
    """A weight's name in the official checkpoint, by its name in the UNet."""
    return name.replace(f".{CHILD}.", ".processor.")


def attentions(unet: UNet2DConditionModel) -> dict[str, Attention]:
    """All attention layers by name."""
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    return {name: unet.get_submodule(name) for name in names}


def is_cross_attention(layer: str) -> bool:
    """Whether a layer of this name attends to encoder states."""
    return layer.endswith("attn2")


def layer_groups(unet: UNet2DConditionModel) -> dict[str, str]:
    """Attention layers -> their group in `adapter/layer_weights.py`, as ComfyUI numbers blocks."""
    per_block = unet.config.layers_per_block
    blocks = len(unet.config.down_block_types)
    counts = [per_block] * blocks if isinstance(per_block, int) else list(per_block)
    groups = {}
    for name in attentions(unet):
        side, *rest = name.split(".")
        if side == "mid_block":
            groups[name] = "middle"
            continue
        block, number = int(rest[0]), int(rest[2])
        if side == "down_blocks":
            groups[name] = f"input_{1 + sum(counts[:block]) + block + number}"
        else:
            groups[name] = f"output_{sum(counts[::-1][:block]) + block + number}"
    return groups


def widths(attn: Attention) -> tuple[int, int]:
    """Of the queries, and of the input of keys and values."""
    return attn.to_q.in_features, attn.to_k.in_features


def identity_hook(unet: UNet2DConditionModel) -> int | None:
    """Number of the hook that `attach_identity` put before the UNet's calls; None without."""
    hooks = unet._forward_pre_hooks.items()
    return next((n for n, hook in hooks if getattr(hook, "reads_identity", False)), None)


def put(attn: Attention, layer: AdapterLayer) -> None:
    """Put adapter weights on an attention layer, in the place of others."""
    make_easyref(attn)
    setattr(attn, CHILD, layer)


def take_off(attn: Attention, identity: bool) -> None:
    """Undo `put`.

    Args:
        identity: the layer still attends to references' features.
    """
    delattr(attn, CHILD)
    if not identity:
        make_plain(attn)


def make_easyref(attn: Attention) -> None:
    """Make a layer an `EasyRefAttention`."""
    _forget_forward(attn)
    attn.__class__ = EasyRefAttention


def make_plain(attn: Attention) -> None:
    """Undo `make_easyref`."""
    attn.__class__ = Attention
    _forget_forward(attn)


def check_layers(attentions: Mapping[str, nn.Module], what: str) -> None:
    """Raise EasyRefError unless the layers can become `EasyRefAttention`."""
    for name, attn in attentions.items():
        if type(attn) not in (Attention, EasyRefAttention):
            raise EasyRefError(
                f"{what}: {name} is a {type(attn).__name__}, not diffusers' own attention layer, "
                "so the adapter cannot act there. Load the model again."
            )
        forward = vars(attn).get("forward")
        if forward is not None and getattr(forward, "__func__", None) not in _FORWARDS:
            raise EasyRefError(
                f"{what}: a hook of diffusers or accelerate is on {name}, past which the adapter "
                "could not act. Remove it, then call this, and add the hook last."
            )


def check_in_memory(unet: UNet2DConditionModel, what: str) -> None:
    """Raise EasyRefError where a hook keeps the UNet's weights elsewhere."""
    hooks = (getattr(module, "_diffusers_hook", None) for module in unet.modules())
    if any(hook is not None and hook.get_hook("group_offloading") is not None for hook in hooks):
        raise EasyRefError(
            f"{what}: group offloading keeps the UNet's weights elsewhere. Load the pipeline "
            "again, call this, and enable the offloading last."
        )
    if any(weight.is_meta for weight in unet.parameters()):
        raise EasyRefError(
            f"{what}: the UNet's weights are not in memory (device meta), as after "
            "enable_sequential_cpu_offload. Call pipe.remove_all_hooks(), then this, and enable "
            "the offload last."
        )


def _find_attachment(unet: UNet2DConditionModel) -> Attachment | None:
    layers = (getattr(attn, CHILD, None) for attn in attentions(unet).values())
    return next((layer.attachment for layer in layers if layer is not None), None)


def attached(unet: UNet2DConditionModel) -> Attachment:
    """The attachment of a UNet; raise EasyRefError where it has no adapter."""
    attachment = _find_attachment(unet)
    if attachment is None:
        raise EasyRefError("There is no EasyRef adapter on this UNet. Call attach_adapter first.")
    return attachment


def attachment_for(unet: UNet2DConditionModel, what: str) -> Attachment:
    """The attachment of a new adapter: that of the adapter it replaces, where there is one.

    Raises:
        EasyRefError: see `check_layers` and `check_not_merged`.
    """
    attachment = _find_attachment(unet)
    if attachment is None:
        check_layers(attentions(unet), what)
        return Attachment()
    check_not_merged(attachment, what)
    return attachment


def check_not_merged(attachment: Attachment, what: str) -> None:
    """Raise EasyRefError where the LoRA cannot be taken off."""
    if attachment.merged:
        raise EasyRefError(
            f"{what}: the adapter's LoRA has been merged into this UNet's weights, which cannot "
            "be undone. Load the UNet again."
        )


def _forget_forward(attn: Attention) -> None:
    """Hooks that have been removed may leave the method of a layer's former class."""
    if getattr(vars(attn).get("forward"), "__func__", None) in _FORWARDS:
        del attn.forward
