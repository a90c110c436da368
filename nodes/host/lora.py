"""The adapter's LoRA as ComfyUI weight patches, merged once however often it is applied.

ComfyUI merges a model's weights again when `patches_uuid` differs from that of the last merge, and
sets a random one at every change. Here it is derived from the change, so the same LoRA on the same
model is not merged again when only a prompt or a weight differs.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ...easyref_core.adapter.checkpoint import AdapterCheckpoint
from ...easyref_core.adapter.key_values import lora_weights
from ...easyref_core.errors import EasyRefError
from ...easyref_core.untrusted import escaped

_ATTACHMENT = "easyref_lora"


class AdapterLora:
    """An adapter's LoRA, read when first applied, then held in memory: 370 MB for SDXL."""

    def __init__(self, checkpoint: AdapterCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._lock = threading.Lock()
        self._loaded: tuple[dict[str, Any], dict[str, Any]] | None = None  # names, patches

    @property
    def identity(self) -> str:
        """Differs for every LoRA; empty if the adapter has none."""
        return self._checkpoint.lora_identity

    def apply(self, model: ModelPatcher, strength: float) -> None:
        """Merge the LoRA into a cloned model.

        Applied again with the same adapter, the later strength replaces the earlier one.

        Raises:
            EasyRefError: the LoRA does not fit the model (the first layer is named), before the
                model is changed.
        """
        if not self.identity:
            return
        merged: dict[str, _Merged] = dict(model.get_attachment(_ATTACHMENT) or {})
        earlier = merged.pop(self.identity, None)
        if (earlier.strength if earlier else 0.0) == strength:
            return
        patches = self._patches(model) if strength != 0 else {}
        if earlier:
            earlier.remove_from(model)
        if strength != 0:
            before = model.patches_uuid
            model.add_patches(patches, strength)
            # The identity hashes a part of the weights only; the file's stamp covers the rest.
            change = f"{self.identity} {self._checkpoint.file.stamp} {strength}"
            model.patches_uuid = uuid.uuid5(before, change)
            merged[self.identity] = _Merged(strength, patches, before, model.patches_uuid)
        # Attachments are shared between clones: a new one is set, the old one is not changed.
        model.set_attachments(_ATTACHMENT, merged)

    def _patches(self, model: ModelPatcher) -> dict[str, Any]:
        """Weight name of the model -> ComfyUI's weight adapter."""
        names = self._names(model)
        with self._lock:
            if self._loaded is None or self._loaded[0] != names:
                # Ordinary tensors even when nodes run in inference mode.
                with torch.inference_mode(False):
                    weights = lora_weights(self._checkpoint)
                    self._loaded = names, comfy.lora.load_lora(weights, names)
            return self._loaded[1]

    def _names(self, model: ModelPatcher) -> dict[str, Any]:
        """Official name of each projection -> the model's weight."""
        checkpoint = self._checkpoint
        names = comfy.lora.model_lora_keys_unet(model.model, {})
        wanted = [
            f"unet.{layer}.processor.{part}"
            for layer, parts in checkpoint.lora.items()
            for part in parts
        ]
        missing = [name for name in wanted if name not in names]
        if missing:
            raise EasyRefError(
                f"{checkpoint.name} has a LoRA for {len(wanted)} projections, of which "
                f"the model lacks {len(missing)}, first {escaped(missing[0])}. Connect an SDXL "
                "base model."
            )
        self._check_shapes(model, names)
        return {name: names[name] for name in wanted}

    def _check_shapes(self, model: ModelPatcher, names: Mapping[str, Any]) -> None:
        """Raise EasyRefError where up @ down has not the shape of the model's weight."""
        shapes = {n: info.shape for n, info in self._checkpoint.file.tensors.items()}
        for layer, parts in self._checkpoint.lora.items():
            for part, halves in parts.items():
                key = names[f"unet.{layer}.processor.{part}"]
                linear = comfy.utils.get_attr(model.model, key.removesuffix(".weight"))
                # Of the layer, as a quantised weight may have another shape.
                wanted = (linear.out_features, linear.in_features)
                found = (shapes[halves["up"]][0], shapes[halves["down"]][1])
                if found != wanted:
                    raise EasyRefError(
                        f"{self._checkpoint.name}: {escaped(halves['up'])} and its down weight "
                        f"make {list(found)}, but the model's layer is {list(wanted)}. Connect an "
                        "SDXL base model, or get the adapter again."
                    )


@dataclass(frozen=True, eq=False)
class _Merged:
    """One LoRA merged into a model.

    Attributes:
        patches: weight name -> ComfyUI's weight adapter.
        before, after: the model's `patches_uuid`.
    """

    strength: float
    patches: dict[str, Any]
    before: uuid.UUID
    after: uuid.UUID

    def remove_from(self, model: ModelPatcher) -> None:
        for key, adapter in self.patches.items():
            others = [patch for patch in model.patches.get(key, []) if patch[1] is not adapter]
            if others:
                model.patches[key] = others
            else:
                model.patches.pop(key, None)
        if model.patches_uuid == self.after:
            model.patches_uuid = self.before
        else:  # something else was merged since
            model.patches_uuid = uuid.uuid5(model.patches_uuid, f"without {self.after}")
