"""The methods of a run, with their files checked."""

from __future__ import annotations

from collections.abc import Sequence

from ..trials import Trial
from . import Method
from .settings import GenerationSettings


def load_methods(settings: GenerationSettings, trials: Sequence[Trial]) -> dict[str, Method]:
    """The methods that trials name, by name. Weights are read when an image is first generated.

    All share one pipeline: `close` one before the next one generates.

    Args:
        trials: all of the run, those of other processes included: they name the adapters, and the
            groups whose LoRAs `lora-other` uses.

    Raises:
        EasyRefError: files that are missing, damaged, or made for another model.
    """
    raise NotImplementedError
