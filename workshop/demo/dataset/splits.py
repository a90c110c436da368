"""Identities and styles for training, and held-out ones that no training image shows."""

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
    """(training, held out), shuffled: `share` of the combinations is held out, while each single
    value of an attribute is in training many times.
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

    Held-out styles that look like a training one are in neither. That leaves few of some patterns;
    these are repeated, so that the held-out styles take all patterns in turn.
    """
    training, others = split(all_styles(), HELD_OUT_SHARE)
    looks = {style.look for style in training}
    new = [style for style in others if style.look not in looks]
    patterns = [[s for s in new if s.pattern == pattern] for pattern in STYLE_PATTERNS]
    turns = range(max(map(len, patterns)))
    return training, tuple(same[turn % len(same)] for turn in turns for same in patterns)
