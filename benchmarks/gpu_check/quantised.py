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
from .report import NOT_HERE, NotHere, Row, measured

FORMATS = {"fp8": "float8_e4m3fn", "int8": "int8_tensorwise"}

# Cosine similarities. Random weights quantise worse than trained ones: on a CPU, which rounds the
# weights only, 0.97 (fp8) and 0.99 (int8) at real size; a GPU rounds activations to fp8 too. For
# comparison, results without LoRA or without references must be less similar than `LOST`.
SIMILAR = 0.9
LOST = 0.8


def quantised(bench: Bench) -> Iterator[Row]:
    """One step of each model, without and with references, against the unquantised model.

    Cosine similarities of latents, and of the change that LoRA and references make.
    """
    unet = bench.unet()
    plain, steered = _plain(bench, unet), _steered(bench, unet)
    for name, settings in (("LoRA", {"lora_strength": 0.0}), ("references", {"weight": 0.0})):
        without = cosine(_steered(bench, unet, **settings), steered)
        yield measured(f"unquantised, without {name}", without, at_most=LOST)
    del unet
    bench.drop()
    for name, kind in FORMATS.items():
        try:
            file = _write(bench, name, kind)
        except NotHere as reason:
            yield Row("", name, verdict=NOT_HERE, note=str(reason))
            continue
        unet = load_unet(file)
        own_plain, own_steered = _plain(bench, unet), _steered(bench, unet)
        yield measured(f"{name}, plain as unquantised", cosine(own_plain, plain), at_least=SIMILAR)
        yield measured(
            f"{name}, steered as unquantised", cosine(own_steered, steered), at_least=SIMILAR
        )
        effect = cosine(own_steered - own_plain, steered - plain)
        yield measured(f"{name}, effect as unquantised", effect, at_least=SIMILAR)


def _plain(bench: Bench, unet: Any) -> torch.Tensor:
    return bench.sample(unet, 1, side=min(bench.models.latent, 64)).float().cpu()


def _steered(bench: Bench, unet: Any, **settings: Any) -> torch.Tensor:
    return _plain(bench, bench.apply(unet, bench.tokens(1), **settings))


def _write(bench: Bench, name: str, kind: str) -> str:
    """Write the UNet with quantised linear layers in its transformers; returns the file name.

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
    """A layer's weight and its scale: its largest magnitude over the format's largest number."""
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
