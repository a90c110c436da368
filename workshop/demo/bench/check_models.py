"""Whether the benchmark's models do their tasks, on characters that they were not trained on."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPModel, CLIPTokenizer, Dinov2Model

from ..dataset.characters import ATTRIBUTES
from ..dataset.groups import Drawn, draw_identity
from ..dataset.splits import identities
from ..evaluation.classifier import SHIPPED_CLASSIFIER, load_classifier
from ..pretraining.pictures import SIDE
from .clip import caption_embeds, normalised, picture_embeds
from .dino import MEAN, STD, augmented
from .ip_adapter import image_embeds

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


@torch.no_grad()
def check_ip_adapter(file: Path, clip: Path, base: Path, drawn: list[Drawn]) -> dict[str, float]:
    """Shares of a character's attributes, and of the scene's, in images of one reference each, by
    the demo's classifier; and without the IP-Adapter.

    Args:
        base: diffusers directory, see `sdxl.write_sdxl`.
    """
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(base, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    judge = load_classifier(SHIPPED_CLASSIFIER)
    rng = random.Random(f"bench targets {_SEED}")
    targets = [draw_identity(i, SIDE, rng) for i in identities()[1][: len(drawn)]]
    embeds = image_embeds(clip, _levels(drawn), torch.device("cpu"))
    found = {}
    for name in ("none", "ip-adapter"):
        if name == "ip-adapter":
            pipe.load_ip_adapter(
                str(file.parent), subfolder=None, weight_name=file.name, image_encoder_folder=None
            )
        hits = []
        for start in range(0, len(drawn), 10):
            part = slice(start, start + 10)
            both = torch.stack((torch.zeros_like(embeds[part]), embeds[part]))[:, :, None]
            given = {} if name == "none" else {"ip_adapter_image_embeds": [both.flatten(0, 1)]}
            images = pipe(
                [target.caption for target in targets[part]],
                negative_prompt=[""] * len(targets[part]),
                height=SIDE,
                width=SIDE,
                num_inference_steps=20,
                guidance_scale=5.0,
                generator=[torch.Generator().manual_seed(start + n) for n in range(10)][
                    : len(targets[part])
                ],
                output_type="np",
                **given,
            ).images
            pixels = torch.from_numpy((images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)
            hits.append(judge.scores(pixels, [target.facts for target in targets[part]]))
        for what, names in (("identity", ATTRIBUTES), ("scene", ("place", "time"))):
            values = [v for hit in hits for attribute in names for v in hit[attribute]]
            found[f"{name} {what}"] = sum(values) / len(values)
    return found


def _levels(drawn: list[Drawn]) -> torch.Tensor:
    """uint8 [N, 3, S, S]"""
    return torch.from_numpy(np.stack([np.asarray(d.picture) for d in drawn])).permute(0, 3, 1, 2)


def _share(found: list, expected: list) -> float:
    return sum(a == b for a, b in zip(found, expected, strict=True)) / len(expected)
