"""CLIP-I, CLIP-T, DINO-I, and how near the nearest reference is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from PIL import Image

from ...errors import EasyRefError
from ..groups import GroupPicture
from ..trials import Trial
from . import Column
from .embedders import ClipEmbedder, PictureEmbedder

SCALE = "cosine"
_HUNDRED = ("100 x cosine", 100.0)
_PAPER = ("2.5 x cosine", 2.5)  # CLIP-T of the paper, and CLIPScore's


class SimilarityMetric:
    """Cosines of one model's embeddings.

    Columns, with `clip` or `dino` as KEY; those that do not apply are left out:

        KEY_i: to the target; the mean over several targets, as for DreamBooth's subjects.
        clip_t: to the prompt.
        KEY_nearest: to the nearest reference. Beside KEY_i it tells a likeness from a copy.
        KEY_copied: 1 where the image is nearer to a reference than any two references are to each
            other, else 0; the mean over images is the share of copies. Needs two references.
    """

    def __init__(self, embedder: PictureEmbedder) -> None:
        self._embedder = embedder
        self._key, self._title = embedder.kind.name.lower(), embedder.kind.name
        self._texts = embedder if isinstance(embedder, ClipEmbedder) else None
        self._pictures: dict[str, torch.Tensor] = {}
        self._prompts: dict[str, torch.Tensor] = {}
        key, title = self._key, self._title
        of_text = Column("clip_t", "CLIP-T", SCALE, True, (_PAPER, _HUNDRED))
        self.columns = (
            Column(f"{key}_i", f"{title}-I", SCALE, True, (_HUNDRED,)),
            *([of_text] if self._texts else []),
            Column(f"{key}_nearest", f"{title}-I, nearest reference", SCALE, None, (_HUNDRED,)),
            Column(f"{key}_copied", f"Copied ({title})", "share of images", False),
        )

    def identity(self) -> dict[str, Any]:
        """Model, checksums, preprocessing and scale."""
        return {
            "metric": self._key,
            "model": self._embedder.name,
            **self._embedder.identity,
            "scale": SCALE,
        }

    def score(
        self, trials: Sequence[Trial], images: Sequence[Image.Image]
    ) -> list[dict[str, float]]:
        """One for each image. What needs a picture that cannot be read is left out."""
        return [self._score(trial, image) for trial, image in zip(trials, images, strict=True)]

    def _score(self, trial: Trial, image: Image.Image) -> dict[str, float]:
        own = self._embedder.picture(image)
        found: dict[str, float] = {}
        targets = self._embedded(trial.targets)
        if targets:
            found[f"{self._key}_i"] = mean_cosine([own], targets)
        if self._texts and trial.prompt.strip():
            found["clip_t"] = mean_cosine([own], [self._prompt(self._texts, trial.prompt)])
        references = self._embedded(trial.references)
        if references:
            nearest = max(cosine(own, reference) for reference in references)
            found[f"{self._key}_nearest"] = nearest
            if len(references) > 1:
                among = max(cosine(*pair) for pair in combinations(references, 2))
                found[f"{self._key}_copied"] = float(nearest > among)
        return found

    def _embedded(self, pictures: Sequence[GroupPicture]) -> list[torch.Tensor]:
        """Each picture is embedded once a run; none where one cannot be read, as a mean over the
        others would be another score."""
        try:
            return [self._picture(picture) for picture in pictures]
        except (EasyRefError, OSError):
            return []

    def _picture(self, picture: GroupPicture) -> torch.Tensor:
        key = picture.source.fingerprint()
        if key not in self._pictures:
            self._pictures[key] = self._embedder.picture(picture.source.open())
        return self._pictures[key]

    def _prompt(self, clip: ClipEmbedder, prompt: str) -> torch.Tensor:
        if prompt not in self._prompts:
            self._prompts[prompt] = clip.text(prompt)
        return self._prompts[prompt]


def cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    """Of two unit vectors [W]."""
    return float(first.double() @ second.double())


def mean_cosine(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    """Over all pairs of one of the first and one of the second."""
    found = [cosine(a, b) for a in first for b in second]
    return sum(found) / len(found)
