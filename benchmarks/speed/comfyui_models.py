"""Random models inside a ComfyUI that has been started in this process."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from easyref_core.encode.encoder import EasyRefEncoder

from .processes import ROOT


def start(comfyui: Path, work: Path, *options: str) -> dict[str, Any]:
    """Start ComfyUI on the CPU with its folders in `work`; the pack's node classes by id.

    Args:
        options: more of ComfyUI's.
    """
    sys.path += [str(ROOT / "benchmarks"), str(ROOT / "tests")]
    from real_size import start_comfyui

    (work / "models" / "easyref").mkdir(parents=True, exist_ok=True)
    return start_comfyui(comfyui, work, "cpu", *options)


def part(name: str) -> ModuleType:
    """One of the pack's modules, such as `nodes.sampling.layer`."""
    return sys.modules[f"easyref_pack.{name}"]


def random_unet(sizes: Mapping[str, Any], seed: int = 1) -> Any:
    """A MODEL with SDXL's UNet, but for these sizes, in float32."""
    import comfy.model_management as mm
    import comfy.model_patcher
    import comfy.supported_models
    from random_models import SDXL, random_weights

    config = comfy.supported_models.SDXL(SDXL | sizes)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    weights = dict(model.diffusion_model.named_parameters())
    shapes = {name: weight.shape for name, weight in weights.items()}
    for name, value in random_weights(shapes, torch.float32, "cpu", seed):
        weights[name].copy_(value)
    return comfy.model_patcher.ModelPatcher(model, mm.get_torch_device(), mm.unet_offload_device())


def random_adapter(
    encoder: EasyRefEncoder, layers: Mapping[str, Any], rank: int = 0, seed: int = 0
) -> dict[str, torch.Tensor]:
    """An adapter file's tensors around an encoder, in the official layout.

    Args:
        layers: those of `cross_attention_layers`.
        rank: of its LoRA; 0 for none.
    """
    import goldens

    tensors = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    patch = goldens.BODY + "visual.patch_embed.proj.weight"
    tensors[patch] = tensors[patch].unflatten(1, (3, 2, 14, 14))
    generator = torch.Generator().manual_seed(seed)

    def weight(outputs: int, inputs: int) -> torch.Tensor:
        return torch.randn(outputs, inputs, generator=generator) * inputs**-0.5

    for layer, found in layers.items():
        width, context = found.widths
        name = f"unet.{layer}.processor"
        for projection in ("to_k_ip", "to_v_ip"):
            tensors[f"{name}.{projection}.weight"] = weight(width, context)
        for target in ("to_q", "to_k", "to_v", "to_out") if rank else ():
            inputs = context if target in ("to_k", "to_v") else width
            tensors[f"{name}.{target}_lora.down.weight"] = weight(rank, inputs)
            tensors[f"{name}.{target}_lora.up.weight"] = weight(width, rank)
    return tensors


def random_tokens(easyref: Any, seed: int) -> Any:
    """Reference tokens of this adapter."""
    checkpoint = easyref.checkpoint
    shape = (2, 1, checkpoint.num_tokens, checkpoint.token_width)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    kind = part("easyref_core.tokens.reference_tokens").ReferenceTokens
    return kind(values[0], values[1], checkpoint.identity, checkpoint.name)
