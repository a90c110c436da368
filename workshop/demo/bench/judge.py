"""The demo's attribute classifier as a metric of `easyref bench`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from easyref_core.evaluation.metrics import Column
from easyref_core.evaluation.trials import Trial
from easyref_core.pictures.preprocessing import picture_levels

from ..dataset.characters import ATTRIBUTES
from ..evaluation.classifier import SHIPPED_CLASSIFIER, load_classifier

IDENTITY, SCENE = "identity", "scene"
_SCENE = ("place", "time")


class Judge:
    """Share of a character's five attributes that an image shows, and of the scene's two.

    Args:
        facts: group -> attributes of its character and of its target's scene.
    """

    columns = (
        Column(IDENTITY, "Identity", "share of attributes", printed=(("%", 100.0),)),
        Column(SCENE, "Scene", "share of attributes", printed=(("%", 100.0),)),
    )

    def __init__(
        self,
        facts: Mapping[str, Mapping[str, str]],
        file: Path = SHIPPED_CLASSIFIER,
        device: torch.device | str = "cpu",
    ) -> None:
        self._facts = facts
        self._file = file
        self._classifier = load_classifier(file, device)

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._file.read_bytes()).hexdigest()
        return {"metric": "demo classifier", "model": self._file.name, "sha256": digest}

    def score(
        self, trials: Sequence[Trial], images: Sequence[Image.Image]
    ) -> list[dict[str, float]]:
        scores = []
        for trial, image in zip(trials, images, strict=True):
            facts = self._facts[trial.group]
            hits = self._classifier.scores(picture_levels(image.convert("RGB"))[None], [facts])
            scores.append({IDENTITY: _share(hits, ATTRIBUTES), SCENE: _share(hits, _SCENE)})
        return scores


def _share(hits: Mapping[str, Sequence[float]], names: Sequence[str]) -> float:
    return sum(hits[name][0] for name in names) / len(names)
