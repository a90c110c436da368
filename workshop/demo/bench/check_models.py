"""Whether the benchmark's models do their tasks, on characters that they were not trained on."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPTokenizer, Dinov2Model

from ..dataset.groups import Drawn, draw_identity
from ..dataset.splits import identities
from ..pretraining.pictures import SIDE
from .clip import caption_embeds, normalised, picture_embeds
from .dino import MEAN, STD, augmented

COUNT = 200  # characters
_SEED = 2


def held_out_pictures(count: int = COUNT) -> list[Drawn]:
    """One picture each of held-out characters."""
    rng = random.Random(f"bench models {_SEED}")
    return [draw_identity(identity, SIDE, rng) for identity in identities()[1][:count]]


@torch.no_grad()
def check_clip(folder: Path, drawn: list[Drawn]) -> dict[str, float]:
    """Shares of pictures: the own caption is the most alike of all, of all that differ in the one
    part ("sleepy eyes") from it, and the own scene is the most alike of all scenes.
    """
    model = CLIPModel.from_pretrained(folder, local_files_only=True).float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)

    def texts(captions: list[str]) -> torch.Tensor:
        tokens = tokenizer(captions, padding=True, return_tensors="pt")
        return F.normalize(caption_embeds(model, tokens.input_ids), dim=-1)

    pixels = _levels(drawn).float() / 127.5 - 1
    images = F.normalize(picture_embeds(model, normalised(pixels)), dim=-1)
    names = ("body", "eyes", "accessory", "scene")
    parts = [dict(zip(names, d.full_caption.split(", "), strict=True)) for d in drawn]
    whole = images @ texts([d.full_caption for d in drawn]).T
    shares = {"caption": _share(whole.argmax(1).tolist(), list(range(len(drawn))))}
    for name in names:
        different = sorted({part[name] for part in parts})
        best = (images @ texts(different).T).argmax(1).tolist()
        shares[name] = _share([different[n] for n in best], [part[name] for part in parts])
    return shares


@torch.no_grad()
def check_dino(folder: Path, drawn: list[Drawn]) -> dict[str, float]:
    """Share of pictures that are found among all by another crop."""
    model = Dinov2Model.from_pretrained(folder, local_files_only=True).float().eval()
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    levels = _levels(drawn).float() / 255
    crops = augmented(levels, torch.Generator().manual_seed(_SEED))
    first, second = (
        F.normalize(model(pixel_values=(v - mean) / std).last_hidden_state[:, 0], dim=-1)
        for v in (levels, crops)
    )
    return {"crop": _share((second @ first.T).argmax(1).tolist(), list(range(len(drawn))))}


def _levels(drawn: list[Drawn]) -> torch.Tensor:
    """uint8 [N, 3, S, S]"""
    return torch.from_numpy(np.stack([np.asarray(d.picture) for d in drawn])).permute(0, 3, 1, 2)


def _share(found: list, expected: list) -> float:
    return sum(a == b for a, b in zip(found, expected, strict=True)) / len(expected)
