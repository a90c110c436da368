"""The reference pass: the model reads the references, noised to the sample's level.

It is a plain call of the same model, without any pack's patches, ControlNet or reference tokens;
what every self-attention layer reads in it, after the layer's norm, is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management as mm
import torch

from ...easyref_core.adapter.identity import passes
from ..host.unet_layers import BlockKey

Features = Mapping[BlockKey, torch.Tensor]
"""Slot of a layer -> [1, S, C]; the S positions are those of all references."""

# Options of the sample's call that are for its own rows, and everything that changes its layers.
_OF_THE_CALL = (
    "ad_params",
    "callbacks",
    "context_window",
    "patches",
    "patches_replace",
    "uuids",
    "wrappers",
)
_MARGIN = 1.5  # of free memory over the estimate, as ComfyUI has it when it batches conditionings


@dataclass(frozen=True, eq=False)
class NoisyReference:
    """What a reference's noised latent is made of, in the UNet's scale.

    Attributes:
        latent, noise: [C, H, W].
    """

    latent: torch.Tensor
    noise: torch.Tensor

    def to(self, device: torch.device) -> NoisyReference:
        return NoisyReference(self.latent.to(device), self.noise.to(device))


@dataclass(frozen=True, eq=False)
class ReferenceText:
    """The prompt with which references are read.

    Attributes:
        states: [1, L, W].
        pooled: [1, Y] pooled states and sizes, None for a model without.
    """

    states: torch.Tensor
    pooled: torch.Tensor | None


def reference_features(
    model: Any,
    references: Sequence[NoisyReference],
    sigma: torch.Tensor,
    text: ReferenceText,
    options: Mapping[str, Any],
    blocks: Collection[BlockKey],
) -> dict[BlockKey, torch.Tensor]:
    """Inputs of self-attention layers; references of one size share a pass if memory allows.

    Args:
        model: ComfyUI's `BaseModel`, loaded for sampling.
        references: on the model's device.
        sigma: [1], on the model's device.
        options: transformer options of a call of the model.
        blocks: slots of the layers to keep.
    """
    found: dict[BlockKey, list[torch.Tensor]] = {block: [] for block in blocks}
    for group in _passes(model, references):
        recorder = _Recorder(blocks)
        _read(model, group, sigma, text, {**_plain(options), **recorder.options(len(group))})
        for block in list(recorder.states):
            states = recorder.states.pop(block)
            found[block].append(states.flatten(0, 1)[None])  # [R, T, C] -> [1, R * T, C]
    # One layer after the other, so that its parts are given back before the next one is joined.
    return {block: _joined(found.pop(block)) for block in list(found) if found[block]}


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _passes(model: Any, references: Sequence[NoisyReference]) -> Iterator[list[NoisyReference]]:
    for numbers in passes([tuple(reference.latent.shape) for reference in references]):
        while numbers:
            shape = references[numbers[0]].latent.shape
            free = mm.get_free_memory(references[numbers[0]].latent.device)
            count = len(numbers)
            while count > 1 and model.memory_required([count, *shape]) * _MARGIN > free:
                count = (count + 1) // 2
            yield [references[number] for number in numbers[:count]]
            numbers = numbers[count:]


def _read(
    model: Any,
    references: Sequence[NoisyReference],
    sigma: torch.Tensor,
    text: ReferenceText,
    options: dict[str, Any],
) -> None:
    """One call of the model; its prediction is not used."""
    latents = torch.stack([reference.latent for reference in references])
    noise = torch.stack([reference.noise for reference in references])
    noisy = model.model_sampling.noise_scaling(sigma, noise, latents)
    rows = len(references)
    # For models that also read a mask or a picture: all is to be made.
    beside = model.concat_cond(noise=noisy, latent_image=latents, device=noisy.device)
    pooled = {} if text.pooled is None else {"y": _rows(text.pooled, rows, noisy)}
    states = _rows(text.states, rows, noisy)
    model.apply_model(noisy, sigma.expand(rows), beside, states, None, options, **pooled)


def _rows(condition: torch.Tensor, rows: int, like: torch.Tensor) -> torch.Tensor:
    return condition.to(like.device).expand(rows, *condition.shape[1:])


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in _OF_THE_CALL}


class _Recorder:
    """Keeps the inputs of self-attention layers in one call of the model.

    Attributes:
        states: slot -> [rows, T, C].
    """

    def __init__(self, blocks: Collection[BlockKey]) -> None:
        self.states: dict[BlockKey, torch.Tensor] = {}
        self._blocks = blocks

    def options(self, rows: int) -> dict[str, Any]:
        return {"patches": {"attn1_patch": [self._record]}, "cond_or_uncond": [0] * rows}

    def _record(
        self, states: torch.Tensor, key: Any, value: Any, options: Mapping[str, Any]
    ) -> tuple[torch.Tensor, Any, Any]:
        block = (*options["block"], options["block_index"])
        if block in self._blocks:
            self.states[block] = states
        return states, key, value
