"""The drawn data set in memory."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from easyref_core.errors import EasyRefError
from easyref_core.pictures.loading import open_picture

SIDE = 128  # of all models' training images, in pixels


@dataclass(frozen=True)
class DrawnPictures:
    """Images of one figure each.

    Attributes:
        names: files in the data set.
        pixels: [N, 3, S, S] uint8.
        captions: of each image; all but the last name the figure.
        facts: of each image, attribute -> value.
    """

    names: Sequence[str]
    pixels: torch.Tensor
    captions: Sequence[Sequence[str]]
    facts: Sequence[dict[str, str]]

    def __len__(self) -> int:
        return len(self.names)

    def batch(self, numbers: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S] float32 in -1..1"""
        return self.pixels[numbers].float() / 127.5 - 1


def read_pictures(folder: Path, most: int | None = None) -> DrawnPictures:
    """Read the training images of one figure; at most `most`, the same ones every time."""
    records = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    if most is not None and most < len(records):
        # Not every n-th: kinds of groups take turns, and some n would never meet one of them.
        records = [records[n] for n in sorted(random.Random(0).sample(range(len(records)), most))]
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    names = [record["target"] for record in records]
    return DrawnPictures(
        names,
        read_pixels([folder / name for name in names]),
        [record["text"] for record in records],
        [facts[name] for name in names],
    )


def read_outlines(folder: Path, pictures: DrawnPictures) -> torch.Tensor:
    """Edges of each image's figure, [N, 3, S, S] uint8; the files are beside the images."""
    return read_pixels(
        [(folder / name).with_name(Path(name).stem + "_outline.png") for name in pictures.names]
    )


def read_pixels(paths: Sequence[Path]) -> torch.Tensor:
    """[N, 3, S, S] uint8

    Raises:
        EasyRefError: an image is missing, broken, or of another size than the first.
    """

    def levels(path: Path) -> np.ndarray:
        return np.asarray(open_picture(path)).transpose(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        arrays = list(pool.map(levels, paths))
    for path, array in zip(paths, arrays, strict=True):
        if array.shape != arrays[0].shape:
            sizes = [f"{width}x{height}" for _, height, width in (array.shape, arrays[0].shape)]
            raise EasyRefError(
                f"{path} has {sizes[0]} pixels, but {paths[0]} {sizes[1]}. All drawn images "
                "must have one size; draw the data set again."
            )
    return torch.from_numpy(np.stack(arrays))
