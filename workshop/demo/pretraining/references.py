"""The drawn groups in memory, at the MLLM's image size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from easyref_core.pictures.loading import open_picture
from easyref_core.pictures.preprocessing import cut, normalise, picture_levels, resize

IMAGE_SIZE = 112  # pixels; 16 tokens per image


@dataclass(frozen=True)
class DrawnGroups:
    """Groups of images with something in common.

    Attributes:
        levels: [G, P, 3, 112, 112] uint8; the first image of each group is its target, which
            shows its figure only.
        kinds: of each group: identity, crowded or style.
        facts: of each group's target.
    """

    levels: torch.Tensor
    kinds: Sequence[str]
    facts: Sequence[dict[str, str]]

    def __len__(self) -> int:
        return len(self.kinds)

    def pictures(self, picks: Sequence[tuple[int, int]]) -> torch.Tensor:
        """[N, 3, 112, 112] uint8 images at (group, index)."""
        return torch.stack([self.levels[group, index] for group, index in picks])


def patches_of(levels: torch.Tensor) -> torch.Tensor:
    """Patches [N, 64, 1176] of images [N, 3, 112, 112] uint8."""
    return cut(normalise(levels))


def read_groups(folder: Path) -> DrawnGroups:
    """Read the training groups."""
    records = json.loads((folder / "groups.json").read_text(encoding="utf-8"))
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    names = [[r["target"], *r["image_file"]] for r in records]
    # Not processes: a forked one hangs in PyTorch after this one has used several threads.
    with ThreadPoolExecutor() as pool:
        groups = list(pool.map(_read_group, [(folder, n) for n in names]))
    return DrawnGroups(
        torch.stack(groups),
        [r["kind"] for r in records],
        [facts[r["target"]] for r in records],
    )


def _read_group(job: tuple[Path, Sequence[str]]) -> torch.Tensor:
    folder, names = job
    pictures = [open_picture(folder / name) for name in names]
    return torch.stack([picture_levels(resize(picture, IMAGE_SIZE)) for picture in pictures])
