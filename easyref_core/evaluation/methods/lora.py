"""A LoRA trained on each group's references, the paper's tuned baseline; `lora-other` samples a
group with the LoRA of the next one, which shows what it gives to a group it has not seen."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import EasyRefError
from ...files import write_atomically, writing
from ...weight_file import open_weight_file
from ..groups import GroupPicture
from ..trials import Trial
from . import Generated
from .failures import concerns_all
from .lora_training import train_lora
from .other_group import OtherGroups
from .pipeline import GenerationPipeline
from .sampling import Prepared, generate_batch, opened

_NAME = "references"
_SECONDS = "seconds"


class LoraMethod:
    """A LoRA for each group; see `Method`. The variant's weight is the LoRA's.

    Args:
        others: for `lora-other`.
    """

    def __init__(
        self,
        base: GenerationPipeline,
        others: OtherGroups | None = None,
    ) -> None:
        self.name = "lora" if others is None else "lora-other"
        self._base = base
        self._others = others
        self._keys: dict[tuple[GroupPicture, ...], str] = {}
        self._loaded: Path | None = None

    def identity(self) -> dict[str, Any]:
        return {**self._base.identity, "lora": dataclasses.asdict(self._base.settings.lora)}

    def generate(self, trials: Sequence[Trial], work: Path) -> list[Generated]:
        weight = trials[0].variant.weight
        if self._others is not None:
            trials = [self._others.swapped(trial) for trial in trials]

        def prepare(trial: Trial) -> Prepared:
            file, seconds = self._trained(trial.references, work)
            return Prepared(file, file, {"train": seconds})

        def begin(file: Path) -> None:
            self._load(file)
            self._base.pipe.unet.set_adapters(_NAME, weight)

        return generate_batch(self._base, trials, prepare, lambda _, text: text, begin)

    def close(self) -> None:
        if self._loaded is not None:
            self._base.pipe.unet.unload_lora()
            self._loaded = None
        self._base.free_cache()

    def _load(self, file: Path) -> None:
        if self._loaded != file:
            self.close()
            state = open_weight_file(file)
            self._loaded = file
            unet = self._base.pipe.unet
            weights = state.read({name: name for name in state.tensors})
            unet.load_lora_adapter(weights, prefix="unet", adapter_name=_NAME)
            unet.requires_grad_(False)

    def _trained(self, references: tuple[GroupPicture, ...], work: Path) -> tuple[Path, float]:
        """The file of a LoRA, which is trained where there is none, and how long that took."""
        if references not in self._keys:
            self._keys[references] = self._key(references)
        file = work / "loras" / f"{self._keys[references]}.safetensors"
        seconds = _seconds(file)
        if seconds is None:
            self.close()
            start = time.perf_counter()
            state = train_lora(
                self._base,
                list(opened(references)),
                [picture.caption for picture in references],
                self._base.settings.lora,
            )
            seconds = time.perf_counter() - start
            with concerns_all("a LoRA's file"):
                _write(file, state, seconds)
        return file, seconds

    def _key(self, references: tuple[GroupPicture, ...]) -> str:
        """Of all that a LoRA depends on."""
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode())
        for picture, caption in zip(
            opened(references), (r.caption for r in references), strict=True
        ):
            digest.update(f"{picture.size} {json.dumps(caption)}".encode())
            digest.update(picture.tobytes())
        return digest.hexdigest()[:32]


def _seconds(file: Path) -> float | None:
    """How long a LoRA was trained; None where there is none, or a damaged one."""
    try:
        return float(open_weight_file(file).metadata[_SECONDS])
    except (EasyRefError, KeyError, ValueError):
        return None


def _write(file: Path, state: Mapping[str, Any], seconds: float) -> None:
    from safetensors.torch import save

    content = save(dict(state), {"format": "pt", _SECONDS: str(seconds)})
    with writing(file):
        write_atomically(file, lambda part: part.write_bytes(content))
