"""Faces in a picture and their descriptors, computed as face-api does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ....errors import EasyRefError
from ....untrusted import escaped
from .networks import (
    DESCRIPTOR_SIZE,
    DETECTOR_SIZE,
    LANDMARKS_SIZE,
    FaceDescriptor,
    FaceDetector,
    FaceLandmarks,
)
from .weights import load_weights

SAME_PERSON = 0.6  # dlib's threshold: descriptors of one person are nearer to each other than this
_LOWEST_SCORE = 0.5
_LARGEST_OVERLAP = 0.4  # of two boxes, intersection over union
_ANCHORS = (  # width and height, in cells
    *((1.603231, 2.094468), (6.041143, 7.080126), (2.882459, 3.518061)),
    *((4.266906, 5.178857), (9.041765, 10.66308)),
)
_PARTS = (slice(36, 42), slice(42, 48), slice(48, 68))  # of the landmarks: eyes, mouth
_EYES_TO_MOUTH = 0.45  # of the side of an aligned face
_MIDDLE = (0.5, 0.43)  # of eyes and mouth, as shares of that side


@dataclass(frozen=True)
class FaceBox:
    """A face found in a picture, in pixels; it may reach over the border."""

    x: float
    y: float
    width: float
    height: float
    score: float

    def overlap(self, other: FaceBox) -> float:
        """Intersection over union."""
        width = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        height = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        both = max(0.0, width) * max(0.0, height)
        return both / (self.width * self.height + other.width * other.height - both)


class FaceModel:
    """Detector, landmarks and descriptor, read from face-api's folder `model`.

    Attributes:
        same_person: the largest Euclidean distance of two pictures of one person.
        checksums: network -> SHA-256 of its weights.

    Raises:
        EasyRefError: the folder is none, or a file in it is missing or wrong.
    """

    same_person = SAME_PERSON

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu") -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise EasyRefError(
                f"There is no folder {escaped(str(folder))}. Face identity needs the folder "
                '"model" of the npm package @vladmandic/face-api.'
            )
        self._device = torch.device(device)
        self._detector, self._landmarks = FaceDetector(), FaceLandmarks()
        self._descriptor = FaceDescriptor()
        self.checksums = {
            name: load_weights(network, folder, name)
            for name, network in (
                ("tiny_face_detector_model", self._detector),
                ("face_landmark_68_model", self._landmarks),
                ("face_recognition_model", self._descriptor),
            )
        }
        for network in (self._detector, self._landmarks, self._descriptor):
            network.eval().to(self._device)

    @torch.inference_mode()
    def find(self, picture: Image.Image) -> list[FaceBox]:
        """The faces in a picture (RGB), the surest first."""
        cells = self._detector(self._square(picture, DETECTOR_SIZE, centred=False)).double().cpu()
        # The picture fills whole pixels of the square, which lies at its upper left corner.
        share = [int(DETECTOR_SIZE * side / max(picture.size) + 0.5) or 1 for side in picture.size]
        cell = torch.tensor(picture.size) * (DETECTOR_SIZE / len(cells)) / torch.tensor(share)
        rows, columns = torch.meshgrid(*map(torch.arange, cells.shape[:2]), indexing="ij")
        middle = torch.stack([columns, rows], dim=-1)[:, :, None] + cells[..., :2].sigmoid()
        size = cells[..., 2:4].clamp(-10, 10).exp() * cells.new_tensor(_ANCHORS)
        score = cells[..., 4:].sigmoid()
        boxes = torch.cat([(middle - size / 2) * cell, size * cell, score], dim=-1)
        sure = (score[..., 0] > _LOWEST_SCORE) & cells.isfinite().all(-1)
        found: list[FaceBox] = []
        for box in sorted(
            (FaceBox(*box) for box in boxes[sure].tolist()), key=lambda box: -box.score
        ):
            if all(box.overlap(other) <= _LARGEST_OVERLAP for other in found):
                found.append(box)
        return found

    @torch.inference_mode()
    def embed_face(self, picture: Image.Image) -> torch.Tensor | None:
        """The descriptor of the largest face in a picture (RGB): [128]; None without a face."""
        boxes = self.find(picture)
        cuts = [_cut(picture, box.x, box.y, box.width, box.height) for box in boxes]
        found = [(box, cut) for box, cut in zip(boxes, cuts, strict=True) if cut is not None]
        if not found:
            return None
        box, cut = max(found, key=lambda item: item[1].width * item[1].height)
        points = self._landmarks(self._square(cut, LANDMARKS_SIZE, centred=True)).double().cpu()
        side = max(cut.size)
        margin = torch.tensor([(side - cut.width) / 2, (side - cut.height) / 2])
        points = points * side - margin + torch.tensor([box.x, box.y])
        centres = torch.stack([points[part].mean(0) for part in _PARTS])  # [3, 2]
        to_mouth = float((centres[2] - centres[:2]).norm(dim=1).mean())
        if not math.isfinite(to_mouth):
            return None
        size = math.floor(to_mouth / _EYES_TO_MOUTH)
        middle = centres.mean(0).tolist()
        x, y = (
            math.floor(max(0.0, at - share * size))
            for at, share in zip(middle, _MIDDLE, strict=True)
        )
        aligned = _cut(picture, x, y, min(size, cut.width + x), min(size, cut.height + y))
        if aligned is None:
            return None
        return self._descriptor(self._square(aligned, DESCRIPTOR_SIZE, centred=True)).cpu()

    def _square(self, picture: Image.Image, size: int, centred: bool) -> torch.Tensor:
        """[1, 3, size, size]: the picture, made square by black, resized as TensorFlow.js does.

        Only the pixels that are needed are converted, so that a long strip stays small.
        """
        pixels = torch.from_numpy(np.array(picture))  # [H, W, 3]
        side = max(picture.size)
        for dimension in (0, 1):
            length = pixels.shape[dimension]
            start = (side - length) // 2 if centred else 0
            at = torch.arange(size) * (side / size) - start
            low = at.floor()
            share = (at - low).view((-1, 1, 1) if dimension == 0 else (1, -1, 1))
            # Beyond the square's border nothing is mixed in.
            high = (low + 1).clamp(max=side - 1 - start)
            low, high = (_taken(pixels, dimension, index.long()) for index in (low, high))
            pixels = low + (high - low) * share
        return pixels.permute(2, 0, 1)[None].to(self._device)


def _taken(pixels: torch.Tensor, dimension: int, index: torch.Tensor) -> torch.Tensor:
    """Rows or columns as float32; black outside."""
    length = pixels.shape[dimension]
    shape = (-1, 1, 1) if dimension == 0 else (1, -1, 1)
    inside = ((index >= 0) & (index < length)).view(shape)
    return pixels.index_select(dimension, index.clamp(0, length - 1)).float() * inside


def _cut(
    picture: Image.Image, x: float, y: float, width: float, height: float
) -> Image.Image | None:
    """The part of a box that lies in the picture, in whole pixels; None where that is nothing."""
    left, top = max(x, 0.0), max(y, 0.0)
    wide = math.floor(min(x + width - left, picture.width - left))
    high = math.floor(min(y + height - top, picture.height - top))
    if wide < 1 or high < 1:
        return None
    left, top = math.floor(left), math.floor(top)
    return picture.crop((left, top, left + wide, top + high))
