"""SDXL in one .safetensors file, as ComfyUI and others use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...errors import EasyRefError
from ...training.base_files import check_base_files
from ...untrusted import escaped
from ...weight_file import WeightFile, open_weight_file

# Its configurations and tokenizers serve for every file of SDXL's architecture.
HUB_NAME = "stabilityai/stable-diffusion-xl-base-1.0"
_UNET, _VAE, _CLIP_L, _CLIP_G = (
    "model.diffusion_model.",
    "first_stage_model.",
    "conditioner.embedders.0.transformer.",
    "conditioner.embedders.1.model.",
)
_OTHERS = {
    "cond_stage_model.": "a Stable Diffusion 1 or 2",
    "conditioner.embedders.0.model.": "an SDXL refiner",
    "unet.": "an adapter",
    "image_proj.": "an IP-Adapter",
    "lora_unet_": "a LoRA",
}


def check_single_file(path: Path) -> WeightFile:
    """The header of a single file that holds a whole SDXL.

    Raises:
        EasyRefError: missing or damaged; another model, or part of one.
    """
    file = open_weight_file(path)
    name = escaped(str(path))
    if file.shards or not file.is_safetensors:
        kind = "an index of shards" if file.shards else "a PyTorch file"
        raise EasyRefError(f"{name} is {kind}. Get SDXL as a .safetensors file.")
    missing = [
        part
        for part, prefix in (
            ("UNet", _UNET),
            ("VAE", _VAE),
            ("text encoder CLIP L", _CLIP_L),
            ("text encoder CLIP G", _CLIP_G),
        )
        if not any(tensor.startswith(prefix) for tensor in file.tensors)
    ]
    if missing:
        kind = next(
            (
                kind
                for start, kind in _OTHERS.items()
                if any(t.startswith(start) for t in file.tensors)
            ),
            None,
        )
        looks = f" It looks like {kind}." if kind else ""
        raise EasyRefError(
            f"{name} is no whole SDXL: it lacks {', '.join(missing)}.{looks} Name a diffusers "
            "directory of SDXL, or one file with UNet, VAE and both text encoders."
        )
    file.check_weights(n for n in file.tensors if not n.endswith("position_ids"))
    return file


def find_config(folder: Path | None) -> Path:
    """The diffusers directory from which a single file takes configurations and tokenizers.

    Args:
        folder: None looks into the hub's cache; nothing is fetched.

    Raises:
        EasyRefError: there is none; see `check_base_files`.
    """
    if folder is None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(HUB_NAME, "model_index.json")
        if not isinstance(found, str):
            raise EasyRefError(
                "An SDXL in one file holds no configurations and tokenizers. Name a folder with "
                f"those of {HUB_NAME} (all its .json and .txt files, no weights), "
                "or give SDXL itself as a diffusers directory."
            )
        folder = Path(found).parent
    check_base_files(folder)
    if not (folder / "model_index.json").is_file():
        raise EasyRefError(
            f"{escaped(str(folder))} lacks model_index.json, so that configurations cannot be "
            "taken from it. Get the whole diffusers directory of an SDXL."
        )
    return folder


def load_single_file(path: Path, config: Path, dtype: torch.dtype) -> Any:
    """diffusers' pipeline of a checked file."""
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_single_file(
        str(path),
        config=str(config),
        torch_dtype=dtype,
        local_files_only=True,
        add_watermarker=False,
    )
