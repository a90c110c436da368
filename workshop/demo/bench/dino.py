"""A small DINOv2 for drawn pictures, in the layout of transformers; it learns without captions.

Two crops of a picture should have features that are more alike than those of two pictures
(SimCLR's loss): at this size self-distillation as in DINO needs far more steps for the same.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from ..pretraining.pictures import SIDE, DrawnPictures
from ..pretraining.steps import Schedule, run_steps
from .clip import write_model
from .patches import start_patches

WIDTH = 96
MEAN = (0.485, 0.456, 0.406)  # DINOv2's
STD = (0.229, 0.224, 0.225)
_TEMPERATURE = 0.1
_SMALLEST = 0.55  # side of a crop, as a share


class Contrasted(nn.Module):
    """The model with a head that is left away afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Dinov2Model(dino_config())
        self.head = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S] -> unit vectors [B, WIDTH]"""
        features = self.model(pixel_values=pixels).last_hidden_state[:, 0]
        return F.normalize(self.head(features), dim=-1)


def train_dino(
    pictures: DrawnPictures, schedule: Schedule, folder: Path, device: torch.device
) -> Path:
    """Train; writes and returns the directory `folder`/model.

    A batch has so many pictures, each in two crops.
    """
    torch.manual_seed(schedule.seed)
    module = Contrasted().to(device)
    module.model.embeddings.mask_token.requires_grad_(False)  # not used by whole pictures
    seen = module.model.embeddings
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    sample = (pictures.pixels[:500].float() / 255 - mean) / std
    start_patches(seen.patch_embeddings.projection, seen.position_embeddings[0], sample)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        numbers = torch.randint(len(pictures), (schedule.batch,), generator=generator)
        levels = pictures.pixels[numbers].float() / 255
        views = torch.cat([augmented(levels, generator) for _ in range(2)])
        return instance_loss(module(((views - mean) / std).to(device)))

    run_steps(module, loss, schedule, folder, device, "no")
    directory = folder / "model"
    write_dino(module.model, directory)
    return directory


def dino_config() -> Dinov2Config:
    return Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=3,
        mlp_ratio=2,
        image_size=SIDE,
        patch_size=16,
    )


def instance_loss(features: torch.Tensor) -> torch.Tensor:
    """SimCLR's loss of unit vectors [2 * B, W]: rows n and n + B are of one picture."""
    count = len(features) // 2
    logits = features @ features.T / _TEMPERATURE
    logits = logits - 1e9 * torch.eye(2 * count, device=logits.device)
    others = torch.arange(2 * count, device=logits.device).roll(count)
    return F.cross_entropy(logits, others)


def augmented(levels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Crop, mirror, soften, and change brightness and contrast of images [B, 3, S, S] in 0..1.

    Hues stay: they are what many drawn things differ by.
    """
    count = len(levels)
    size = _SMALLEST + (1 - _SMALLEST) * torch.rand(count, generator=generator)
    moves = (2 * torch.rand(count, 2, generator=generator) - 1) * (1 - size)[:, None]
    signs = torch.randint(2, (count,), generator=generator) * 2 - 1
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = size * signs, size, moves
    grid = F.affine_grid(theta, list(levels.shape), align_corners=False)
    cropped = F.grid_sample(levels, grid, padding_mode="border", align_corners=False)
    soft = F.avg_pool2d(cropped, 3, 1, 1)
    blur, light, contrast = torch.rand(3, count, 1, 1, 1, generator=generator)
    mixed = cropped + blur * (soft - cropped)
    return (mixed - 0.5) * (0.7 + 0.6 * contrast) + 0.4 + 0.2 * light


def write_dino(model: Dinov2Model, directory: Path) -> None:
    """Write configuration, weights in float16 and preprocessing."""
    write_model(model, directory)
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    BitImageProcessor(**sizes, image_mean=list(MEAN), image_std=list(STD)).save_pretrained(
        directory
    )
