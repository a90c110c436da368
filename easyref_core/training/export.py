"""The trained weights as an EasyRef checkpoint in the official layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ..adapter.checkpoint import BODY, IMAGE_SIZE
from ..files import write_atomically
from .disk import writing
from .model import TrainedModel, part_of

_PATCH_EMBED = BODY + "visual.patch_embed.proj.weight"


def official_state(
    model: TrainedModel,
    state: Mapping[str, torch.Tensor] | None = None,
    replaced: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Weights under the official names.

    The MLLM is part of it only when it has been trained, now or before (officially: from the second
    stage on); before, whoever loads the checkpoint has it already.

    Args:
        state: the model's state dict where it must be gathered from several processes first.
        replaced: official name -> weight that stands in for the model's own (an average, say).
    """
    official_weights: dict[str, torch.Tensor] = {}
    for name, weight in (model.state_dict() if state is None else state).items():
        official = model.official_name(name)
        part = part_of(official)
        if part is None or (part == "mllm" and not model.carries_mllm):
            continue
        weight = (replaced or {}).get(official, weight).detach().cpu()
        if official == _PATCH_EMBED:
            vision = model.encoder.config.vision
            patch = vision.patch_size
            shape = (-1, vision.in_channels, vision.temporal_patch_size, patch, patch)
            weight = weight.reshape(shape)
        official_weights[official] = weight.contiguous()
    return official_weights


def write_whole(
    state: Mapping[str, torch.Tensor], path: Path, image_size: int | None = None
) -> None:
    """Write safetensors so that the file appears whole or not at all.

    Args:
        image_size: at which the references were read, for whoever uses the adapter.

    Raises:
        EasyRefError: the disk is full or not writable; nothing is left behind.
    """
    from safetensors.torch import save_file

    metadata = {"format": "pt"} | ({} if image_size is None else {IMAGE_SIZE: str(image_size)})
    with writing(path):
        write_atomically(path, lambda partial: save_file(dict(state), partial, metadata))
