"""The adapter's LoRA as ComfyUI weight patches, merged once however often it is applied."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import comfy.lora
from comfy.model_patcher import ModelPatcher

from ...easyref_core.adapter import lora_weights
from ...easyref_core.checkpoint import AdapterCheckpoint
from ...easyref_core.errors import EasyRefError

_ATTACHMENT = "easyref_lora"


@dataclass(frozen=True, eq=False)
class _Merged:
    strength: float
    patches: dict[str, Any]  # weight name -> ComfyUI's weight adapter


def apply_lora(model: ModelPatcher, checkpoint: AdapterCheckpoint, strength: float) -> None:
    """Merge the adapter's LoRA into a cloned model.

    Applied again with the same adapter, the later strength replaces the earlier one.

    Raises:
        EasyRefError: the LoRA does not fit the model (the first layer is named), before the
            model is changed.
    """
    if not checkpoint.lora:
        return
    merged: dict[str, _Merged] = dict(model.get_attachment(_ATTACHMENT) or {})
    earlier = merged.pop(checkpoint.lora_identity, None)
    if (earlier.strength if earlier else 0.0) == strength:
        return
    patches = earlier.patches if earlier else _patches(model, checkpoint)
    if earlier:
        _remove(model, earlier)
    if strength != 0:
        model.add_patches(patches, strength)
        merged[checkpoint.lora_identity] = _Merged(strength, patches)
    # Attachments are shared between clones, so a new one is set rather than the old one changed.
    model.set_attachments(_ATTACHMENT, merged)


def _patches(model: ModelPatcher, checkpoint: AdapterCheckpoint) -> dict[str, Any]:
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    wanted = [
        f"unet.{layer}.processor.{part}"
        for layer, parts in checkpoint.lora.items()
        for part in parts
    ]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise EasyRefError(
            f"{checkpoint.name} has a LoRA for {len(wanted)} projections, of which the model "
            f"lacks {len(missing)}, first {missing[0]}. Connect an SDXL base model."
        )
    return comfy.lora.load_lora(lora_weights(checkpoint), {n: names[n] for n in wanted})


def _remove(model: ModelPatcher, merged: _Merged) -> None:
    for key, adapter in merged.patches.items():
        kept = [patch for patch in model.patches.get(key, []) if patch[1] is not adapter]
        if kept:
            model.patches[key] = kept
        else:
            model.patches.pop(key, None)
    model.patches_uuid = uuid.uuid4()
