"""The words of all captions."""

from __future__ import annotations

from ..dataset.characters import ACCESSORIES, COLOURS, EYES, PATTERNS, SHAPES
from ..dataset.groups import STYLE_PATTERNS
from ..dataset.scenes import PLACES, TIMES

_OTHERS = ("a", "with", "eyes", "creature", "shape", "on", "in", "at", "by", "the")
_PHRASES = (*SHAPES, *COLOURS, *PATTERNS, *EYES, *ACCESSORIES, *STYLE_PATTERNS, *PLACES, *TIMES)

WORDS = tuple(dict.fromkeys([*_OTHERS, *(word for p in _PHRASES for word in p.split())]))
