"""Weights for the MLLM's layers, where the hidden states of many are pooled (`dla` and `lap`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import EasyRefError
from ..qwen2vl.config import MAX_LAYERS
from ..untrusted import number, shown, text

_HEAVY = 2.0
_EVEN = (1.0,)
_FALLING = (1.75, 0.25)

# Factors of text tokens and of image tokens from the first hidden state to the last, and how much
# attention is paid to the text and to the pictures.
_PRESETS = {
    "even": (_EVEN, _EVEN, 1.0, 1.0),
    "early": (_FALLING, _FALLING, 1.0, 1.0),
    "late": (_FALLING[::-1], _FALLING[::-1], 1.0, 1.0),
    "text-heavy": (_EVEN, _EVEN, _HEAVY, 1.0),
    "picture-heavy": (_EVEN, _EVEN, 1.0, _HEAVY),
}
PRESETS = tuple(_PRESETS)
MAX_FACTOR = 10.0


@dataclass(frozen=True)
class MllmLayerWeights:
    """How much each of the MLLM's layers counts, for text and for image tokens.

    A list of factors lies evenly over the hidden states that the adapter reads, the first factor on
    the first and the last on the last (of one hidden state, the first); between them factors change
    linearly. So a list as long as the adapter's is taken as it is, and any other length fits too.

    Attributes:
        preset: one of `PRESETS`; the factors multiply it.
        text, picture: multiply the learned weight of each hidden state.
        text_weight, picture_weight: multiply the attention (before normalisation) that the
            reference tokens pay to text and to pictures in the very last layer. With one final
            layer a factor above 0 on all layers alike does next to nothing there: that layer
            normalises what it reads.

    Raises:
        EasyRefError: an unknown preset; no factor, too many, or one that is no number from 0 to 10.
    """

    preset: str = "even"
    text: tuple[float, ...] = _EVEN
    picture: tuple[float, ...] = _EVEN
    text_weight: float = 1.0
    picture_weight: float = 1.0

    def __post_init__(self) -> None:
        if text(self.preset, "The preset of MLLM layers") not in PRESETS:
            raise EasyRefError(
                f"There is no preset {shown(self.preset)} of MLLM layers. Choose one of "
                f"{', '.join(PRESETS)}."
            )
        for name in ("text", "picture"):
            factors = getattr(self, name)
            if not isinstance(factors, Sequence) or not 0 < len(factors) <= MAX_LAYERS:
                raise EasyRefError(
                    f"The layer weights for {name} tokens are {shown(factors)}; 1 to {MAX_LAYERS} "
                    "factors are needed."
                )
            checked = (_factor(f, f"A layer weight for {name} tokens") for f in factors)
            object.__setattr__(self, name, tuple(checked))
        for name in ("text_weight", "picture_weight"):
            object.__setattr__(self, name, _factor(getattr(self, name), name))

    def factors(self, count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Of each of `count` hidden states, for text tokens and for image tokens."""
        text, picture, _, _ = _PRESETS[self.preset]
        return (
            _product(_spread(text, count), _spread(self.text, count)),
            _product(_spread(picture, count), _spread(self.picture, count)),
        )

    @property
    def attention(self) -> tuple[float, float]:
        """Factors of the attention to text and to pictures."""
        _, _, text, picture = _PRESETS[self.preset]
        return text * self.text_weight, picture * self.picture_weight

    def text_for(self, count: int) -> str:
        """One line for each kind of token, for people."""
        lines = zip(("text", "pictures"), self.factors(count), self.attention, strict=True)
        return "\n".join(
            f"{kind}: {', '.join(f'{round(f, 2):g}' for f in factors)}; attention {attention:g}"
            for kind, factors, attention in lines
        )


def parse_factors(given: str, name: str) -> tuple[float, ...]:
    """A list of factors from text such as "1, 0.5, 0"; an empty text is 1.

    Raises:
        EasyRefError: something else than numbers with commas between them.
    """
    if not text(given, name).strip():
        return _EVEN
    try:
        return tuple(float(part) for part in given.split(","))
    except ValueError as error:
        raise EasyRefError(
            f"{name} is {shown(given)}; factors with commas between them are needed, such as "
            '"1, 0.5, 0", from the first layer to the last.'
        ) from error


def _factor(value: float, name: str) -> float:
    return number(value, name, 0.0, MAX_FACTOR, "It multiplies what the adapter has learned.")


def _product(first: Sequence[float], second: Sequence[float]) -> tuple[float, ...]:
    return tuple(a * b for a, b in zip(first, second, strict=True))


def _spread(points: Sequence[float], count: int) -> tuple[float, ...]:
    """Points spread evenly over `count` places, with lines between them."""
    found = []
    for place in range(count):
        at = place * (len(points) - 1) / max(1, count - 1)
        before, share = math.floor(at), at - math.floor(at)
        after = min(before + 1, len(points) - 1)
        found.append(points[before] + share * (points[after] - points[before]))
    return tuple(found)
