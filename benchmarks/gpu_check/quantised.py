"""Checkpoints in ComfyUI's quantised formats, with the adapter's LoRA and references."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .bench import Bench, cosine, load_unet
from .models import UNETS
from .report import NotHere, Row, measured

FORMATS = {"fp8": "float8_e4m3fn", "int8": "int8_tensorwise"}

# TODO bars
LIKE = 0.98
EFFECT = 0.9


def quantised(bench: Bench) -> Iterator[Row]:
    """One noise prediction of each model, plain and steered, against the unquantised one.

    Two cosines: of the steered prediction, and of what LoRA and references changed in it, which
    would be 0 if they were lost.
    """
    plain, steered = _predictions(bench, bench.unet())
    yield measured("unquantised, plain / steered", cosine(plain, steered))
    bench.drop()
    for name, kind in FORMATS.items():
        try:
            file = _write(bench, name, kind)
        except NotHere as reason:
            yield Row("", name, verdict="not run here", note=str(reason))
            continue
        found_plain, found = _predictions(bench, load_unet(file))
        like = cosine(found, steered)
        yield measured(f"{name}, steered as unquantised", like, at_least=LIKE)
        effect = cosine(found - found_plain, steered - plain)
        yield measured(f"{name}, effect as unquantised", effect, at_least=EFFECT)


def _predictions(bench: Bench, unet: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents after one step, plain and with LoRA and references."""
    side = min(bench.models.latent, 64)
    steered = bench.apply(unet, bench.tokens(1))
    return tuple(bench.sample(model, 1, side=side).float().cpu() for model in (unet, steered))


def _write(bench: Bench, name: str, kind: str) -> str:
    """The UNet's file with its transformers' linear layers quantised; its name for ComfyUI.

    Raises:
        NotHere: this core does not know the format.
    """
    from comfy.quant_ops import QUANT_ALGOS

    if kind not in QUANT_ALGOS:
        raise NotHere(f"this ComfyUI does not know {kind}")
    folder = bench.pack.base / UNETS
    file = f"{name}_{bench.models.unet}"
    weights: dict[str, torch.Tensor] = {}
    layers: dict[str, Any] = {}
    with safe_open(folder / bench.models.unet, "pt") as source:
        for key in source.keys():  # noqa: SIM118
            weight = source.get_tensor(key)
            if weight.ndim == 2 and ".transformer_blocks." in key:
                layer = key.removesuffix(".weight")
                weights |= _quantised(layer, weight.to(bench.device), QUANT_ALGOS[kind])
                layers[layer] = {"format": kind}
            else:
                weights[key] = weight
    content = json.dumps({"format_version": "1.0", "layers": layers})
    save_file(weights, folder / file, {"_quantization_metadata": content})
    return file


def _quantised(
    layer: str, weight: torch.Tensor, algorithm: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """A layer's weight and its scale, the largest value on the format's largest number."""
    storage = algorithm["storage_t"]
    if storage.is_floating_point:
        largest = torch.finfo(storage).max
    else:
        largest = torch.iinfo(storage).max
    scale = weight.float().abs().max() / largest
    values = (weight.float() / scale).clamp(-largest, largest)
    if not storage.is_floating_point:
        values = values.round()
    return {f"{layer}.weight": values.to(storage).cpu(), f"{layer}.weight_scale": scale.cpu()}
