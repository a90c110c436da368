"""Inputs that several nodes share, with the same ranges, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from comfy_api.latest import io

from ..easyref_core.adapter.layer_weights import LayerWeights
from ..easyref_core.adapter.stages import check_order
from ..easyref_core.encode.group import Reference
from ..easyref_core.errors import EasyRefError
from ..easyref_core.pictures.tensors import picture_list, tensor_to_picture
from .link_types import EasyRefMllmLayersLink, References
from .newer_core import ADVANCED
from .sampling.masks import Mask
from .sampling.weights import ByLayer, Constant, SamplingRange, Weight

MAX_SOCKETS = 100  # the most that ComfyUI allows
_PROMPT = "Given to the MLLM with the pictures; usually the positive prompt's text. May be empty."


def images_input() -> io.Image.Input:
    return io.Image.Input(
        "images",
        optional=True,
        tooltip="Reference pictures as one batch. They come before those of references.",
    )


def prompt_input(tooltip: str = _PROMPT) -> io.String.Input:
    return io.String.Input(
        "prompt", multiline=True, dynamic_prompts=True, default="", tooltip=tooltip
    )


def image_size_input(tooltip: str) -> io.Int.Input:
    return io.Int.Input(
        "image_size", default=0, min=0, max=1344, step=28, tooltip=tooltip, **ADVANCED
    )


def mllm_layers_input() -> io.Custom.Input:
    return EasyRefMllmLayersLink.Input(
        "mllm_layers",
        optional=True,
        tooltip="How much each of the MLLM's layers counts in aggregation dla or lap, from EasyRef "
        "MLLM Layers. Changing it is quick: no layer of the MLLM but the last runs again.",
    )


def weight_input(
    tooltip: str, name: str = "weight", default: float = 1.0, **more: Any
) -> io.Float.Input:
    """A factor: 1 as trained, below 0 the other way."""
    return io.Float.Input(
        name, default=default, min=-1.0, max=3.0, step=0.05, tooltip=tooltip, **more
    )


def share_input(name: str, default: float, tooltip: str) -> io.Float.Input:
    """A number from 0 to 1."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)


def collect_weights(
    weight: float,
    mask: torch.Tensor | None = None,
    layer_weights: LayerWeights | None = None,
    curve: Weight | None = None,
) -> tuple[Weight, ...]:
    """A node's weights; those that are not connected are left out.

    Raises:
        EasyRefError: the mask cannot be used, see `Mask`.
    """
    found = (
        Constant(weight),
        Mask(mask) if mask is not None else None,
        ByLayer(layer_weights) if layer_weights is not None else None,
        curve,
    )
    return tuple(weight for weight in found if weight is not None)


def weights_in_range(
    weight: float,
    start_percent: float,
    end_percent: float,
    mask: torch.Tensor | None = None,
    layer_weights: LayerWeights | None = None,
    curve: Weight | None = None,
) -> tuple[Weight, ...]:
    """A node's weights, within a part of the sampling.

    Raises:
        EasyRefError: the part starts after its end, or the mask cannot be used.
    """
    check_order("start_percent", start_percent, "end_percent", end_percent)
    found = collect_weights(weight, mask, layer_weights, curve)
    return (*found, SamplingRange(start_percent, end_percent))


def accepted(check: Callable[[], object]) -> bool | str:
    """Result of `validate_inputs`: True, or the message of the check's error."""
    try:
        check()
    except EasyRefError as error:
        return str(error)
    return True


class Numbered(io.Autogrow.TemplateNames):
    """Sockets `NAME_1`, `NAME_2`, ... of one type; the page adds one when the last is connected.

    In API format and saved workflows they are called `ID.NAME_1`, by the growing input's id.

    Args:
        given: type and tooltip of each socket, with NAME as its id. If it is optional, gaps are
            allowed and nothing has to be connected.
        least: number of sockets at the start. Not 0: ComfyUI's page up to 1.37 shows none then.
    """

    def __init__(self, given: io.Input, least: int = 1) -> None:
        super().__init__(given, socket_names(given.id), least)

    def as_dict(self) -> dict[str, Any]:
        """Without empty groups: ComfyUI before 0.10 reads the first group, empty or not."""
        template = super().as_dict()
        template["input"] = {group: given for group, given in template["input"].items() if given}
        return template


def socket_names(name: str) -> list[str]:
    return [f"{name}_{number}" for number in range(1, MAX_SOCKETS + 1)]


def connected(given: Mapping[str, Any] | None, group: str, name: str) -> Iterator[tuple[int, Any]]:
    """Number and value of each connected socket of a `Numbered` input, in order.

    Args:
        given: as passed by ComfyUI; None if nothing is connected.
        group, name: the input's id, and NAME of its sockets.

    Raises:
        EasyRefError: the input itself was linked, which only a graph in API format can do.
    """
    if given is not None and not isinstance(given, Mapping):
        raise EasyRefError(
            f"{group} is no input by itself. Connect to {group}.{name}_1, {group}.{name}_2 and so "
            "on."
        )
    for number, socket in enumerate(socket_names(name), start=1):
        value = (given or {}).get(socket)
        if value is not None:
            yield number, value


def references_from_batch(images: Any, name: str, weight: float = 1.0) -> References:
    """ComfyUI's IMAGE batch [B, H, W, C] as references; see `picture_list` for what else can be.

    Raises:
        EasyRefError: no picture, no pixels, or values that are not numbers.
    """
    pictures = picture_list(images, name)
    return tuple(
        Reference(tensor_to_picture(picture, label), weight, label)
        for number, picture in enumerate(pictures)
        for label in [name if len(pictures) == 1 else f"{name} (picture {number + 1})"]
    )


def gather(
    images: torch.Tensor | None, references: References | None, name: str = "images"
) -> References:
    """A node's `images` and `references` inputs as one group, in this order.

    Args:
        name: of the first input.

    Raises:
        EasyRefError: the batch cannot be used, see `references_from_batch`.
    """
    group = references_from_batch(images, name) if images is not None else ()
    return group + (references or ())
