"""The metrics: what generated images are compared with, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from ..trials import Trial


@dataclass(frozen=True)
class Column:
    """One column of scores.

    Attributes:
        name: such as "clip_i".
        title: for tables, such as "CLIP-I".
        scale: what the number is, such as "cosine".
        higher_is_better: None where neither is.
        printed: other scales for the tables: name -> factor, such as {"2.5 x cosine": 2.5}.
    """

    name: str
    title: str
    scale: str
    higher_is_better: bool | None = True
    printed: tuple[tuple[str, float], ...] = ()


class Metric(Protocol):
    """Scores images of trials."""

    columns: tuple[Column, ...]

    def identity(self) -> dict[str, Any]:
        """Model, its checksum, preprocessing and scale, as plain JSON; stored with the scores and
        compared when a run is resumed."""
        ...

    def score(
        self, trials: Sequence[Trial], images: Sequence[Image.Image]
    ) -> list[dict[str, float]]:
        """Column name -> score for each image (RGB); a column is left out where it does not apply,
        such as CLIP-T without a prompt."""
        ...
