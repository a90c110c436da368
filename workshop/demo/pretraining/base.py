"""The demo's base model: a small SDXL, UNet and text encoders, trained on the captions' words."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from easyref_core.errors import EasyRefError
from easyref_core.files import write_atomically
from easyref_core.training.schedule import loss_weights

from ..tiny_codecs import CLIP_G_CONFIG, CLIP_L_CONFIG
from ..tiny_unet import UNET_CONFIG
from ..tiny_weights import write_json, write_tensors
from .pictures import SIDE, DrawnPictures
from .steps import Schedule, run_steps, shared_map
from .text_encoders import TextEncoders, Tokenizers, load_tokenizers, write_tokenizers

SIZES: dict[str, Any] = {
    "attention_head_dim": [1, 1, 1],
    "block_out_channels": [64, 64, 64],
    "transformer_layers_per_block": [1, 1, 2],
}
UNET = {**UNET_CONFIG, **SIZES}
NOISE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}
_EMPTY, _UNKNOWN = 0.1, 0.05  # shares of captions that are empty, or of unknown words only
_MIN_SNR = 5.0
_EDGE_WEIGHT = 3.0  # additional loss weight at the figure's edges, without noise


class BaseModel(nn.Module):
    """UNet and text encoders, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel.from_config(UNET)
        self.unet.set_attn_processor(AttnProcessor())  # faster than the fused one on a CPU
        self.text = TextEncoders()


class Conditions:
    """Random images with captions."""

    def __init__(self, pictures: DrawnPictures, tokenizers: Tokenizers) -> None:
        self._captions = pictures.captions
        spellings = sorted({text for texts in pictures.captions for text in texts})
        self._ids = dict(zip(spellings, zip(*tokenizers(spellings), strict=True), strict=True))
        small, large = tokenizers([""])
        self._empty = (small[0], large[0])

    def batch(
        self, count: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(indices of images [B], token ids [B, 77] for each text encoder)"""
        numbers = torch.randint(len(self._captions), (count,), generator=generator)
        chances = torch.rand(count, 2, generator=generator).tolist()
        rows = [self._text(n, *c) for n, c in zip(numbers.tolist(), chances, strict=True)]
        return numbers, [torch.stack(column) for column in zip(*rows, strict=True)]

    def _text(self, number: int, kind: float, which: float) -> tuple[torch.Tensor, torch.Tensor]:
        if kind < _EMPTY:
            return self._empty
        if kind < _EMPTY + _UNKNOWN:
            return _unknown(self._empty, int(which * 40) + 1)
        captions = self._captions[number]
        return self._ids[captions[int(which * len(captions))]]


def train_base(
    pictures: DrawnPictures,
    outlines: torch.Tensor,
    vae: AutoencoderTiny,
    schedule: Schedule,
    folder: Path,
    device: torch.device,
) -> Path:
    """Train UNet and text encoders; writes and returns the diffusers directory `folder`/model.

    Args:
        outlines: of the images' figures, [N, 3, S, S] uint8.
    """
    directory = folder / "model"
    write_tokenizers(directory)
    tokenizers = load_tokenizers(directory)
    latents = encode_images(vae, pictures, device, folder / "latents.pt")
    conditions = Conditions(pictures, tokenizers)
    edges = edge_mask(outlines)
    torch.manual_seed(schedule.seed)
    model = BaseModel().to(device)
    alphas_cumprod = DDPMScheduler(**NOISE).alphas_cumprod

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        numbers, ids = conditions.batch(schedule.batch, generator)
        states, pooled = model.text(*ids)
        sample = latents[numbers], edges[numbers]
        return noise_loss(model.unet, *sample, states, pooled, alphas_cumprod, generator, device)

    run_steps(model, loss, schedule, folder, device)
    write_base(model, vae, directory)
    return directory


def noise_loss(
    unet: UNet2DConditionModel,
    latents: torch.Tensor,
    edges: torch.Tensor,
    states: torch.Tensor,
    pooled: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    generator: torch.Generator,
    device: torch.device,
    residuals: Callable[[torch.Tensor, torch.Tensor], Mapping[str, Any]] = lambda *_: {},
) -> torch.Tensor:
    """Mean squared error on the noise, weighted by min-SNR (5) and by edges.

    Eyes are a few of hundreds of latent pixels, so the figure's edges get more weight, in
    proportion to the signal: with equal weight in pure noise the model would expect figures
    everywhere.

    Args:
        edges: [B, 1, H, W] 1 at latent pixels where the figure has an edge, 0 elsewhere.
        residuals: (noisy latents, timesteps) -> a ControlNet's residuals, as arguments of the UNet.
    """
    noisy, noise, timesteps = add_noise(latents, alphas_cumprod, generator)
    noisy, steps = noisy.to(device), timesteps.to(device)
    predicted = unet(
        noisy,
        steps,
        states,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids(len(latents), device)},
        **residuals(noisy, steps),
    ).sample.float()
    edge_weights = 1 + _EDGE_WEIGHT * edges * alphas_cumprod[timesteps][:, None, None, None]
    weights = loss_weights(alphas_cumprod, timesteps, "min_snr", _MIN_SNR)[:, None, None, None]
    errors = F.mse_loss(predicted, noise.to(device), reduction="none")
    return (errors * (edge_weights * weights).to(device)).mean()


def edge_mask(outlines: torch.Tensor) -> torch.Tensor:
    """[N, 1, S / 8, S / 8] 1 where the figure has an edge, 0 elsewhere.

    Args:
        outlines: [N, 3, S, S] uint8, white on black.
    """
    blocks = outlines[:, :1].unfold(2, 8, 8).unfold(3, 8, 8)  # [N, 1, S / 8, S / 8, 8, 8]
    return (blocks.amax((-2, -1)) > 127).float()


def add_noise(
    latents: torch.Tensor, alphas_cumprod: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(noisy latents, the noise, timesteps [B])"""
    count, steps = len(latents), len(alphas_cumprod)
    # Spread evenly, as a batch's loss depends much on which noise levels it happens to get.
    places = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    timesteps = (places * steps).long().clamp(max=steps - 1)
    noise = torch.randn(latents.shape, generator=generator)
    level = alphas_cumprod[timesteps][:, None, None, None]
    return level.sqrt() * latents + (1 - level).sqrt() * noise, noise, timesteps


def time_ids(count: int, device: torch.device) -> torch.Tensor:
    """SDXL's size conditioning [count, 6] of an uncropped image."""
    return torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * count, device=device).float()


@torch.no_grad()
def encode_images(
    vae: AutoencoderTiny,
    pictures: DrawnPictures,
    device: torch.device,
    cache: Path,
    half: bool = True,
) -> torch.Tensor:
    """Latents [N, 4, S / 8, S / 8] of images, cached in a file.

    Args:
        half: encode in bfloat16.

    Raises:
        EasyRefError: the file is damaged, or was made from other images or by another autoencoder.
    """
    source = _fingerprint(vae, pictures.names)
    if cache.is_file():
        return _cached_latents(cache, source)
    vae = vae.to(memory_format=torch.channels_last)

    def encode(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            return vae.encode(batch.to(device).float() / 127.5 - 1).latents.float().cpu()

    latents = torch.cat(shared_map(encode, pictures.pixels.split(8), device))
    content = {"source": source, "latents": latents}
    write_atomically(cache, lambda partial: torch.save(content, partial))
    return latents


def _fingerprint(vae: AutoencoderTiny, names: Sequence[str]) -> str:
    """Differs for other images, or another autoencoder."""
    digest = hashlib.sha256("\n".join(names).encode())
    for name, weight in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def _cached_latents(cache: Path, source: str) -> torch.Tensor:
    retrain = f"delete {cache.parent} to train this part again from its start"
    try:
        content = torch.load(cache, weights_only=True)
        same = content["source"] == source
    except Exception as error:  # damaged files raise anything
        raise EasyRefError(f"{cache} cannot be read ({error}); {retrain}.") from error
    if not same:
        raise EasyRefError(
            f"{cache} holds latents of other images, or of another autoencoder, than there are "
            f"now. If the recipe's base_pictures has changed, restore it; or {retrain}."
        )
    return content["latents"]


def write_base(model: BaseModel, vae: AutoencoderTiny, directory: Path) -> None:
    """Write everything but the tokenizers in the diffusers layout."""
    write_json(directory / "unet" / "config.json", UNET)
    path = directory / "unet" / "diffusion_pytorch_model.safetensors"
    write_tensors(path, model.unet.state_dict(), torch.float16)
    weights = model.text.weights()
    for part, name, config in (
        ("text_encoder", "clip_l", CLIP_L_CONFIG),
        ("text_encoder_2", "clip_g", CLIP_G_CONFIG),
    ):
        write_json(directory / part / "config.json", config)
        write_tensors(directory / part / "model.safetensors", weights[name], torch.float16)
    write_vae_and_scheduler(vae, directory)


def write_vae_and_scheduler(vae: AutoencoderTiny, directory: Path) -> None:
    """Write VAE and scheduler; the scheduler comes last of all."""
    vae.save_pretrained(directory / "vae")
    DDPMScheduler(**NOISE).save_pretrained(directory / "scheduler")


def _unknown(
    empty: tuple[torch.Tensor, torch.Tensor], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """An empty caption's token ids with `count` unknown words."""
    words = torch.full((count,), 1000)  # not among the used ids
    small, large = (torch.cat((ids[:1], words, ids[1:]))[: len(ids)] for ids in empty)
    return small, large
