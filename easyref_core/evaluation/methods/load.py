"""The methods of a run, with their files checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...errors import EasyRefError
from ...untrusted import shown
from ..trials import Trial
from . import METHODS, Method
from .easyref import EasyRefMethod
from .ip_adapter import IpAdapterMethod
from .lora import LoraMethod, next_references
from .pipeline import GenerationPipeline
from .plain import PlainMethod
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
    names = dict.fromkeys(trial.variant.method for trial in trials)
    base = GenerationPipeline(settings)
    return {
        name: _load(name, base, [t for t in trials if t.variant.method == name]) for name in names
    }


def _load(name: str, base: GenerationPipeline, trials: Sequence[Trial]) -> Method:
    settings = base.settings
    if name == "none":
        return PlainMethod(base)
    if name == "lora":
        return LoraMethod(base)
    if name == "lora-other":
        return LoraMethod(base, next_references(trials))
    if name == "ip-adapter":
        return IpAdapterMethod(base, settings.ip_adapter, settings.image_encoder)
    if name in ("easyref", "average", "concatenate"):
        adapters = {trial.variant.adapter for trial in trials} - {""}
        return EasyRefMethod(
            name, base, settings.mllm, settings.adapter, [Path(a) for a in sorted(adapters)]
        )
    raise EasyRefError(f"There is no method {shown(name)}. Choose from {', '.join(METHODS)}.")
