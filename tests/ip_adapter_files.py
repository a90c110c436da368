"""Tiny IP-Adapters and image encoders with random weights, in the layouts of h94/IP-Adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

EMBEDDING, HIDDEN = 24, 32  # widths of the image encoder


def write_ip_adapter(
    path: Path, base: Path, projection: Callable[[int], dict[str, tuple[int, ...]]], **changes: Any
) -> Path:
    """An IP-Adapter with random weights for the UNet of `base`.

    Args:
        projection: context width -> shapes of the image projection's weights.
        changes: of the UNet's configuration.
    """
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(base / "unet") | changes
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    shapes = {f"image_proj.{n}": s for n, s in projection(config["cross_attention_dim"]).items()}
    names = [n.removesuffix(".processor") for n in unet.attn_processors]
    for number, name in enumerate(names):
        if name.endswith("attn2"):
            for part in ("to_k", "to_v"):
                weight = unet.get_submodule(f"{name}.{part}").weight
                shapes[f"ip_adapter.{number}.{part}_ip.weight"] = tuple(weight.shape)
    generator = torch.Generator().manual_seed(5)
    weights = {n: 0.3 * torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    save_file(weights, path)
    return path


def plain_projection(width: int) -> dict[str, tuple[int, ...]]:
    """As in ip-adapter_sdxl.safetensors."""
    return {
        "proj.weight": (4 * width, EMBEDDING),
        "proj.bias": (4 * width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }


def plus_projection(width: int) -> dict[str, tuple[int, ...]]:
    """As in ip-adapter-plus_sdxl_vit-h.safetensors: a resampler of four layers."""
    inner = 64  # one head
    shapes: dict[str, tuple[int, ...]] = {"latents": (1, 3, inner)}
    for name, outputs, inputs in (("proj_in", inner, HIDDEN), ("proj_out", width, inner)):
        shapes |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    shapes |= {"norm_out.weight": (width,), "norm_out.bias": (width,)}
    for layer in (f"layers.{number}" for number in range(4)):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"{layer}.{norm}.{part}": (inner,) for part in ("weight", "bias")}
        shapes |= {
            f"{layer}.0.to_q.weight": (inner, inner),
            f"{layer}.0.to_kv.weight": (2 * inner, inner),
            f"{layer}.0.to_out.weight": (inner, inner),
            f"{layer}.1.1.weight": (4 * inner, inner),
            f"{layer}.1.3.weight": (inner, 4 * inner),
        }
    return shapes


def write_image_encoder(folder: Path, **changes: Any) -> Path:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "projection_dim": EMBEDDING,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    with torch.random.fork_rng([]):
        torch.manual_seed(6)
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes | changes))
    for weight in model.parameters():
        weight.data *= 3  # CLIP's initial weights are so small that all pictures look alike
    model.save_pretrained(folder)
    return folder
