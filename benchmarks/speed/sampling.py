"""What EasyRef Apply adds to a sampling step, timed at its own attention slots.

SDXL's UNet with its widths and one transformer block where SDXL has one, two or ten: shares stay
about the same, and it fits a small computer. Whole steps spread more than what is added.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .timing import Row

_UNET = {
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "transformer_depth_middle": 2,
}
_SIDE = 32  # latent cells: 256 pixels
_STEPS = 4
_BARS = {"one EasyRef Apply": 0.01, "two with masks": 0.05}


class _Slots:
    """Seconds in EasyRef's attention slots, without the text's attention in them."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.seconds = 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        layer, call = self._layer, self._layer.ReferenceAttention.__call__
        text, inner = layer.optimized_attention, [0.0]

        def of_text(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return text(*args, **kwargs)
            finally:
                inner[0] += time.process_time() - start

        def of_slot(slot: Any, *args: Any, **kwargs: Any) -> Any:
            inner[0], start = 0.0, time.process_time()
            try:
                return call(slot, *args, **kwargs)
            finally:
                self.seconds += time.process_time() - start - inner[0]

        layer.optimized_attention = of_text
        layer.ReferenceAttention.__call__ = of_slot
        try:
            yield
        finally:
            layer.optimized_attention = text
            layer.ReferenceAttention.__call__ = call


def sampling(comfyui: Path, work: Path, repeats: int) -> list[Row]:
    """Rows of the table; starts ComfyUI in this process, on the CPU."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from real_size import start_comfyui

    adapters = work / "models" / "easyref"
    adapters.mkdir(parents=True, exist_ok=True)
    nodes = start_comfyui(comfyui, work, "cpu")
    with torch.inference_mode():
        model = _unet()
        parts = {name: sys.modules[f"easyref_pack.{name}"] for name in _modules()}
        layers = parts["nodes.host.unet_layers"].cross_attention_layers(model)
        save_file(_adapter(layers), adapters / "random.safetensors")
        easyref = nodes["EasyRefLoader"].execute(
            adapter="random.safetensors", mllm="from adapter", precision="fp32"
        )[0]
        given = _tokens(parts, easyref, 1), _tokens(parts, easyref, 2)

        def apply(to: Any, tokens: Any, mask: torch.Tensor | None) -> Any:
            return nodes["EasyRefApply"].execute(to, easyref, tokens, mask=mask)[0]

        left = torch.zeros(1, 64, 64)
        left[:, :, :32] = 1
        models = {
            "one EasyRef Apply": apply(model, given[0], None),
            "two with masks": apply(apply(model, given[0], left), given[1], 1 - left),
        }
        rows = []
        for name, steered in models.items():
            shares = []
            _sample(steered)  # keys and values are computed
            for _ in range(repeats):
                start = time.process_time()
                _sample(model)
                plain = time.process_time() - start
                slots = _Slots(parts["nodes.sampling.layer"])
                with slots.timed():
                    _sample(steered)
                shares.append(slots.seconds / plain)
            spread = (max(shares) - min(shares)) / 2
            rows.append(Row(f"step: {name}", statistics.median(shares), spread, _BARS[name]))
    return rows


def _modules() -> tuple[str, ...]:
    return (
        "nodes.host.unet_layers",
        "nodes.sampling.layer",
        "easyref_core.tokens.reference_tokens",
    )


def _unet() -> Any:
    import comfy.model_management as mm
    import comfy.model_patcher
    import comfy.supported_models
    from random_models import SDXL, random_weights

    config = comfy.supported_models.SDXL(SDXL | _UNET)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    weights = dict(model.diffusion_model.named_parameters())
    shapes = {name: weight.shape for name, weight in weights.items()}
    for name, value in random_weights(shapes, torch.float32, "cpu", seed=1):
        weights[name].copy_(value)
    return comfy.model_patcher.ModelPatcher(model, mm.get_torch_device(), mm.unet_offload_device())


def _adapter(layers: Any) -> dict[str, torch.Tensor]:
    """A tiny MLLM with the projections of 64 tokens for these layers."""
    import goldens

    from easyref_core.encode.encoder import EasyRefEncoder

    encoder = EasyRefEncoder(replace(goldens.TINY), 64, 2048)
    goldens.randomise(encoder)
    tensors = {n: t.clone() for n, t in encoder.state_dict().items()}
    patch = goldens.BODY + "visual.patch_embed.proj.weight"
    tensors[patch] = tensors[patch].unflatten(1, (3, 2, 14, 14))
    generator = torch.Generator().manual_seed(0)
    for layer, found in layers.items():
        width, context = found.widths
        for part in ("to_k_ip", "to_v_ip"):
            weight = torch.randn(width, context, generator=generator) * context**-0.5
            tensors[f"unet.{layer}.processor.{part}.weight"] = weight
    return tensors


def _tokens(parts: Any, easyref: Any, seed: int) -> Any:
    values = torch.randn(2, 1, 64, 2048, generator=torch.Generator().manual_seed(seed))
    checkpoint = easyref.checkpoint
    kind = parts["easyref_core.tokens.reference_tokens"].ReferenceTokens
    return kind(values[0], values[1], checkpoint.identity, checkpoint.name)


def _sample(model: Any) -> torch.Tensor:
    import comfy.sample

    generator = torch.Generator().manual_seed(3)
    states = torch.randn(1, 77, 2048, generator=generator)
    text = [[states, {"pooled_output": torch.zeros(1, 1280)}]]
    noise = torch.randn(1, 4, _SIDE, _SIDE, generator=generator)
    settings = (_STEPS, 7.5, "ddim", "normal", text, text, noise * 0)
    return comfy.sample.sample(model, noise, *settings, seed=1, disable_pbar=True)
