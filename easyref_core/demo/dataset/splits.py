"""Which identities and styles are for training and which are held out, never seen in training."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

from .characters import Identity, all_identities
from .groups import Style, all_styles

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
    """(training, held out)"""
    return split(all_styles(), HELD_OUT_SHARE)
