"""Training a LoRA of SDXL's UNet on a group's references, as DreamBooth LoRA does."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image

from ...errors import EasyRefError
from ...pictures.preprocessing import picture_levels
from ...training.augment import Target, square_corner, square_crop
from ...training.base import Base
from .pipeline import GenerationPipeline
from .settings import LoraSettings

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

_PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]
_NAME = "group"


def train_lora(
    base: GenerationPipeline,
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    settings: LoraSettings,
) -> dict[str, torch.Tensor]:
    """Weights of a LoRA under diffusers' names; the same for the same pictures, captions and
    settings. The pipeline is as before afterwards.

    Raises:
        EasyRefError: a picture too elongated; a loss that is no number.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    parts = base.training_base()
    samples = _samples(base, parts, pictures, captions, generator)
    unet = base.pipe.unet
    with _lora_on(base, settings):
        parameters = [p for p in unet.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, settings.learning_rate)
        scaler = torch.amp.GradScaler(base.device.type, enabled=base.dtype == torch.float16)
        for step in range(settings.steps):
            loss = _loss(base, parts.scheduler, samples, settings.batch, generator)
            if not torch.isfinite(loss):
                raise EasyRefError(
                    f"The loss of the LoRA's step {step + 1} is not a number. Lower the learning "
                    "rate, or choose bfloat16 or float32."
                )
            optimiser.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
        return _state(unet)


def _state(unet: Any) -> dict[str, torch.Tensor]:
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(unet, adapter_name=_NAME)
    return {f"unet.{n}": w.detach().float().cpu().contiguous() for n, w in state.items()}


@contextmanager
def _lora_on(base: GenerationPipeline, settings: LoraSettings) -> Iterator[None]:
    """A new LoRA on the UNet, in float32, taken off at the end."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    unet = base.pipe.unet
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank,
        init_lora_weights="gaussian",
        target_modules=_PROJECTIONS,
    )
    saves_memory = base.device.type != "cpu"
    devices = [base.device] if base.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(settings.seed)
            unet.add_adapter(config, _NAME)
        cast_training_params(unet, torch.float32)
        if saves_memory:
            unet.enable_gradient_checkpointing()
        yield
    finally:
        if saves_memory:
            unet.disable_gradient_checkpointing()
        unet.unload_lora()
        unet.requires_grad_(False)
        base.free_cache()


class _LoraSamples:
    """Rows of all pictures: latents [N, 4, h, w], text [N, 77, W], pooled [N, P], sizes [N, 6]."""

    def __init__(self, rows: Sequence[tuple[torch.Tensor, ...]]) -> None:
        self._columns = [torch.cat(column) for column in zip(*rows, strict=True)]

    def take(self, numbers: torch.Tensor) -> list[torch.Tensor]:
        return [column[numbers.to(column.device)] for column in self._columns]

    def __len__(self) -> int:
        return len(self._columns[0])


def _samples(
    base: GenerationPipeline,
    parts: Base,
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    generator: torch.Generator,
) -> _LoraSamples:
    size = base.settings.size
    rows = []
    for picture, caption in zip(pictures, captions, strict=True):
        corner = square_corner(picture, size, random.Random(0), centred=True)
        square = square_crop(picture, size, corner)
        target = Target(square, (picture.height, picture.width), corner)
        pixels = picture_levels(square).float() / 127.5 - 1
        latents = parts.encode_image(pixels, generator)
        text, pooled = parts.encode_text([caption])
        sizes = torch.tensor([target.time_ids], device=base.device)
        rows.append((latents[None].float(), text, pooled, sizes.to(text)))
    return _LoraSamples(rows)


def _loss(
    base: GenerationPipeline,
    schedule: DDPMScheduler,
    samples: _LoraSamples,
    count: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean squared error on the noise (or the velocity) of `count` pictures, chosen anew."""
    numbers = torch.randint(len(samples), (count,), generator=generator)
    latents, text, pooled, sizes = samples.take(numbers)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    levels = schedule.config.num_train_timesteps
    timesteps = torch.randint(levels, (count,), generator=generator).to(latents.device)
    noisy = schedule.add_noise(latents, noise, timesteps)
    is_velocity = schedule.config.prediction_type == "v_prediction"
    wanted = schedule.get_velocity(latents, noise, timesteps) if is_velocity else noise
    half = base.dtype != torch.float32
    with torch.autocast(base.device.type, base.dtype if half else None, enabled=half):
        predicted = base.pipe.unet(
            noisy.to(base.dtype),
            timesteps,
            text,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
        ).sample
    return F.mse_loss(predicted.float(), wanted)
