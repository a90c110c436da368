"""Which identities and styles are for training and which are held out, never seen in training."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

from .characters import Identity, all_identities
from .groups import STYLE_PATTERNS, Style, all_styles

HELD_OUT_SHARE = 0.15
_Item = TypeVar("_Item")


def split(items: Sequence[_Item], share: float) -> tuple[tuple[_Item, ...], tuple[_Item, ...]]:
    """(training, held out), shuffled: so large a share of the combinations is held out, and each
    single attribute's value is in training many times over.
    """
    shuffled = list(items)
    random.Random(0).shuffle(shuffled)
    count = round(len(shuffled) * share)
    return tuple(shuffled[count:]), tuple(shuffled[:count])


@lru_cache(maxsize=1)
def identities() -> tuple[tuple[Identity, ...], tuple[Identity, ...]]:
    """(training, held out)"""
    return split(all_identities(), HELD_OUT_SHARE)


@lru_cache(maxsize=1)
def styles() -> tuple[tuple[Style, ...], tuple[Style, ...]]:
    """(training, held out)

    No training style looks like a held-out one; those that do are in neither. That leaves few of
    some patterns, which come several times, so that the held-out ones go through all patterns.
    """
    training, others = split(all_styles(), HELD_OUT_SHARE)
    seen = {style.look for style in training}
    unseen = [style for style in others if style.look not in seen]
    patterns = [[s for s in unseen if s.pattern == pattern] for pattern in STYLE_PATTERNS]
    turns = range(max(map(len, patterns)))
    return training, tuple(alike[turn % len(alike)] for turn in turns for alike in patterns)
