"""An IP-Adapter for the demo's base model, in the layout that diffusers loads.

It is trained as IP-Adapter is: the base model is frozen, each picture is its own reference, and
what is not learned of it must come from the caption, which names the scene only. Its keys and
values start as those of the text, its image tokens as close to the full caption's states as they
come: that replaces many of the steps that a start from nothing needs.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection
from torch import nn
from transformers import CLIPModel

from easyref_core.demo_set import shipped_set

from ..pretraining.base import NOISE, add_noise, encode_images, time_ids
from ..pretraining.pictures import DrawnPictures
from ..pretraining.steps import Schedule, run_steps
from ..pretraining.text_encoders import LoadedText
from ..stored_text import load_text
from ..stored_weights import load_stored
from ..tiny_weights import write_tensors
from .clip import normalised, picture_embeds

FILE = "ip-adapter_sdxl.safetensors"
TOKENS = 4  # diffusers knows plain IP-Adapters by this number
_DROPPED = 0.05  # shares of samples: without image, without text, without both
_RATE = 3e-3  # of the image tokens' start
_START_STEPS = 400


def train_ip_adapter(
    pictures: DrawnPictures, clip: Path, schedule: Schedule, folder: Path, device: torch.device
) -> Path:
    """Train; writes and returns `folder`/ip-adapter_sdxl.safetensors.

    Args:
        clip: directory of the small CLIP, whose vision tower reads the images.
    """
    models = shipped_set()
    text = load_text(models / "text_encoders")
    text.to(device)
    states = _CaptionStates(text, pictures)
    images = image_embeds(clip, pictures.pixels, device)
    latents = _latents(models, pictures, folder, device)
    torch.manual_seed(schedule.seed)
    unet = load_stored(UNet2DConditionModel, models / "unet").requires_grad_(False)
    projection = _started_projection(images, states.full_tokens(), device)
    attach(unet, projection)
    unet.to(device)
    alphas_cumprod = DDPMScheduler(**NOISE).alphas_cumprod

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        numbers = torch.randint(len(pictures), (schedule.batch,), generator=generator)
        chance = torch.rand(schedule.batch, generator=generator)
        no_image = (chance < _DROPPED) | (chance > 1 - _DROPPED)
        no_text = (chance > _DROPPED) & (chance < 2 * _DROPPED) | (chance > 1 - _DROPPED)
        hidden, pooled = states.scenes(numbers, no_text)
        embeds = images[numbers] * ~no_image[:, None]
        noisy, noise, timesteps = add_noise(latents[numbers], alphas_cumprod, generator)
        added = {"text_embeds": pooled, "time_ids": time_ids(len(numbers), device)}
        added |= {"image_embeds": [embeds[:, None].to(device)]}
        predicted = unet(
            noisy.to(device), timesteps.to(device), hidden, added_cond_kwargs=added
        ).sample
        return F.mse_loss(predicted, noise.to(device))

    run_steps(unet, loss, schedule, folder, device, "no")
    return write_ip_adapter(unet, folder / FILE)


def attach(unet: UNet2DConditionModel, projection: ImageProjection) -> None:
    """Add an IP-Adapter whose keys and values are those of the text; only it has gradients."""
    text = unet.state_dict()
    weights = {}
    layers = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for layer in layers:
        number = list(unet.attn_processors).index(layer)
        for kind in ("k", "v"):
            name = layer.replace("processor", f"to_{kind}.weight")
            weights[f"{number}.to_{kind}_ip.weight"] = text[name].clone()
    image = {n.replace("image_embeds", "proj"): w for n, w in projection.state_dict().items()}
    unet._load_ip_adapter_weights({"image_proj": image, "ip_adapter": weights})
    for module in _trained(unet):
        module.requires_grad_(True)


def write_ip_adapter(unet: UNet2DConditionModel, path: Path) -> Path:
    """Write an attached IP-Adapter in float16; returns the path."""
    projection, *processors = _trained(unet)
    weights = {
        f"image_proj.{name.replace('image_embeds', 'proj')}": weight.detach()
        for name, weight in projection.state_dict().items()
    }
    names = list(unet.attn_processors)
    numbers = [n for n, name in enumerate(names) if name.endswith("attn2.processor")]
    for number, processor in zip(numbers, processors, strict=True):
        for kind in ("k", "v"):
            weight = getattr(processor, f"to_{kind}_ip")[0].weight
            weights[f"ip_adapter.{number}.to_{kind}_ip.weight"] = weight.detach()
    write_tensors(path, weights, torch.float16)
    return path


@torch.no_grad()
def image_embeds(clip: Path, pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """[N, W] of images uint8 [N, 3, S, S], by a CLIP directory's vision tower."""
    model = CLIPModel.from_pretrained(clip, local_files_only=True).float().to(device).eval()
    batches = [normalised(part.float() / 127.5 - 1) for part in pixels.split(64)]
    return torch.cat([picture_embeds(model, batch.to(device)).cpu() for batch in batches])


class _CaptionStates:
    """States of all captions, encoded once."""

    def __init__(self, text: LoadedText, pictures: DrawnPictures) -> None:
        self._text = text
        self._full = [captions[0] for captions in pictures.captions]
        scenes = [captions[-1] for captions in pictures.captions]
        different = ["", *dict.fromkeys(scenes)]
        self._states, self._pooled = text(*text.tokenizers(different))
        self._rows = torch.tensor([different.index(scene) for scene in scenes])

    def scenes(
        self, numbers: torch.Tensor, dropped: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States [B, 77, W] and pooled [B, P] of pictures' scenes; of no text where dropped."""
        rows = (self._rows[numbers] * ~dropped).to(self._states.device)
        return self._states[rows], self._pooled[rows]

    def full_tokens(self) -> torch.Tensor:
        """[N, TOKENS, W]: the full captions' states at the end of each of their parts.

        Both encoders are causal, so a part's last state has read all of it.
        """
        known: dict[str, torch.Tensor] = {}
        different = list(dict.fromkeys(self._full))
        tokenizer = self._text.tokenizers.small
        comma = tokenizer.convert_tokens_to_ids(",</w>")
        for start in range(0, len(different), 64):
            texts = different[start : start + 64]
            ids, large = self._text.tokenizers(texts)
            states, _ = self._text(ids, large)
            for text, row, state in zip(texts, ids.tolist(), states, strict=True):
                end = row.index(tokenizer.eos_token_id)
                ends = [n - 1 for n, token in enumerate(row) if token == comma][: TOKENS - 1]
                ends += [end - 1] * (TOKENS - len(ends))
                known[text] = state[ends].cpu()
        return torch.stack([known[text] for text in self._full])


def _started_projection(
    images: torch.Tensor, tokens: torch.Tensor, device: torch.device
) -> ImageProjection:
    """A projection whose image tokens are as close to text states as it can."""
    projection = ImageProjection(images.shape[-1], tokens.shape[-1], TOKENS).to(device)
    nn.init.zeros_(projection.image_embeds.bias)
    optimiser = torch.optim.Adam(projection.parameters(), lr=_RATE)
    for _ in range(_START_STEPS):
        numbers = torch.randint(len(images), (512,))
        loss = F.mse_loss(projection(images[numbers].to(device)), tokens[numbers].to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return projection


def _trained(unet: UNet2DConditionModel) -> list[nn.Module]:
    """The image projection, then the processors of cross-attention in their order."""
    processors = unet.attn_processors
    own = [p for name, p in processors.items() if name.endswith("attn2.processor")]
    return [unet.encoder_hid_proj.image_projection_layers[0], *own]


def _latents(
    models: Path, pictures: DrawnPictures, folder: Path, device: torch.device
) -> torch.Tensor:
    from diffusers import AutoencoderTiny

    folder.mkdir(parents=True, exist_ok=True)
    vae = load_stored(AutoencoderTiny, models / "vae").to(device)
    return encode_images(vae, pictures, device, folder / "latents.pt", half=False)
