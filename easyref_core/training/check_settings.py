"""Settings that contradict each other, or name files that are not there."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..adapter.layer_pooling import POOLS
from ..errors import EasyRefError
from ..untrusted import is_regular, shown

if TYPE_CHECKING:
    from .config import ModelSettings, Settings


def check_settings(settings: Settings) -> None:
    """
    Raises:
        EasyRefError: settings that contradict each other, or files that do not exist.
    """
    model, data, optimiser = settings.model, settings.data, settings.optimiser
    output = settings.output
    for tracker in output.trackers:
        if find_spec(tracker) is None:
            raise EasyRefError(
                f"output.trackers names {tracker}, which is not installed: pip install {tracker}"
            )
    if "lora" in optimiser.parts and model.lora_rank < 1:
        raise EasyRefError(
            f"model.lora_rank is {model.lora_rank}; it must be 1 or more where the part lora is "
            "trained."
        )
    _check_pooling(model, optimiser.parts)
    _check_identity(settings)
    if optimiser.warmup_steps > optimiser.steps:
        raise EasyRefError(
            f"optimiser.warmup_steps is {optimiser.warmup_steps}; it must be 0 to "
            f"{optimiser.steps}, the run's steps."
        )
    probabilities = (data.drop_image, data.drop_text, data.drop_both)
    if sum(probabilities) > 1:
        raise EasyRefError(
            f"data.drop_image, drop_text and drop_both are {probabilities}; the sum of these "
            "probabilities must be 1 or less."
        )
    if data.cache is not None and data.crop == "random":
        raise EasyRefError("data.cache needs the same target each time: use crop center or aspect.")
    if settings.stage != "alignment" and model.adapter is None:
        raise EasyRefError(
            f"The stage {settings.stage} starts from the adapter of the stage before it. Name that "
            "file as model.adapter, or set stage=alignment to train from scratch."
        )
    for name, folder in (("base", model.base), ("mllm", model.mllm)):
        if not os.path.isdir(folder):
            raise EasyRefError(f"model.{name}: there is no folder {shown(folder, 300)}.")
    if model.adapter is not None and not is_regular(model.adapter):
        raise EasyRefError(
            f"model.adapter: there is no file {shown(model.adapter, 300)}. Train the stage before "
            "this one first."
        )
    if os.path.lexists(output.folder) and not os.path.isdir(output.folder):
        raise EasyRefError(f"output.folder: {shown(output.folder, 300)} is a file. Name a folder.")
    for name in (*data.files, *([output.validation] if output.validation else [])):
        if not is_regular(name):
            raise EasyRefError(
                f"There is no data file {shown(name, 300)}. Check data.files and validation."
            )


def _check_pooling(model: ModelSettings, parts: tuple[str, ...]) -> None:
    """
    Raises:
        EasyRefError: settings of layer pooling without an aggregation that pools, or that without
            pools.
    """
    if model.aggregation not in POOLS:
        for name, is_set in (
            ("the part layer_pooling is trained", "layer_pooling" in parts),
            ("model.pooling is set", model.pooling != "blocks"),
            ("model.mllm_layers is set", model.mllm_layers is not None),
        ):
            if is_set:
                raise EasyRefError(
                    f"model.aggregation is {model.aggregation}, but {name}: only dla and lap pool "
                    "the MLLM's layers. Set model.aggregation=dla or lap, or leave that out."
                )
    layers = model.mllm_layers
    if layers is not None and (not layers or sorted(set(layers)) != [*layers]):
        raise EasyRefError(
            f"model.mllm_layers is {shown([*layers])}; numbers of hidden states are needed, each "
            "once and in ascending order, or null for all."
        )
    pools = model.aggregation in POOLS
    if pools and model.adapter is None and "layer_pooling" not in parts:
        raise EasyRefError(
            f"model.aggregation is {model.aggregation}, but a new adapter has no layer pooling. "
            "Add layer_pooling to optimiser.parts, or name an adapter that has it as model.adapter."
        )


def _check_identity(settings: Settings) -> None:
    """
    Raises:
        EasyRefError: identity is trained without references for it, or with more than there are.
    """
    count, most = settings.model.identity_references, settings.data.max_references
    if count < 1 and (settings.stage == "identity" or "identity" in settings.optimiser.parts):
        raise EasyRefError(
            f"model.identity_references is {count}; it must be 1 or more in the stage identity and "
            "where the part identity is trained."
        )
    drops = (settings.data.drop_identity, settings.data.drop_tokens)
    if count < 1 and any(drops):
        raise EasyRefError(
            f"data.drop_identity and drop_tokens are {drops}, but model.identity_references is 0: "
            "there is no identity that could act alone. Set them to 0, or that to 1 or more."
        )
    if sum(drops) > 1:
        raise EasyRefError(
            f"data.drop_identity and drop_tokens are {drops}; the sum of these probabilities must "
            "be 1 or less."
        )
    if count > most:
        raise EasyRefError(
            f"model.identity_references is {count}, but a sample has at most {most} references "
            "(data.max_references). Set one of them."
        )
