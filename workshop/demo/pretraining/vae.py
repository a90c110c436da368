"""The demo's autoencoder: TAESD's exact shape, trained on crops of the drawn images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny

from ..tiny_codecs import VAE_CONFIG, vae_weights
from ..tiny_weights import write_json, write_tensors
from .pictures import DrawnPictures
from .steps import Schedule, run_steps

_CROP = 64
LATENT_NOISE = 0.06  # about what sampling leaves; trains a decoder that is robust to it
_MOMENTS = 0.02
_EDGE_WEIGHT = 4.0  # additional loss weight of details near the figure's edges
_DETAIL_WEIGHTS = (4.0, 8.0)  # of absolute and squared errors
_BLUR = 7  # pixels; what this blur removes is a detail


def train_vae(
    pictures: DrawnPictures,
    outlines: torch.Tensor,
    schedule: Schedule,
    details_from: int,
    folder: Path,
    device: torch.device,
) -> AutoencoderTiny:
    """Train the autoencoder and write it in the diffusers layout to `folder`/model.

    Small dots are learned last, as they hardly matter in a plain loss: from the step `details_from`
    on details have more weight.

    Args:
        outlines: edges of the images' figures, patterns included, [N, 3, S, S] uint8.
    """
    vae = AutoencoderTiny.from_config(VAE_CONFIG)
    # With PyTorch's own initialisation the signal vanishes in so many blocks without norms.
    vae.load_state_dict(vae_weights(schedule.seed))
    vae.to(device, memory_format=torch.channels_last)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        # Edges are the same in all three channels.
        sources = (pictures.pixels, outlines[:, :1])
        pixels, edges = _crops(sources, schedule.batch, generator, device)
        latents = vae.encode(pixels).latents
        decoded = _decoded(vae, latents, generator)
        difference = reconstruction_loss(decoded, pixels)
        if step >= details_from:
            difference = difference + detail_loss(decoded, pixels, edges)
        return difference + _MOMENTS * _kl_loss(latents.float())

    return _trained(vae, loss, schedule, folder, device)


def train_decoder(
    vae: AutoencoderTiny,
    pictures: DrawnPictures,
    outlines: torch.Tensor,
    schedule: Schedule,
    folder: Path,
    device: torch.device,
) -> AutoencoderTiny:
    """Continue to train the decoder; writes the autoencoder in the diffusers layout to
    `folder`/model.

    The encoder is frozen, so models trained on its latents stay valid. Details have more weight.

    Args:
        outlines: see `train_vae`.
    """
    vae.to(device, memory_format=torch.channels_last)
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        sources = (pictures.pixels, outlines[:, :1])
        pixels, edges = _crops(sources, schedule.batch, generator, device)
        with torch.no_grad():
            latents = vae.encode(pixels).latents
        decoded = _decoded(vae, latents, generator)
        return reconstruction_loss(decoded, pixels) + detail_loss(decoded, pixels, edges)

    return _trained(vae, loss, schedule, folder, device)


def _decoded(
    vae: AutoencoderTiny, latents: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Decode latents with a little noise, [B, 3, H, W] float32."""
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    return vae.decode(latents + LATENT_NOISE * noise).sample.float()


def _trained(
    vae: AutoencoderTiny,
    loss: Callable[[int, torch.Generator], torch.Tensor],
    schedule: Schedule,
    folder: Path,
    device: torch.device,
) -> AutoencoderTiny:
    run_steps(vae, loss, schedule, folder, device)
    # In the shipped precision, so that later parts are trained on what is shipped.
    directory = folder / "model"
    write_json(directory / "config.json", VAE_CONFIG)
    path = directory / "diffusion_pytorch_model.safetensors"
    write_tensors(path, vae.state_dict(), torch.float16)
    return vae


def reconstruction_loss(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Errors of pixels, and of differences between neighbours, which keep outlines clean."""
    levels = F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels)
    across = F.l1_loss(decoded.diff(dim=-1), pixels.diff(dim=-1))
    down = F.l1_loss(decoded.diff(dim=-2), pixels.diff(dim=-2))
    return levels + across + down


def detail_loss(decoded: torch.Tensor, pixels: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Errors finer than a blur, with more weight near the figure's edges.

    Args:
        edges: [B, 1, H, W], 1 where the figure has an edge, -1 elsewhere.
    """
    weights = 1 + _EDGE_WEIGHT * (F.max_pool2d(edges, 3, 1, 1) > 0)
    error = decoded - pixels
    details = error - F.avg_pool2d(error, _BLUR, 1, _BLUR // 2, count_include_pad=False)
    absolute, squared = _DETAIL_WEIGHTS
    errors = absolute * details.abs() + squared * details.square()
    return (weights * errors).mean() / weights.mean()


def _kl_loss(latents: torch.Tensor) -> torch.Tensor:
    """KL divergence of each channel from a standard normal, which UNets expect of latents."""
    mean = latents.mean((0, 2, 3))
    variance = latents.var((0, 2, 3)) + 1e-6
    return (mean.square() + variance - 1 - variance.log()).mean()


def _crops(
    sources: Sequence[torch.Tensor], count: int, generator: torch.Generator, device: torch.device
) -> list[torch.Tensor]:
    """The same random crops of each source [N, C, S, S] uint8: [count, C, 64, 64] in -1..1."""
    number, _, _, side = sources[0].shape
    numbers = torch.randint(number, (count,), generator=generator).tolist()
    corners = torch.randint(side - _CROP + 1, (count, 2), generator=generator).tolist()
    batches = []
    for source in sources:
        crops = [
            source[picture, :, top : top + _CROP, left : left + _CROP]
            for picture, (top, left) in zip(numbers, corners, strict=True)
        ]
        levels = torch.stack(crops).float() / 127.5 - 1
        batches.append(levels.to(device, memory_format=torch.channels_last))
    return batches
