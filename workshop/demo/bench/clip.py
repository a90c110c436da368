"""A small CLIP for drawn pictures and their captions, in the layout of transformers.

It learns as CLIP does, image against caption; equal captions in a batch all count as right. Beside
the whole captions it gets their parts alone ("sleepy eyes", "in a city at night"), so that short
prompts have a meaning and small things are not drowned by large ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)

from ..evaluation.classifier import worsen
from ..pretraining import words
from ..pretraining.pictures import SIDE, DrawnPictures
from ..pretraining.steps import Schedule, run_steps
from .drawn_pictures import first_pictures
from .patches import start_patches

WIDTH = 96
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)
_WORSENED = 3000  # pictures
_PART_WEIGHT = 0.5  # of the losses on parts of captions
_LAYERS = {"intermediate_size": 2 * WIDTH, "num_attention_heads": 3, "projection_dim": WIDTH}


def train_clip(
    pictures: DrawnPictures, schedule: Schedule, folder: Path, device: torch.device
) -> Path:
    """Train; writes and returns the directory `folder`/model."""
    directory = folder / "model"
    write_tokenizer(directory)
    captions = Captions(pictures, directory)
    torch.manual_seed(schedule.seed)
    model = CLIPModel(clip_config()).to(device)
    seen = model.vision_model.embeddings
    sample = normalised(pictures.pixels[:500].float() / 127.5 - 1)
    start_patches(seen.patch_embedding, seen.position_embedding.weight, sample)

    worse = worsened(first_pictures(pictures, _WORSENED), schedule.seed)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        numbers = torch.randint(len(pictures), (schedule.batch,), generator=generator)
        half = schedule.batch // 2  # the others as they were drawn
        numbers[:half] %= len(worse)
        sharp, soft = pictures.batch(numbers[half:]), worse.batch(numbers[:half])
        pixels = normalised(torch.cat((soft, sharp))).to(device)
        images = F.normalize(picture_embeds(model, pixels), dim=-1)
        total = torch.zeros((), device=device)
        # Whole captions and parts take turns: they cost as much as the pictures.
        for part in range(1, captions.parts + 1) if step % 2 else (0,):
            ids, chosen = captions.of(numbers.tolist(), part)
            texts = F.normalize(caption_embeds(model, ids.to(device)), dim=-1)
            logits = model.logit_scale.exp().clamp(max=100) * images @ texts.T
            total = total + (_PART_WEIGHT if part else 1) * contrast(logits, chosen.to(device))
        return total

    run_steps(model, loss, schedule, folder, device, "no")
    write_clip(model, directory)
    return directory


def worsened(pictures: DrawnPictures, seed: int) -> DrawnPictures:
    """The pictures, softer and less exact, as generated ones are; once for all steps."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        ((worsen(part.float() / 127.5 - 1, generator) + 1) * 127.5).clamp(0, 255).byte()
        for part in pictures.pixels.split(64)
    ]
    return replace(pictures, pixels=torch.cat(parts))


def clip_config() -> CLIPConfig:
    """Both towers' configuration; the vocabulary holds all bytes and the captions' words."""
    ids = _ids()
    start, end = ids["<|startoftext|>"], ids["<|endoftext|>"]
    special = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    text = {"hidden_size": WIDTH, "num_hidden_layers": 2, "vocab_size": len(ids)}
    image = {"hidden_size": WIDTH, "num_hidden_layers": 3, "image_size": SIDE, "patch_size": 16}
    return CLIPConfig(
        text_config={**text, **special, **_LAYERS, "max_position_embeddings": words.LENGTH},
        vision_config={**image, **_LAYERS},
        projection_dim=WIDTH,
    )


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, S, S] in -1..1, as CLIP's preprocessing leaves them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((pixels + 1) / 2 - mean) / std


def contrast(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """CLIP's loss in both directions, where several images may have one caption.

    Args:
        logits: [B, T] of images and different captions.
        chosen: [B] index of each image's caption.
    """
    own = F.one_hot(chosen, logits.shape[1]).to(logits)
    of_texts = (own * logits.log_softmax(0)).sum(0) / own.sum(0)
    return (F.cross_entropy(logits, chosen) - of_texts.mean()) / 2


class Captions:
    """Token ids of captions and of their parts.

    A caption's parts stand between its commas. Those of styles have fewer parts than those of
    characters; they come again.
    """

    def __init__(self, pictures: DrawnPictures, directory: Path) -> None:
        self._tokenizer = CLIPTokenizer.from_pretrained(str(directory), local_files_only=True)
        self._whole = [captions[0] for captions in pictures.captions]
        self._split = [whole.split(", ") for whole in self._whole]
        self.parts = max(map(len, self._split))
        self._known: dict[str, list[int]] = {}

    def of(self, numbers: Sequence[int], part: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids [T, L] of different captions, [B] each picture's caption).

        Args:
            part: 0 for whole captions, else which part.
        """
        texts = [self._text(number, part) for number in numbers]
        different = list(dict.fromkeys(texts))
        place = {text: index for index, text in enumerate(different)}
        rows = [self._tokens(text) for text in different]
        end = rows[0][-1]
        length = max(map(len, rows))
        ids = torch.tensor([row + [end] * (length - len(row)) for row in rows])
        return ids, torch.tensor([place[text] for text in texts])

    def _text(self, number: int, part: int) -> str:
        parts = self._split[number]
        return parts[(part - 1) % len(parts)] if part else self._whole[number]

    def _tokens(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer(text).input_ids
        return self._known[text]


def write_tokenizer(directory: Path) -> None:
    """Write the demo's CLIP tokenizer, with ids without gaps."""
    words.write_tokenizer(directory, "<|endoftext|>", _ids())


def write_clip(model: CLIPModel, directory: Path) -> None:
    """Write configuration, weights in float16 and preprocessing beside the tokenizer."""
    write_model(model, directory)
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    CLIPImageProcessor(**sizes, image_mean=list(MEAN), image_std=list(STD)).save_pretrained(
        directory
    )


def write_image_encoder(clip: Path, directory: Path) -> Path:
    """Write a CLIP's vision tower alone, as IP-Adapters come with it; returns the directory."""
    model = CLIPModel.from_pretrained(clip, local_files_only=True)
    config = CLIPVisionConfig(**model.config.vision_config.to_dict())
    tower = CLIPVisionModelWithProjection(config)
    parts = ("vision_model.", "visual_projection.")
    state = {n: w for n, w in model.state_dict().items() if n.startswith(parts)}
    tower.load_state_dict(state)
    write_model(tower, directory)
    return directory


def write_model(model: PreTrainedModel, directory: Path) -> None:
    """Write configuration and weights in float16, under the names of published files."""
    model.eval().half().save_pretrained(directory)
    model.float()


def _ids() -> dict[str, int]:
    """Token -> id."""
    known, _ = words.vocabulary()
    return {token: number for number, token in enumerate(sorted(known, key=known.__getitem__))}


def picture_embeds(model: CLIPModel, pixels: torch.Tensor) -> torch.Tensor:
    return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)


def caption_embeds(model: CLIPModel, ids: torch.Tensor) -> torch.Tensor:
    return model.text_projection(model.text_model(input_ids=ids).pooler_output)
