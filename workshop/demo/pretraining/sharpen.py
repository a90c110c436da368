"""Trains a model set's VAE decoder further, for pictures that are sampled.

    python -m workshop.demo.pretraining.sharpen SET DATA FOLDER [--steps 2000]

A decoder that is trained on errors of pixels alone paints the mean of what a latent may show: soft
outlines, and colours that leak. Here a small discriminator, trained beside it, has to tell its
images from drawn ones. Half of the latents are as sampling leaves them: noised a little, and
predicted by the set's UNet. The encoder is frozen, so all that was trained on its latents stays
valid.

FOLDER gets the autoencoder in the diffusers layout, in float16; `stored_weights` converts it once
it is in a set's `vae`. DATA is a folder that `python -m workshop.demo data` drew.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from easyref_core.errors import EasyRefError
from easyref_core.files import check_place

from ..stored_text import load_text
from ..stored_weights import WEIGHTS, load_stored
from ..tiny_codecs import VAE_CONFIG
from ..tiny_weights import write_json, write_tensors
from .base import NOISE, time_ids
from .pictures import DrawnPictures, read_outlines, read_pictures
from .vae import LATENT_NOISE, detail_loss, reconstruction_loss

_PICTURES = 1200
_BATCH = 2
_TIMESTEPS = (20, 260)  # of the latents that the UNet predicts
_RATE, _DISCRIMINATOR_RATE = 4e-4, 4e-4
_ADVERSARIAL, _FEATURES = 0.05, 0.1  # weights of the discriminator's losses
_WARMUP, _ADVERSARIAL_WARMUP = 100, 200  # steps
_EMA = 0.998


class Discriminator(nn.Module):
    """A small CNN, which says of each patch of an image how drawn it looks."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((3, 32, 4, 2), (32, 64, 4, 2), (64, 96, 3, 1), (96, 1, 3, 1))
        convs = (nn.Conv2d(*size, padding=1) for size in sizes)
        self.layers = nn.ModuleList(spectral_norm(conv) for conv in convs)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """[B, 3, H, W] in -1..1 -> [B, 1, H / 4, W / 4], above 0 for drawn; each layer's states."""
        states = []
        for layer in self.layers[:-1]:
            pixels = F.leaky_relu(layer(pixels), 0.2)
            states.append(pixels)
        return self.layers[-1](pixels), states


@torch.inference_mode()
def sampled_latents(
    models: Path, latents: torch.Tensor, captions: Sequence[str], generator: torch.Generator
) -> torch.Tensor:
    """Latents [N, 4, h, w] as the set's UNet predicts them from slightly noised ones."""
    unet = load_stored(UNet2DConditionModel, models / "unet")
    text = load_text(models / "text_encoders")
    alphas = DDPMScheduler(**NOISE).alphas_cumprod
    predicted = []
    for start in range(0, len(latents), 16):
        part = slice(start, start + 16)
        timesteps = torch.randint(*_TIMESTEPS, (len(latents[part]),), generator=generator)
        noise = torch.randn(latents[part].shape, generator=generator)
        level = alphas[timesteps][:, None, None, None]
        noisy = level.sqrt() * latents[part] + (1 - level).sqrt() * noise
        states, pooled = text(*text.tokenizers(captions[part]))
        added = {
            "text_embeds": pooled.float(),
            "time_ids": time_ids(len(noisy), torch.device("cpu")),
        }
        error = unet(noisy, timesteps, states.float(), added_cond_kwargs=added).sample
        predicted.append((noisy - (1 - level).sqrt() * error) / level.sqrt())
    return torch.cat(predicted)


def sharpen(models: Path, data: Path, folder: Path, steps: int, seed: int = 0) -> AutoencoderTiny:
    """Train and write the autoencoder; about a quarter of an hour on a CPU core.

    Raises:
        EasyRefError: fewer than one step.
    """
    if steps < 1:
        raise EasyRefError(f"--steps is {steps}; it must be 1 or more.")
    check_place(folder / WEIGHTS)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae = load_stored(AutoencoderTiny, models / "vae").to(memory_format=torch.channels_last)
    pictures = read_pictures(data, _PICTURES)
    outlines = read_outlines(data, pictures)
    with torch.inference_mode():
        encoded = [vae.encode(p.float() / 127.5 - 1).latents for p in pictures.pixels.split(16)]
    exact = torch.cat(encoded)
    captions = [texts[0] for texts in pictures.captions]
    sources = torch.stack((exact, sampled_latents(models, exact, captions, generator))).clone()
    _train(vae, pictures, outlines, sources, steps, generator)
    write_json(folder / "config.json", VAE_CONFIG)
    write_tensors(folder / WEIGHTS, vae.state_dict(), torch.float16)
    return vae


def _train(
    vae: AutoencoderTiny,
    pictures: DrawnPictures,
    outlines: torch.Tensor,
    sources: torch.Tensor,
    steps: int,
    generator: torch.Generator,
) -> None:
    """Leaves the decoder's averaged weights in `vae`.

    Args:
        sources: exact and sampled latents, [2, N, 4, h, w].
    """
    vae.requires_grad_(False)
    decoder = dict(vae.decoder.requires_grad_(True).named_parameters())
    discriminator = Discriminator().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(decoder.values(), lr=_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    other = torch.optim.Adam(discriminator.parameters(), lr=_DISCRIMINATOR_RATE, betas=(0.5, 0.9))
    average = {name: weight.detach().clone() for name, weight in decoder.items()}
    for step in range(steps):
        falling = 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps))
        optimiser.param_groups[0]["lr"] = _RATE * min(1.0, (step + 1) / _WARMUP) * falling
        latents, pixels, edges = _batch(pictures, outlines, sources, generator)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode(latents).sample
        decoded = decoded.float()
        loss = reconstruction_loss(decoded, pixels) + detail_loss(decoded, pixels, edges)
        looks, states = discriminator.requires_grad_(False)(decoded)
        with torch.no_grad():
            drawn = discriminator(pixels)[1]
        features = sum(F.l1_loss(a, b) for a, b in zip(states, drawn, strict=True))
        weight = _ADVERSARIAL * min(1.0, step / _ADVERSARIAL_WARMUP)
        total = loss - weight * looks.mean() + _FEATURES * features
        optimiser.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(decoder.values(), 1.0)
        optimiser.step()
        discriminator.requires_grad_(True)
        as_drawn, as_decoded = discriminator(pixels)[0], discriminator(decoded.detach())[0]
        hinge = F.relu(1 - as_drawn).mean() + F.relu(1 + as_decoded).mean()
        other.zero_grad()
        hinge.backward()
        other.step()
        with torch.no_grad():
            for name, value in decoder.items():
                average[name].lerp_(value, 1 - min(_EMA, (step + 1) / (step + 10)))
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"sharpen {step + 1}: loss {loss.item():.4f}", file=sys.stderr, flush=True)
    with torch.no_grad():
        for name, value in decoder.items():
            value.copy_(average[name])
    vae.eval()


def _batch(
    pictures: DrawnPictures,
    outlines: torch.Tensor,
    sources: torch.Tensor,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(latents with a little noise [B, 4, h, w], images and edges [B, 3 or 1, H, W] in -1..1)

    Whole images, so that borders are only where sampled images have them.
    """
    numbers = torch.randint(len(pictures), (_BATCH,), generator=generator)
    latents = sources[torch.randint(2, (_BATCH,), generator=generator), numbers]
    noise = torch.randn(latents.shape, generator=generator)
    images = (levels[numbers].float() / 127.5 - 1 for levels in (pictures.pixels, outlines[:, :1]))
    batches = (latents + LATENT_NOISE * noise, *images)
    return tuple(b.contiguous(memory_format=torch.channels_last) for b in batches)  # type: ignore[return-value]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m workshop.demo.pretraining.sharpen",
        description="Train the decoder of a model set's autoencoder further.",
    )
    parser.add_argument("set", type=Path, metavar="SET")
    parser.add_argument("data", type=Path, metavar="DATA", help="drawn data set")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="for the new autoencoder")
    parser.add_argument("--steps", type=int, default=2000, help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        sharpen(options.set, options.data, options.folder, options.steps)
    except EasyRefError as error:
        print(f"sharpen: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
