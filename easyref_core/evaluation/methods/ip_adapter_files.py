"""IP-Adapter files and CLIP vision directories, checked before diffusers and transformers load
them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import EasyRefError
from ...training.base_files import check_part
from ...untrusted import escaped, one_line
from ...weight_file import WeightFile, open_weight_file

_PROJECTION, _ATTENTION = "image_proj.", "ip_adapter."
WHERE = (
    "Get ip-adapter_sdxl.safetensors, ip-adapter_sdxl_vit-h.safetensors or "
    "ip-adapter-plus_sdxl_vit-h.safetensors from sdxl_models of h94/IP-Adapter"
)
ENCODERS = (
    "sdxl_models/image_encoder of h94/IP-Adapter belongs to ip-adapter_sdxl.safetensors, "
    "models/image_encoder to the files with vit-h in their names"
)
_TOKENS = 4  # of the plain layout; diffusers takes it as given
_MAX_LAYERS = 100


@dataclass(frozen=True)
class IpAdapterFile:
    """An IP-Adapter for this UNet.

    Attributes:
        is_plus: it reads the image encoder's states before the last layer, not its embedding.
        image_width: of what it reads.
    """

    file: WeightFile
    is_plus: bool
    image_width: int

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """As diffusers' `load_ip_adapter` takes it."""
        state: dict[str, dict[str, torch.Tensor]] = {}
        with self.file.open() as get:
            for prefix in (_PROJECTION, _ATTENTION):
                names = [name for name in self.file.tensors if name.startswith(prefix)]
                state[prefix.rstrip(".")] = {n.removeprefix(prefix): get(n) for n in names}
        return state


def check_ip_adapter(path: Path, layers: Mapping[str, tuple[int, int]]) -> IpAdapterFile:
    """
    Args:
        layers: the UNet's cross-attention layers -> (query width, context width).

    Raises:
        EasyRefError: missing or damaged; something else than an IP-Adapter; one for another model,
            or of a kind that needs more than an image encoder.
    """
    file = open_weight_file(path)
    name = escaped(str(path))
    shapes = {n: tuple(tensor.shape) for n, tensor in file.tensors.items()}
    if not any(n.startswith(_ATTENTION) for n in shapes):
        raise EasyRefError(
            f"{name} is no IP-Adapter in a .safetensors file: it holds nothing under {_ATTENTION} "
            f"{WHERE}."
        )
    if any("_lora." in n or "perceiver_resampler" in n for n in shapes) or (
        _PROJECTION + "proj.0.weight" in shapes
    ):
        raise EasyRefError(
            f"{name} is an IP-Adapter for faces, which reads more than an image encoder gives. "
            f"{WHERE}."
        )
    context = {width for _, width in layers.values()}
    made_for = {shape[-1] for n, shape in shapes.items() if n.startswith(_ATTENTION)}
    if made_for != context:
        kind = " (Stable Diffusion 1.5's)" if made_for == {768} else ""
        raise EasyRefError(
            f"{name} is an IP-Adapter for text of width {_listed(made_for)}{kind}, but the base "
            f"model reads width {_listed(context)}. {WHERE}."
        )
    wanted = {
        f"{_ATTENTION}{2 * number + 1}.{part}_ip.weight": widths
        for number, widths in enumerate(layers.values())
        for part in ("to_k", "to_v")
    }
    found = {n: shape for n, shape in shapes.items() if n.startswith(_ATTENTION)}
    if found != wanted:
        odd = min(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
        raise EasyRefError(
            f"{name} is an IP-Adapter for another UNet: {escaped(odd)} has the shape "
            f"{_shape(found.get(odd))}, the base model needs {_shape(wanted.get(odd))}. {WHERE}."
        )
    file.check_weights(n for n in shapes if n.startswith((_PROJECTION, _ATTENTION)))
    return _projection(file, name, shapes, min(context))


def _projection(
    file: WeightFile, name: str, shapes: Mapping[str, tuple[int, ...]], context: int
) -> IpAdapterFile:
    plain = shapes.get(_PROJECTION + "proj.weight", ())
    first, last, latents = (
        shapes.get(_PROJECTION + part, ())
        for part in ("proj_in.weight", "proj_out.weight", "latents")
    )
    if len(plain) == 2 and plain[0] == _TOKENS * context:
        return IpAdapterFile(file, False, plain[1])
    if len(first) == len(last) == 2 and len(latents) == 3 and last[0] == context:
        layers = {n.split(".")[2] for n in shapes if n.startswith(_PROJECTION + "layers.")}
        if layers == {str(number) for number in range(min(len(layers), _MAX_LAYERS))}:
            return IpAdapterFile(file, True, first[1])
    raise EasyRefError(
        f"{name} projects images in another way than IP-Adapter and IP-Adapter Plus for this base "
        f"model. {WHERE}."
    )


def check_image_encoder(folder: Path, adapter: IpAdapterFile) -> None:
    """
    Raises:
        EasyRefError: no CLIP vision model, or not the adapter's.
    """
    if not folder.is_dir():
        raise EasyRefError(
            f"There is no image encoder {escaped(str(folder))}. Name a folder with config.json and "
            f"weights: {ENCODERS}."
        )
    name = escaped(str(folder))
    config = check_part(folder, "config.json")
    config = {**config, **(config.get("vision_config") or {})}
    from transformers import CLIPVisionConfig

    if not str(config.get("model_type")).startswith("clip"):
        raise EasyRefError(f"{name} holds no CLIP vision model. {ENCODERS}.")
    try:
        found = CLIPVisionConfig.from_dict(config)
    except Exception as error:  # odd configurations raise anything
        raise EasyRefError(
            f"config.json in {name} cannot be used ({one_line(error)}). Get the folder again."
        ) from error
    width = found.hidden_size if adapter.is_plus else found.projection_dim
    if width != adapter.image_width:
        raise EasyRefError(
            f"{escaped(str(adapter.file.path))} reads images of width {adapter.image_width}, but "
            f"the image encoder in {name} gives width {width}. {ENCODERS}."
        )


def load_image_encoder(folder: Path, dtype: torch.dtype) -> Any:
    """The vision model.

    Raises:
        EasyRefError: see `load_part`.
    """
    from transformers import CLIPVisionModelWithProjection

    from ...training.base import load_part

    return load_part(CLIPVisionModelWithProjection, folder).to(dtype)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


def _listed(widths: set[int]) -> str:
    return ", ".join(map(str, sorted(widths)))
