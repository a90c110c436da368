"""The demo's base model: a small SDXL, UNet and text encoders, that knows the captions' words."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from easyref_core.demo_set import TABLE, rows_of_ids
from easyref_core.errors import EasyRefError
from easyref_core.files import write_atomically
from easyref_core.training.schedule import loss_weights

from ..tiny_codecs import CLIP_G_CONFIG, CLIP_L_CONFIG
from ..tiny_unet import UNET_CONFIG
from ..tiny_weights import write_json, write_tensors
from .pictures import SIDE, DrawnPictures
from .steps import Schedule, run_steps, shared_map
from .words import END, used_ids, write_tokenizer

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
_EMPTY, _UNKNOWN = 0.1, 0.05  # so many captions are empty, or words it has never seen
_MIN_SNR = 5.0
_DETAIL = 3.0  # what a place with an edge of the figure counts more, at no noise


class TextEncoders(nn.Module):
    """Both of SDXL's text encoders over one cut-down table of words each."""

    def __init__(self) -> None:
        super().__init__()
        self.ids = used_ids()
        self._rows = rows_of_ids(self.ids)
        small = _cut_down(CLIP_L_CONFIG, len(self.ids), int(self._rows[END]))
        large = _cut_down(CLIP_G_CONFIG, len(self.ids), int(self._rows[END]))
        self.small = CLIPTextModel(small)
        # SDXL uses the states before the last layer, so what follows them gets no gradients.
        unused = (f"encoder.layers.{small.num_hidden_layers - 1}.", "final_layer_norm.")
        for name, parameter in self.small.named_parameters():
            parameter.requires_grad_(not any(part in name for part in unused))
        self.large = CLIPTextModelWithProjection(large)

    def forward(
        self, small: torch.Tensor, large: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """CLIP's ids [B, 77] of each -> states [B, 77, width], pooled [B, pooled width]."""
        return _states(self.small, self.large, self._rows[small], self._rows[large])

    def weights(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """{"clip_l": ..., "clip_g": ...} with all 49,408 rows, named as in published files."""
        found = {}
        for name, encoder in (("clip_l", self.small), ("clip_g", self.large)):
            weights = {_published(n): w.detach().cpu() for n, w in encoder.named_parameters()}
            found[name] = weights | {TABLE: weights[TABLE][self._rows]}
        return found


def _published(name: str) -> str:
    """Newer versions of transformers have dropped a level."""
    known = name.startswith(("text_model.", "text_projection."))
    return name if known else f"text_model.{name}"


def _cut_down(config: Mapping[str, Any], words: int, end: int) -> CLIPTextConfig:
    other = {"vocab_size": words + 1, "bos_token_id": 0, "eos_token_id": end}
    # Plain products, as for the UNet below.
    how = {"torch_dtype": "float32", "attn_implementation": "eager"}
    return CLIPTextConfig(**{**config, **other, **how})


class BaseModel(nn.Module):
    """What is trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel.from_config(UNET)
        self.unet.set_attn_processor(AttnProcessor())  # quicker than the fused one on a CPU
        self.text = TextEncoders()


@dataclass(frozen=True)
class Tokenizers:
    """Of the two text encoders; they differ in what they fill up with."""

    small: CLIPTokenizer
    large: CLIPTokenizer

    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [B, 77] for each encoder."""
        ids = [
            t(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
            for t in (self.small, self.large)
        ]
        return ids[0], ids[1]


class Conditions:
    """Which picture is shown with which words."""

    def __init__(self, pictures: DrawnPictures, tokenizers: Tokenizers) -> None:
        self._captions = pictures.captions
        spellings = sorted({text for texts in pictures.captions for text in texts})
        self._ids = dict(zip(spellings, zip(*tokenizers(spellings), strict=True), strict=True))
        small, large = tokenizers([""])
        self._empty = (small[0], large[0])

    def batch(
        self, count: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(picture numbers [B], CLIP's ids [B, 77] for each text encoder)"""
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
    """Train UNet and text encoders and write a diffusers directory, `folder`/model, returned.

    Args:
        outlines: of the pictures' figures, [N, 3, S, S] uint8.
    """
    directory = folder / "model"
    write_tokenizers(directory)
    tokenizers = load_tokenizers(directory)
    latents = encode_pictures(vae, pictures, device, folder / "latents.pt")
    conditions = Conditions(pictures, tokenizers)
    edges = edge_places(outlines)
    torch.manual_seed(schedule.seed)
    model = BaseModel().to(device)
    noise_levels = DDPMScheduler(**NOISE).alphas_cumprod

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        numbers, ids = conditions.batch(schedule.batch, generator)
        states, pooled = model.text(*ids)
        shown = latents[numbers], edges[numbers]
        return noise_loss(model.unet, *shown, states, pooled, noise_levels, generator, device)

    run_steps(model, loss, schedule, folder, device)
    write_base(model, vae, directory)
    return directory


def noise_loss(
    unet: UNet2DConditionModel,
    latents: torch.Tensor,
    edges: torch.Tensor,
    states: torch.Tensor,
    pooled: torch.Tensor,
    noise_levels: torch.Tensor,
    generator: torch.Generator,
    device: torch.device,
    residuals: Callable[[torch.Tensor, torch.Tensor], Mapping[str, Any]] = lambda *_: {},
) -> torch.Tensor:
    """Squared error on the noise, weighted so that no noise level dominates (min-SNR, 5).

    Eyes are a few places of hundreds, so the figure's edges count more. They do so in proportion
    to what the noise leaves: were it so in pure noise, figures would be expected everywhere.

    Args:
        edges: [B, 1, H, W] 1 at places of the latents where the figure has an edge, 0 elsewhere.
        residuals: (noisy latents, timesteps) -> what a ControlNet adds.
    """
    noisy, noise, timesteps = add_noise(latents, noise_levels, generator)
    noisy, steps = noisy.to(device), timesteps.to(device)
    predicted = unet(
        noisy,
        steps,
        states,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": size_numbers(len(latents), device)},
        **residuals(noisy, steps),
    ).sample.float()
    places = 1 + _DETAIL * edges * noise_levels[timesteps][:, None, None, None]
    weights = loss_weights(noise_levels, timesteps, "min_snr", _MIN_SNR)[:, None, None, None]
    errors = F.mse_loss(predicted, noise.to(device), reduction="none")
    return (errors * (places * weights).to(device)).mean()


def edge_places(outlines: torch.Tensor) -> torch.Tensor:
    """[N, 1, S / 8, S / 8] 1 where the figure has an edge, 0 elsewhere.

    Args:
        outlines: [N, 3, S, S] uint8, white on black.
    """
    places = outlines[:, :1].unfold(2, 8, 8).unfold(3, 8, 8)  # [N, 1, S / 8, S / 8, 8, 8]
    return (places.amax((-2, -1)) > 127).float()


def add_noise(
    latents: torch.Tensor, noise_levels: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(noisy latents, the noise, timesteps [B])"""
    timesteps = torch.randint(len(noise_levels), (len(latents),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    level = noise_levels[timesteps][:, None, None, None]
    return level.sqrt() * latents + (1 - level).sqrt() * noise, noise, timesteps


def size_numbers(count: int, device: torch.device) -> torch.Tensor:
    """SDXL's six numbers [count, 6] of an uncropped picture."""
    return torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * count, device=device).float()


@torch.no_grad()
def encode_pictures(
    vae: AutoencoderTiny, pictures: DrawnPictures, device: torch.device, cache: Path
) -> torch.Tensor:
    """Latents [N, 4, S / 8, S / 8] of pictures, kept in a file.

    Raises:
        EasyRefError: the file is damaged, or holds those of other pictures or another autoencoder.
    """
    source = _source(vae, pictures.names)
    if cache.is_file():
        return _kept_latents(cache, source)
    vae = vae.to(memory_format=torch.channels_last)

    def encoded(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return vae.encode(batch.to(device).float() / 127.5 - 1).latents.float().cpu()

    latents = torch.cat(shared_map(encoded, pictures.pixels.split(8), device))
    kept = {"source": source, "latents": latents}
    write_atomically(cache, lambda partial: torch.save(kept, partial))
    return latents


def _source(vae: AutoencoderTiny, names: Sequence[str]) -> str:
    """Another one for other pictures, or another autoencoder."""
    digest = hashlib.sha256("\n".join(names).encode())
    for name, weight in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def _kept_latents(cache: Path, source: str) -> torch.Tensor:
    anew = f"delete {cache.parent} to train this part anew"
    try:
        kept = torch.load(cache, weights_only=True)
        same = kept["source"] == source
    except Exception as error:  # what a damaged file leads to is anybody's guess
        raise EasyRefError(f"{cache} cannot be read ({error}); {anew}.") from error
    if not same:
        raise EasyRefError(
            f"{cache} holds latents of other pictures, or of another autoencoder, than are there "
            f"now. If the recipe's base_pictures has changed, restore it; or {anew}."
        )
    return kept["latents"]


@dataclass(frozen=True)
class LoadedText:
    """A base directory's text encoders, frozen, with their tokenizers."""

    tokenizers: Tokenizers
    small: CLIPTextModel
    large: CLIPTextModelWithProjection

    def to(self, device: torch.device) -> None:
        self.small.to(device)
        self.large.to(device)

    @torch.no_grad()
    def __call__(
        self, small: torch.Tensor, large: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """CLIP's ids [B, 77] of each -> states [B, 77, width], pooled [B, pooled width]."""
        return _states(self.small, self.large, small, large)


def load_text_encoders(directory: Path) -> LoadedText:
    """Load them from a diffusers directory that `train_base` wrote."""
    whole = {"torch_dtype": torch.float32}
    return LoadedText(
        load_tokenizers(directory),
        CLIPTextModel.from_pretrained(directory / "text_encoder", **whole).eval(),
        CLIPTextModelWithProjection.from_pretrained(directory / "text_encoder_2", **whole).eval(),
    )


def load_tokenizers(directory: Path) -> Tokenizers:
    """Of a diffusers directory."""
    return Tokenizers(
        CLIPTokenizer.from_pretrained(str(directory / "tokenizer")),
        CLIPTokenizer.from_pretrained(str(directory / "tokenizer_2")),
    )


def write_tokenizers(directory: Path) -> None:
    """Write both; SDXL's second one fills up with another word than its first."""
    write_tokenizer(directory / "tokenizer", "<|endoftext|>")
    write_tokenizer(directory / "tokenizer_2", "!")


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
    write_around(vae, directory)


def write_around(vae: AutoencoderTiny, directory: Path) -> None:
    """What goes with UNet and text encoders; the scheduler is the last of all."""
    vae.save_pretrained(directory / "vae")
    DDPMScheduler(**NOISE).save_pretrained(directory / "scheduler")


def _states(
    small: CLIPTextModel,
    large: CLIPTextModelWithProjection,
    small_ids: torch.Tensor,
    large_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, 77] of each -> states [B, 77, width], pooled [B, pooled width], as SDXL uses them."""
    first = small(small_ids.to(small.device), output_hidden_states=True)
    second = large(large_ids.to(large.device), output_hidden_states=True)
    states = torch.cat((first.hidden_states[-2], second.hidden_states[-2]), dim=-1)
    return states, second.text_embeds


def _unknown(
    empty: tuple[torch.Tensor, torch.Tensor], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """An empty caption's ids with so many words nobody knows."""
    words = torch.full((count,), 1000)  # has no row of its own
    small, large = (torch.cat((ids[:1], words, ids[1:]))[: len(ids)] for ids in empty)
    return small, large
