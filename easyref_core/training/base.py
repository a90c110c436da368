"""The frozen base: SDXL's UNet, VAE, text encoders and noise schedule, in the diffusers layout."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import EasyRefError

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DConditionModel

# With this set, older transformers read weights in the first process only and leave the others'
# empty for FSDP to fill; but FSDP does not wrap the text encoders.
_READ_IN_FIRST_ONLY = "FSDP_CPU_RAM_EFFICIENT_LOADING"
_OFFLINE = {"local_files_only": True}
_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


@dataclass
class Base:
    """The base model's parts, frozen; gradients pass through the UNet only."""

    unet: UNet2DConditionModel
    vae: Any
    tokenizers: Sequence[Any]
    text_encoders: Sequence[Any]
    scheduler: DDPMScheduler

    def to(self, device: torch.device, dtype: torch.dtype) -> Base:
        """Move all but the UNet; the VAE stays in float32, as SDXL's overflows in float16."""
        self.vae.to(device)
        for encoder in self.text_encoders:
            encoder.to(device, dtype)
        return self

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Text states [B, 77, W] and pooled text [B, P]."""
        states: list[torch.Tensor] = []
        pooled = torch.empty(0)
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            ids = tokenizer(
                list(texts),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            out = encoder(ids.to(encoder.device), output_hidden_states=True)
            states.append(out.hidden_states[-2])
            pooled = out[0]
        return torch.cat(states, dim=-1), pooled

    @torch.no_grad()
    def encode_image(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Scaled latents [C, h, w] of one image [3, H, W] in -1..1."""
        out = self.vae.encode(pixels[None].to(self.vae.device, torch.float32))
        if hasattr(out, "latent_dist"):
            mean, std = out.latent_dist.mean, out.latent_dist.std
            latents = mean + std * torch.randn(mean.shape, generator=generator).to(mean)
        else:  # AutoencoderTiny has no distribution
            latents = out.latents
        return latents[0] * self.vae.config.scaling_factor


def load_base(folder: str | Path) -> Base:
    """Load the base model, frozen.

    Raises:
        EasyRefError: a part is missing (named) or cannot be loaded.
    """
    folder = Path(folder)
    missing = [part for part in _PARTS if not (folder / part).is_dir()]
    if missing:
        raise EasyRefError(
            f"model.base: {folder} lacks {', '.join(missing)}. It must be an SDXL model in the "
            "diffusers layout."
        )
    import diffusers
    import transformers

    try:
        with _read_everywhere():
            vae_class = getattr(
                diffusers,
                diffusers.AutoencoderKL.load_config(folder / "vae", **_OFFLINE)["_class_name"],
            )
            base = Base(
                unet=diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", **_OFFLINE),
                vae=vae_class.from_pretrained(folder / "vae", **_OFFLINE),
                tokenizers=[
                    transformers.CLIPTokenizer.from_pretrained(
                        str(folder / name), trust_remote_code=False, **_OFFLINE
                    )
                    for name in ("tokenizer", "tokenizer_2")
                ],
                text_encoders=[
                    kind.from_pretrained(folder / name, trust_remote_code=False, **_OFFLINE)
                    for kind, name in (
                        (transformers.CLIPTextModel, "text_encoder"),
                        (transformers.CLIPTextModelWithProjection, "text_encoder_2"),
                    )
                ],
                scheduler=diffusers.DDPMScheduler.from_pretrained(folder / "scheduler", **_OFFLINE),
            )
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise EasyRefError(f"model.base: {folder} cannot be loaded: {error}") from error
    for module in (base.unet, base.vae, *base.text_encoders):
        module.requires_grad_(False).eval()
    return base


@contextmanager
def _read_everywhere() -> Iterator[None]:
    """Let all processes read the weights, whatever accelerate is configured to do."""
    configured = os.environ.pop(_READ_IN_FIRST_ONLY, None)
    try:
        yield
    finally:
        if configured is not None:
            os.environ[_READ_IN_FIRST_ONLY] = configured


def fingerprint(folder: str | Path) -> str:
    """Text that differs between base models: the path, and each weight file's size and time."""
    folder = Path(folder).resolve()
    files = sorted(folder.glob("*/*.safetensors")) + sorted(folder.glob("*/*.bin"))
    stats = [(file.relative_to(folder).as_posix(), file.stat()) for file in files]
    return f"{folder} {[(name, s.st_size, s.st_mtime_ns) for name, s in stats]}"
