"""Models of real size with random weights, for benchmarks without downloads.

Used in a process that has imported ComfyUI (see `gpu_check.worker` and `real_size.py`).
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# Last in the path: the pack's folder `nodes` must not hide ComfyUI's module.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.append(str(Path(__file__).resolve().parents[1]))

from goldens import real_shapes

_NOISE = 1 << 24  # random values, reused: drawing billions takes a CPU minutes

SDXL: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "context_dim": 2048,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "legacy": False,
}
"""Configuration of SDXL's UNet for `comfy.supported_models.SDXL`."""


def unet_shapes() -> dict[str, torch.Size]:
    """Weight name -> shape of SDXL's UNet in ComfyUI, without allocating weights."""
    import comfy.ops
    import comfy.supported_models
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = comfy.supported_models.SDXL(SDXL).unet_config
    unet = UNetModel(**config, device="meta", operations=comfy.ops.disable_weight_init)
    return {name: weight.shape for name, weight in unet.state_dict().items()}


def random_weights(
    shapes: Mapping[str, Any], dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor on the CPU), drawn on `device`, such that activations stay finite.

    Norms are 1, biases 0; other weights have a standard deviation of 1 / sqrt(fan in), and a LoRA's
    product a quarter of its layer's.
    """
    noise = torch.randn(
        _NOISE, generator=torch.Generator(device).manual_seed(seed), device=device
    ).to(dtype)
    for name, shape in shapes.items():
        size = torch.Size(shape)
        if len(size) == 1:
            value = 0.0 if name.endswith("bias") else 1.0
            yield name, torch.full(size, value, dtype=dtype)
            continue
        count = size.numel()
        scale = (0.5 if "_lora" in name else 1.0) / size[1:].numel() ** 0.5
        # Each tensor starts at another offset, so that layers of the same shape differ.
        values = _repeated(noise, zlib.crc32(name.encode()) % _NOISE, count)
        yield name, (values.reshape(size) * scale).cpu()


def _repeated(noise: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """`count` values of `noise` from `start` on, wrapping around at its end."""
    parts = []
    while count > 0:
        parts.append(noise[start : start + count])
        count -= len(parts[-1])
        start = 0
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def write_adapter(path: Path, device: torch.device | str = "cpu") -> None:
    """Write a random adapter of released size with its MLLM inside, in bfloat16 (5.5 GB)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(random_weights(real_shapes(), torch.bfloat16, device)), path)


def random_sdxl(dtype: torch.dtype = torch.bfloat16) -> Any:
    """SDXL's UNet with random weights as a ComfyUI MODEL, built in memory."""
    import comfy.model_management as mm
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SDXL(SDXL)
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "")
    unet = model.diffusion_model
    shapes = {name: weight.shape for name, weight in unet.named_parameters()}
    weights = dict(unet.named_parameters())
    with torch.no_grad():
        for name, value in random_weights(shapes, dtype, "cpu", seed=1):
            weights[name].copy_(value)
    return comfy.model_patcher.ModelPatcher(model, mm.get_torch_device(), mm.unet_offload_device())
