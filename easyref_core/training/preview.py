"""Images of a run: its first batch, and images generated for validation."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps

from ..errors import EasyRefError
from ..files import write_atomically
from ..pictures.preprocessing import Patches, black_picture, preprocess
from ..pictures.sizes import FRAMES, MERGE, PATCH
from ..sdxl_diffusers.identity_latents import IdentityLatents
from ..sdxl_diffusers.identity_run import IdentityRun
from ..sdxl_diffusers.layers import IDENTITY
from .augment import face_crop
from .base import Base
from .config import DataSettings
from .model import TrainedModel
from .records import Record
from .samples import Sample, identity_pixels

_CELL = 192
_GAP = 6
_BACKGROUND = (24, 26, 31)
_STEPS, _GUIDANCE = 20, 5.0
_MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073))
_STD = torch.tensor((0.26862954, 0.26130258, 0.27577711))


def sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Images in rows, each fitted into a square cell."""
    step, columns = _CELL + _GAP, max(map(len, rows))
    result = Image.new("RGB", (columns * step + _GAP, len(rows) * step + _GAP), _BACKGROUND)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            cell = ImageOps.pad(image, (_CELL, _CELL), Image.Resampling.LANCZOS, _BACKGROUND)
            result.paste(cell, (_GAP + x * step, _GAP + y * step))
    return result


def batch_sheet(samples: Sequence[Sample]) -> Image.Image:
    """One row per sample: its target, then its references as the MLLM gets them."""
    return sheet([[_picture(s.target), *(unpatch(p) for p in s.references)] for s in samples])


def _picture(pixels: torch.Tensor) -> Image.Image:
    """[3, H, W] in -1..1"""
    levels = ((pixels.float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy(), "RGB")


def unpatch(patches: Patches) -> Image.Image:
    """The image that patches were cut from."""
    from einops import rearrange

    pixels = rearrange(
        patches.pixels,
        "(h w mh mw) (c t ph pw) -> t (h mh ph) (w mw pw) c",
        h=patches.rows // MERGE,
        mh=MERGE,
        mw=MERGE,
        t=FRAMES,
        ph=PATCH,
        pw=PATCH,
    )[0]
    return _picture((pixels * _STD + _MEAN).permute(2, 0, 1) * 2 - 1)


@dataclass(frozen=True)
class ValidationGroup:
    """References and caption of an image to generate."""

    pictures: tuple[Image.Image, ...]
    caption: str


def validation_groups(records: Sequence[Record], settings: DataSettings) -> list[ValidationGroup]:
    """Read the validation images; those that cannot be read are named on stderr and left out.

    Raises:
        EasyRefError: none can be read.
    """
    groups = []
    for record in records:
        try:
            pictures = _references(record)[: settings.max_references]
        except EasyRefError as error:
            print(f"left out of validation: {record.name}: {error}", file=sys.stderr)
            continue
        caption = record.texts[0] if record.texts else ""
        groups.append(ValidationGroup(tuple(pictures), caption))
    if not groups:
        raise EasyRefError("No record of output.validation can be read. They are named above.")
    return groups


def _references(record: Record) -> list[Image.Image]:
    record.check()
    if record.face is not None:
        rng = random.Random(0)  # the same crop each time
        return [face_crop(record.target.open(), record.face, rng)]
    return [source.open() for source in record.references]


@torch.no_grad()
def generate(
    base: Base,
    model: TrainedModel,
    groups: Sequence[ValidationGroup],
    settings: DataSettings,
    device: torch.device,
    seed: int,
    identity_references: int = 0,
) -> Image.Image:
    """One row per group: its references, then the image generated from them and the caption.

    Args:
        identity_references: how many references the conditional rows' self-attention attends to.
    """
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(base.scheduler.config)
    black = preprocess(black_picture(), settings.image_size)
    rows: list[list[Image.Image]] = []
    for number, group in enumerate(groups):
        references = [preprocess(p, settings.image_size) for p in group.pictures]
        tokens = model.tokens([[black], references], ["", group.caption])
        text, pooled = base.encode_text(["", group.caption])
        side = settings.resolution
        times = torch.tensor([[side, side, 0, 0, side, side]] * 2, device=device)
        scheduler.set_timesteps(_STEPS)
        shape = (1, model.unet.config.in_channels, side // 8, side // 8)
        generator = torch.Generator().manual_seed(seed + number)
        latents = torch.randn(shape, generator=generator).to(device)
        identity = None
        if identity_references:
            of_group = [
                base.encode_image(identity_pixels(picture, side**2))
                for picture in group.pictures[:identity_references]
            ]
            run = IdentityRun(
                IdentityLatents(tuple(of_group), seed + number),
                scheduler.alphas_cumprod,
                conditional=lambda rows: [slice(1, 2)],
            )
            identity = {IDENTITY: run}
        for timestep in scheduler.timesteps:
            predicted = model.unet(
                torch.cat((latents, latents)).to(text.dtype),
                timestep.to(device),
                torch.cat((text, tokens.to(text)), dim=1),
                added_cond_kwargs={"text_embeds": pooled, "time_ids": times.to(pooled)},
                cross_attention_kwargs=identity,
            ).sample.float()
            guided = predicted[:1] + _GUIDANCE * (predicted[1:] - predicted[:1])
            latents = scheduler.step(guided, timestep, latents).prev_sample
        with torch.autocast(device.type, enabled=False):  # SDXL's VAE overflows in float16
            decoded = base.vae.decode(latents.float() / base.vae.config.scaling_factor).sample[0]
        rows.append([*group.pictures, _picture(decoded)])
    return sheet(rows)


def save_image(image: Image.Image, path: Path) -> Path:
    """Write a PNG, and its folder; returns the path."""
    write_atomically(path, lambda file: image.save(file, "PNG"))
    return path
