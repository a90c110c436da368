"""Whether a generated image shows the person that its target shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ....training.records import PictureSource
from ...trials import Trial
from .. import Column
from .model import SAME_PERSON, FaceModel


class FaceIdentity:
    """The image's largest face beside the largest face of each target that shows one.

    A trial whose targets show no face has no scores. An image without a face counts in `face_found`
    and, as another person, in `face_same`; it has no distance.
    """

    columns = (
        Column(
            "face_distance",
            "Face distance",
            f"Euclidean distance of dlib's descriptors; one person is below {SAME_PERSON}",
            higher_is_better=False,
        ),
        Column(
            "face_same",
            "Same person",
            f"share of images whose face is nearer than {SAME_PERSON} to the target's",
        ),
        Column(
            "face_found", "Face found", "share of images with a face, where the target shows one"
        ),
    )

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu") -> None:
        """
        Args:
            folder: face-api's folder `model`.

        Raises:
            EasyRefError: a file in it is missing or wrong.
        """
        self._model = FaceModel(folder, device)
        self._targets: dict[PictureSource, torch.Tensor | None] = {}

    def identity(self) -> dict[str, Any]:
        """See `Metric.identity`."""
        return {
            "name": "faces",
            "model": "face-api: tiny_face_detector, face_landmark_68, face_recognition",
            "sha256": self._model.checksums,
            "preprocessing": "detector at 416 pixels, largest face, aligned as face-api does",
            "scale": f"Euclidean distance of descriptors; one person is below {SAME_PERSON}",
        }

    def score(
        self, trials: Sequence[Trial], images: Sequence[Image.Image]
    ) -> list[dict[str, float]]:
        """See `Metric.score`.

        Raises:
            EasyRefError: a target cannot be read.
        """
        return [self._score(trial, image) for trial, image in zip(trials, images, strict=True)]

    def _score(self, trial: Trial, image: Image.Image) -> dict[str, float]:
        targets = [self._target(picture.source) for picture in trial.targets]
        shown = [target for target in targets if target is not None]
        if not shown:
            return {}
        face = self._model.embed_face(image)
        if face is None:
            return {"face_found": 0.0, "face_same": 0.0}
        distances = (torch.stack(shown) - face).norm(dim=1)
        return {
            "face_found": 1.0,
            "face_same": float((distances < SAME_PERSON).float().mean()),
            "face_distance": float(distances.mean()),
        }

    def _target(self, source: PictureSource) -> torch.Tensor | None:
        if source not in self._targets:
            self._targets[source] = self._model.embed_face(source.open())
        return self._targets[source]
