"""Pictures to train the benchmark's models on: of one figure each, training characters only."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from easyref_core.files import write_atomically

from ..dataset.characters import SHAPES
from ..dataset.groups import draw_identity, draw_style
from ..dataset.splits import identities, styles
from ..pretraining.pictures import SIDE, DrawnPictures

_STYLE_EVERY = 6  # one of so many jobs draws a style
_EACH = 2  # pictures that a job draws


def drawn_pictures(count: int, seed: int, cache: Path) -> DrawnPictures:
    """Draw `count` pictures, or read them from a file that an earlier call left.

    Characters come in turn, so none repeats before all have come.
    """
    if not cache.is_file():
        jobs = [(seed, number) for number in range(count // _EACH)]
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            drawn = [p for pair in pool.map(_draw, jobs, chunksize=16) for p in pair]
        pixels = torch.from_numpy(np.stack([picture for picture, _, _ in drawn]))
        content = {
            "pixels": pixels.permute(0, 3, 1, 2).contiguous(),
            "captions": [captions for _, captions, _ in drawn],
            "facts": [facts for _, _, facts in drawn],
        }
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, lambda partial: torch.save(content, partial))
    content = torch.load(cache, weights_only=True)
    names = [f"{seed}/{number}" for number in range(len(content["pixels"]))]
    return DrawnPictures(names, content["pixels"], content["captions"], content["facts"])


def first_pictures(pictures: DrawnPictures, count: int) -> DrawnPictures:
    return DrawnPictures(
        pictures.names[:count],
        pictures.pixels[:count],
        pictures.captions[:count],
        pictures.facts[:count],
    )


def _draw(job: tuple[int, int]) -> list[tuple[np.ndarray, Sequence[str], dict[str, str]]]:
    """(levels [S, S, 3], (full caption, caption of the scene only), facts) of a job's pictures."""
    seed, number = job
    rng = random.Random(f"{seed} {number}")
    turn, place = divmod(number, _STYLE_EVERY)
    if place == _STYLE_EVERY - 1:
        chosen = styles()[0][turn % len(styles()[0])]
        drawn = [draw_style(chosen, shape, SIDE, rng) for shape in rng.sample(SHAPES, _EACH)]
    else:
        pool = identities()[0]
        identity = pool[(turn * (_STYLE_EVERY - 1) + place) % len(pool)]
        drawn = [draw_identity(identity, SIDE, rng) for _ in range(_EACH)]
    return [(np.asarray(d.picture), (d.full_caption, d.caption), d.facts) for d in drawn]
