"""No references: the plain model with the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..trials import Trial
from . import Generated
from .pipeline import GenerationPipeline
from .sampling import Prepared, generate_batch


class PlainMethod:
    """SDXL as it is; see `Method`."""

    name = "none"

    def __init__(self, base: GenerationPipeline) -> None:
        self._base = base

    def identity(self) -> dict[str, Any]:
        return self._base.identity

    def generate(self, trials: Sequence[Trial], work: Path) -> list[Generated]:
        return generate_batch(self._base, trials, lambda _: Prepared(), lambda _, text: text)

    def close(self) -> None:
        """It changes nothing."""
