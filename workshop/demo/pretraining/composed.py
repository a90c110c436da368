"""Endless groups for the MLLM, composed of figures and scenes that are drawn once.

The drawn data set has too few crowded groups: an MLLM trained on them alone memorises them, and
recognises nothing in new ones.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache

import torch
import torch.nn.functional as F

from easyref_core.pictures.preprocessing import picture_levels

from ..dataset.characters import Identity, draw_character
from ..dataset.groups import strange
from ..dataset.poses import Pose, alone, together
from ..dataset.scenes import draw_scene, random_scene
from .references import IMAGE_SIZE

_FIGURE = 96  # pixels, between the smallest and the largest size in an image
_SCENES = 1000
_CROWDED = 0.6  # share of the groups of several images


@dataclass(frozen=True)
class Composer:
    """Composes images of these identities."""

    identities: Sequence[Identity]

    def groups(
        self, rng: random.Random, count: int, pictures: int
    ) -> tuple[torch.Tensor, list[dict[str, str]]]:
        """Groups of equally many images, none crowded if that is one.

        Returns:
            levels [count * pictures, 3, 112, 112] uint8, and each group's facts.
        """
        layers: list[list[tuple[Identity, Pose]]] = []  # of each image, from back to front
        facts = []
        for _ in range(count):
            identity = rng.choice(self.identities)
            facts.append(asdict(identity))
            if pictures == 1 or rng.random() >= _CROWDED:
                layers += [[(identity, alone(rng))] for _ in range(pictures)]
                continue
            prominent = rng.random() < 0.5
            for friend in self._friends(rng, identity, pictures):
                pair = (friend, identity) if prominent else (identity, friend)
                layers.append(list(zip(pair, together(rng), strict=True)))
        return _compose(rng, layers), facts

    def _friends(self, rng: random.Random, identity: Identity, count: int) -> list[Identity]:
        friends: list[Identity] = []
        while len(friends) < count:
            candidate = rng.choice(self.identities)
            if strange(candidate, identity) and candidate not in friends:
                friends.append(candidate)
        return friends


def _compose(rng: random.Random, layers: Sequence[Sequence[tuple[Identity, Pose]]]) -> torch.Tensor:
    """[pictures, 3, 112, 112] uint8, each in a random scene."""
    pictures = torch.stack([_scene(rng.randrange(_SCENES)) for _ in layers]).float()
    for depth in range(max(len(of_image) for of_image in layers)):
        chosen = [n for n, of_image in enumerate(layers) if len(of_image) > depth]
        figures = torch.stack([_figure(layers[n][depth][0]) for n in chosen])
        placed = place(figures, [layers[n][depth][1] for n in chosen], IMAGE_SIZE)
        over, alpha = placed[:, :3], placed[:, 3:] / 255
        pictures[chosen] = pictures[chosen] * (1 - alpha) + over
    return pictures.round().clamp(0, 255).to(torch.uint8)


def place(figures: torch.Tensor, poses: Sequence[Pose], side: int) -> torch.Tensor:
    """Figures [N, 4, S, S] uint8 at their poses: [N, 4, side, side] float32 in 0..255,
    colours premultiplied by alpha."""
    premultiplied = figures.float()
    premultiplied[:, :3] *= premultiplied[:, 3:] / 255
    tilt = torch.tensor([pose.tilt for pose in poses]).deg2rad()
    scale = torch.tensor([pose.scale for pose in poses])
    middle = torch.tensor([(pose.x, pose.y) for pose in poses]) * 2 - 1
    # From the image's coordinates to the figure's, both -1..1 with y downwards.
    turn = torch.stack((tilt.cos(), -tilt.sin(), tilt.sin(), tilt.cos()), -1).view(-1, 2, 2)
    back = turn / scale[:, None, None]
    shift = -(back @ middle[:, :, None])
    shape = (len(poses), 4, side, side)
    grid = F.affine_grid(torch.cat((back, shift), dim=2), shape, align_corners=False)
    return F.grid_sample(premultiplied, grid, mode="bilinear", align_corners=False)


@cache
def _figure(identity: Identity) -> torch.Tensor:
    return picture_levels(draw_character(identity, _FIGURE))


@lru_cache(maxsize=_SCENES)
def _scene(number: int) -> torch.Tensor:
    rng = random.Random(f"scene {number}")
    return picture_levels(draw_scene(random_scene(rng), IMAGE_SIZE, rng))
