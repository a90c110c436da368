"""The plan of an encoder: which weight comes from which file of adapter and MLLM.

Every name and size is checked before the first tensor is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapter.checkpoint import BODY, FINAL, PROJECTOR, AdapterCheckpoint
from ..errors import EasyRefError
from ..qwen2vl.config import MllmConfig, config_from_shapes
from ..qwen2vl.directory import MllmDirectory, open_directory
from ..qwen2vl.names import EMBEDDING, truncate
from ..weight_file import WeightFile
from .encoder import EasyRefEncoder

Source = tuple[WeightFile, str]
_PATCH_EMBED = "visual.patch_embed.proj.weight"


@dataclass(frozen=True)
class EncoderPlan:
    """Everything needed to build the encoder, without its weights.

    Attributes:
        directory: of the MLLM; None where the adapter carries all of it.
        sources: official key -> (file, name in the file).
    """

    checkpoint: AdapterCheckpoint
    config: MllmConfig
    directory: Path | None
    sources: Mapping[str, Source]

    def build(
        self,
        *,
        operations: Any = nn,
        dtype: torch.dtype | None = torch.float32,
        compute_dtype: torch.dtype = torch.float32,
        convert: bool = True,
    ) -> EasyRefEncoder:
        """Read the weights into an encoder on the CPU.

        Args:
            operations: see `EasyRefEncoder`.
            dtype: how the weights are stored; None keeps each as it is in its file, which needs
                `operations` that cast. With `torch.nn` it must equal `compute_dtype`. One-byte
                dtypes are for matrices only: biases, norms and reference tokens keep their own.
            compute_dtype: of the activations.
            convert: False keeps the weights as they are in their files, where `operations`
                convert them to `dtype` on their way to the device; scaled ones, which are never
                used as they are, excepted.

        Raises:
            EasyRefError: a file changed in between.
        """
        encoder = self._skeleton(operations=operations, compute_dtype=compute_dtype, dtype=dtype)
        state = read_sources(self.sources, dtype, convert)
        encoder.load_state_dict(state, strict=True, assign=True)
        return encoder.eval().requires_grad_(False)

    def check_unchanged(self) -> None:
        """Raise EasyRefError where a file has changed since it was planned."""
        for file, _ in _by_file(self.sources):
            file.check_unchanged()

    def _skeleton(self, **options: Any) -> EasyRefEncoder:
        """The encoder without memory for its weights."""
        sizes = (self.checkpoint.num_tokens, self.checkpoint.token_width)
        layers = self.checkpoint.final_layers
        return EasyRefEncoder(self.config, *sizes, layers, device="meta", **options)

    def _check(self) -> None:
        """Raise EasyRefError unless the sources have every weight, in its shape, and no other."""
        checkpoint, directory, sources = self.checkpoint, self.directory, self.sources
        wanted = {n: tuple(p.shape) for n, p in self._skeleton().state_dict().items()}
        where = checkpoint.name + (f" with {directory}" if directory else "")
        missing = sorted(wanted.keys() - sources.keys())
        if missing:
            embedding = " (nor its twin lm_head.weight)" if missing[0] == BODY + EMBEDDING else ""
            raise EasyRefError(
                f"{where}: {len(missing)} weights are missing, first {missing[0]}{embedding}. "
                f"{self._missing_hint(missing)}"
            )
        unexpected = sorted(sources.keys() - wanted.keys())
        if unexpected:
            raise EasyRefError(
                f"{where}: {len(unexpected)} weights are not part of Qwen2-VL with EasyRef, first "
                f"{unexpected[0]}. The MLLM is of another size or family, or the file is damaged."
            )
        by = f" by {directory / 'config.json'}" if directory else ""
        for key, (file, name) in sources.items():
            shape = stored = file.tensors[name].shape
            if key == BODY + _PATCH_EMBED:
                shape = (*shape[:1], math.prod(shape[1:]))
            if shape != wanted[key]:
                raise EasyRefError(
                    f"{name} in {file.path} has shape {list(stored)}, but {list(wanted[key])} is "
                    f"needed{by}. The adapter and the MLLM directory are of different sizes; "
                    "choose the one the adapter was trained with."
                )

    def _missing_hint(self, missing: Sequence[str]) -> str:
        if all(name.startswith(BODY) for name in missing):
            if self.directory is None:
                return "Choose the Qwen2-VL-2B-Instruct directory to complete them."
            if not any(key.startswith(BODY) for key in self.sources):
                return (
                    "The adapter does not carry the MLLM (those of the first training stage do "
                    "not), and the directory holds no weights. Choose the one it was trained from."
                )
        return "The files are damaged or belong to different models; get them again."


def read_sources(
    sources: Mapping[str, Source], dtype: torch.dtype | None, convert: bool = True
) -> dict[str, torch.Tensor]:
    """Read weights from several files, each opened once. See `EncoderPlan.build`."""
    state: dict[str, torch.Tensor] = {}
    for file, names in _by_file(sources):
        with file.open() as get:
            for key, name in names.items():
                tensor = get(name)
                if key == BODY + _PATCH_EMBED:
                    tensor = tensor.flatten(1)  # see `vision.PatchEmbed`
                wanted = dtype if convert or name in file.scales else None
                state[key] = tensor if _keeps_dtype(key, tensor, wanted) else tensor.to(wanted)
    return state


def _by_file(sources: Mapping[str, Source]) -> list[tuple[WeightFile, dict[str, str]]]:
    """Each file with the weights that come from it, key -> name in the file."""
    files: dict[Path, tuple[WeightFile, dict[str, str]]] = {}
    for key, (file, name) in sources.items():
        files.setdefault(file.path, (file, {}))[1][key] = name
    return list(files.values())


def _keeps_dtype(key: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> bool:
    """Whether a weight stays as it is in its file. Biases and norms would overflow in one byte."""
    small = tensor.ndim < 2 or key == FINAL + "reference_tokens"
    return dtype is None or (dtype.itemsize == 1 and small)


def plan_encoder(
    checkpoint: AdapterCheckpoint, mllm_directory: str | Path | None = None
) -> EncoderPlan:
    """Decide where every weight of the encoder comes from.

    The adapter's own MLLM weights come before the directory's, as in the official loader; the
    directory gives the sizes, the tokenizer, and whatever the adapter does not carry.

    Raises:
        EasyRefError: no MLLM anywhere; an MLLM of another size; weights missing, unexpected or of
            a wrong shape (named).
    """
    directory = open_directory(mllm_directory) if mllm_directory is not None else None
    config = _config(checkpoint, directory)
    if config.hidden_size != checkpoint.mllm_width:
        raise EasyRefError(
            f"{checkpoint.name} was trained with an MLLM of width {checkpoint.mllm_width}, but "
            f"{directory.path if directory else 'the MLLM'} is {config.hidden_size} wide. Choose "
            "the MLLM it was trained with (Qwen2-VL-2B-Instruct for the official adapter, width "
            "1536)."
        )
    layers = config.num_layers - checkpoint.final_layers
    body = dict(directory.sources()) if directory else {}
    body.update({n: (checkpoint.file, s) for n, s in checkpoint.body.items()})
    sources = {BODY + n: source for n, source in truncate(body, layers).items()}
    sources |= {FINAL + n: (checkpoint.file, s) for n, s in checkpoint.final.items()}
    sources |= {PROJECTOR + n: (checkpoint.file, s) for n, s in checkpoint.projector.items()}
    plan = EncoderPlan(checkpoint, config, directory.path if directory else None, sources)
    plan._check()
    for file, names in _by_file(sources):
        file.check_weights(names.values())
    return plan


def _config(checkpoint: AdapterCheckpoint, directory: MllmDirectory | None) -> MllmConfig:
    if directory is not None:
        return directory.config
    if not checkpoint.has_mllm:
        raise EasyRefError(
            f"{checkpoint.name} does not carry the MLLM (adapters of the first training stage do "
            "not). Choose the Qwen2-VL-2B-Instruct directory it was trained from."
        )
    shapes = {n: checkpoint.file.tensors[s].shape for n, s in checkpoint.body.items()}
    try:
        return config_from_shapes(shapes, checkpoint.final_layers, checkpoint.name)
    except KeyError as error:
        raise EasyRefError(
            f"{checkpoint.name} carries only part of the MLLM: {BODY}{error.args[0]} is missing. "
            "Choose the Qwen2-VL-2B-Instruct directory to complete it, or get the file again."
        ) from error
    except IndexError as error:
        raise EasyRefError(
            f"{checkpoint.name} carries an MLLM whose weights have other shapes than Qwen2-VL's. "
            "The file is damaged or was converted wrongly; get it again."
        ) from error
