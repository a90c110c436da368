"""Endless groups for the MLLM: figures and scenes, drawn once, are put together anew each time.

The drawn data set has too few crowds: an MLLM that sees them again and again learns them by heart
and finds nothing in new ones.
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

_FIGURE = 96  # pixels: between the smallest and the largest it is shown at
_SCENES = 1000
_CROWDED = 0.6  # of the groups of several pictures


@dataclass(frozen=True)
class Composer:
    """Shows these identities, and no others."""

    identities: Sequence[Identity]

    def groups(
        self, rng: random.Random, count: int, pictures: int
    ) -> tuple[torch.Tensor, list[dict[str, str]]]:
        """Groups of equally many pictures, none crowded if that is one.

        Returns:
            levels [count * pictures, 3, 112, 112] uint8, and each group's facts.
        """
        layers: list[list[tuple[Identity, Pose]]] = []  # of each picture, from behind to before
        facts = []
        for _ in range(count):
            meant = rng.choice(self.identities)
            facts.append(asdict(meant))
            if pictures == 1 or rng.random() >= _CROWDED:
                layers += [[(meant, alone(rng))] for _ in range(pictures)]
                continue
            prominent = rng.random() < 0.5
            for friend in self._friends(rng, meant, pictures):
                pair = (friend, meant) if prominent else (meant, friend)
                layers.append(list(zip(pair, together(rng), strict=True)))
        return _compose(rng, layers), facts

    def _friends(self, rng: random.Random, meant: Identity, count: int) -> list[Identity]:
        friends: list[Identity] = []
        while len(friends) < count:
            one = rng.choice(self.identities)
            if strange(one, meant) and one not in friends:
                friends.append(one)
        return friends


def _compose(rng: random.Random, layers: Sequence[Sequence[tuple[Identity, Pose]]]) -> torch.Tensor:
    """[pictures, 3, 112, 112] uint8, each in a random scene."""
    pictures = torch.stack([_scene(rng.randrange(_SCENES)) for _ in layers]).float()
    for depth in range(max(len(of_picture) for of_picture in layers)):
        shown = [n for n, of_picture in enumerate(layers) if len(of_picture) > depth]
        figures = torch.stack([_figure(layers[n][depth][0]) for n in shown])
        placed = place(figures, [layers[n][depth][1] for n in shown], IMAGE_SIZE)
        over, alpha = placed[:, :3], placed[:, 3:] / 255
        pictures[shown] = pictures[shown] * (1 - alpha) + over
    return pictures.round().clamp(0, 255).to(torch.uint8)


def place(figures: torch.Tensor, poses: Sequence[Pose], side: int) -> torch.Tensor:
    """Figures [N, 4, S, S] uint8 where their poses say: [N, 4, side, side] float32 in 0..255,
    colours multiplied with alpha."""
    wide = figures.float()
    wide[:, :3] *= wide[:, 3:] / 255
    tilt = torch.tensor([pose.tilt for pose in poses]).deg2rad()
    scale = torch.tensor([pose.scale for pose in poses])
    middle = torch.tensor([(pose.x, pose.y) for pose in poses]) * 2 - 1
    # From the picture's coordinates back to the figure's, both -1..1 with y downwards.
    turn = torch.stack((tilt.cos(), -tilt.sin(), tilt.sin(), tilt.cos()), -1).view(-1, 2, 2)
    back = turn / scale[:, None, None]
    shift = -(back @ middle[:, :, None])
    shape = (len(poses), 4, side, side)
    grid = F.affine_grid(torch.cat((back, shift), dim=2), shape, align_corners=False)
    return F.grid_sample(wide, grid, mode="bilinear", align_corners=False)


@cache
def _figure(identity: Identity) -> torch.Tensor:
    return picture_levels(draw_character(identity, _FIGURE))


@lru_cache(maxsize=_SCENES)
def _scene(number: int) -> torch.Tensor:
    rng = random.Random(f"scene {number}")
    return picture_levels(draw_scene(random_scene(rng), IMAGE_SIZE, rng))
