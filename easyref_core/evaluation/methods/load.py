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
from .ip_adapter_files import ENCODERS, WHERE
from .lora import LoraMethod
from .other_group import OtherGroups
from .pipeline import GenerationPipeline
from .plain import PlainMethod
from .settings import GenerationSettings

_WHAT = {
    "--adapter": "an EasyRef adapter, such as model.safetensors of zongzhuofan/EasyRef",
    "--mllm": "the folder of Qwen/Qwen2-VL-2B-Instruct, for its tokenizer at least",
    "--ip-adapter": f"an IP-Adapter of SDXL. {WHERE}",
    "--image-encoder": f"the folder of the IP-Adapter's image encoder. {ENCODERS}",
}


def load_methods(settings: GenerationSettings, trials: Sequence[Trial]) -> dict[str, Method]:
    """The methods that trials name, by name. Weights are read when an image is first generated.

    All share one pipeline: `close` one before the next one generates.

    Args:
        trials: all of the run, those of other processes included: they name the adapters, and the
            groups whose references `lora-other` and `easyref-other` use.

    Raises:
        EasyRefError: files that are missing, damaged, or made for another model.
    """
    base = GenerationPipeline(settings)
    by_name: dict[str, list[Trial]] = {}
    for trial in trials:
        by_name.setdefault(trial.variant.method, []).append(trial)
    return {name: load_method(name, base, own) for name, own in by_name.items()}


def load_method(name: str, base: GenerationPipeline, trials: Sequence[Trial]) -> Method:
    """One method for its trials; see `load_methods`."""
    settings = base.settings
    if name == "none":
        return PlainMethod(base)
    if name == "lora":
        return LoraMethod(base)
    if name == "lora-other":
        return LoraMethod(base, OtherGroups(trials))
    if name == "ip-adapter":
        return IpAdapterMethod(
            base,
            _given(name, "--ip-adapter", settings.ip_adapter),
            _given(name, "--image-encoder", settings.image_encoder),
        )
    if name in ("easyref", "easyref-other", "average", "concatenate"):
        named = {trial.variant.adapter for trial in trials}
        default = _given(name, "--adapter", settings.adapter) if "" in named else settings.adapter
        others = [Path(file) for file in sorted(named - {""})]
        mllm = _given(name, "--mllm", settings.mllm)
        other_groups = OtherGroups(trials) if name == "easyref-other" else None
        method = EasyRefMethod(name, base, mllm, default, others, other_groups)
        for variant in dict.fromkeys(trial.variant for trial in trials):
            method.check(variant)
        return method
    raise EasyRefError(f"There is no method {shown(name)}. Choose from {', '.join(METHODS)}.")


def _given(method: str, option: str, path: Path | None) -> Path:
    """
    Raises:
        EasyRefError: it is not given.
    """
    if path is None:
        raise EasyRefError(f"The method {method} needs {option}: {_WHAT[option]}.")
    return path
