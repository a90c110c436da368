"""The plan of an encoder: which weight comes from which file of adapter and MLLM.

Every name and size is checked before the first tensor is read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapter.checkpoint import BODY, FINAL, PROJECTOR, AdapterCheckpoint
from ..adapter.layer_pooling import POOLING, PoolingSizes, resolved_layers
from ..errors import EasyRefError
from ..qwen2vl.config import MllmConfig, config_from_shapes
from ..qwen2vl.directory import MllmDirectory, open_directory
from ..qwen2vl.int8 import SCALE, int8_layers
from ..qwen2vl.names import truncate
from ..untrusted import escaped
from ..weight_file import WeightFile
from ..weight_file.rounding import round_rows
from ..weight_file.scales import Scale
from ..weight_file.tensors import apply_scale, scale_tensor
from .check_plan import PATCH_EMBED, check_plan
from .encoder import EasyRefEncoder

Source = tuple[WeightFile, str]


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

    @property
    def identity(self) -> str:
        """Tells the tokens that this encoder makes from any other's: the adapter's identity, and
        behind it the mark of an MLLM with other numbers than Qwen2-VL's releases."""
        return "-".join(filter(None, (self.checkpoint.identity, self.config.mark)))

    @property
    def pooling(self) -> PoolingSizes | None:
        """Sizes of the adapter's layer pooling; None where it has none.

        Raises:
            EasyRefError: it reads other hidden states than this MLLM has.
        """
        checkpoint = self.checkpoint
        if not checkpoint.pools:
            return None
        body_layers, name = self.config.num_layers - checkpoint.final_layers, checkpoint.name
        layers = resolved_layers(checkpoint.mllm_layers, body_layers, escaped(name))
        return PoolingSizes(checkpoint.pools, layers)

    def build(
        self,
        *,
        operations: Any = nn,
        dtype: torch.dtype | None = torch.float32,
        compute_dtype: torch.dtype = torch.float32,
        convert: bool = True,
        int8: bool = False,
    ) -> EasyRefEncoder:
        """Read the weights into an encoder on the CPU.

        Args:
            operations: see `EasyRefEncoder`.
            dtype: how the weights are stored; None keeps each as it is in its file, which needs
                `operations` that cast (`qwen2vl.casting`, ComfyUI's). With `torch.nn` it must equal
                `compute_dtype`. One-byte dtypes are for matrices only: biases, norms and reference
                tokens keep their own.
            compute_dtype: of the activations.
            convert: False keeps the weights as they are in their files, where `operations`
                convert them to `dtype` on their way to the device; scaled ones, which are never
                used as they are, excepted.
            int8: round the matrices of the MLLM's Linear layers to int8, with a scale for each row;
                `dtype` is for everything else, the adapter's own layers included. Needs
                `operations` that know scales (`qwen2vl.casting`, the nodes').

        Raises:
            EasyRefError: a file changed in between.
            TypeError: int8 with other operations.
        """
        encoder = self.skeleton(operations=operations, compute_dtype=compute_dtype, dtype=dtype)
        encoder.eval().requires_grad_(False)  # int8 could have no gradient
        layers = [BODY + n for n in int8_layers(encoder.multimodal_llm)] if int8 else []
        state = read_sources(self.sources, dtype, convert, [f"{n}.weight" for n in layers])
        scales = {name: state.pop(f"{name}.{SCALE}") for name in layers}
        encoder.load_state_dict(state, strict=True, assign=True)
        for name, scale in scales.items():
            encoder.get_submodule(name).weight_scale = scale
        return encoder

    def check_unchanged(self) -> None:
        """Raise EasyRefError where a file has changed since it was planned."""
        for file, _ in _by_file(self.sources):
            file.check_unchanged()

    def skeleton(self, **options: Any) -> EasyRefEncoder:
        """The encoder without memory for its weights."""
        sizes = (self.checkpoint.num_tokens, self.checkpoint.token_width)
        options |= {"pooling": self.pooling, "device": "meta"}
        return EasyRefEncoder(self.config, *sizes, self.checkpoint.final_layers, **options)


def read_sources(
    sources: Mapping[str, Source],
    dtype: torch.dtype | None,
    convert: bool = True,
    int8: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """Read weights from several files, each opened once. See `EncoderPlan.build`.

    Args:
        int8: names `X.weight` of matrices to round; `X.weight_scale` [rows] comes beside each.
    """
    int8 = frozenset(int8)
    state: dict[str, torch.Tensor] = {}
    for file, names in _by_file(sources):
        with file.open(scaled=False) as get:
            for key, name in names.items():
                tensor, scale = get(name), file.scales.get(name)
                if key in int8:
                    of_scale = key.removesuffix("weight") + SCALE
                    state[key], state[of_scale] = _in_int8(tensor, scale)
                    continue
                if scale is not None:
                    tensor = apply_scale(tensor, scale)
                if key == PATCH_EMBED:
                    tensor = tensor.flatten(1)  # see `vision.PatchEmbed`
                wanted = dtype if convert or name in file.scales else None
                state[key] = tensor if _keeps_dtype(key, tensor, wanted) else tensor.to(wanted)
    return state


def _in_int8(weight: torch.Tensor, scale: Scale | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix in int8 and the scale of each row [rows], as in the file where it is int8."""
    if scale is not None and weight.dtype == torch.int8:
        of_rows = scale_tensor(scale)
    else:
        wide = weight if scale is None else apply_scale(weight, scale)
        weight, of_rows = round_rows(wide, torch.int8)
    return weight, of_rows.flatten().expand(len(weight)).contiguous()


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
        EasyRefError: no MLLM anywhere; an MLLM of another size, or one that is quantised; numbers
            of config.json that do not fit the weights; weights missing, unexpected or of a wrong
            shape (named).
    """
    directory = open_directory(mllm_directory) if mllm_directory is not None else None
    config = _config(checkpoint, directory)
    if config.hidden_size != checkpoint.mllm_width:
        found = escaped(str(directory.path)) if directory else "the MLLM"
        raise EasyRefError(
            f"{escaped(checkpoint.name)} was trained with an MLLM of width "
            f"{checkpoint.mllm_width}, but {found} is {config.hidden_size} wide. Choose the MLLM "
            "it was trained with (Qwen2-VL-2B-Instruct for the official adapter, width 1536)."
        )
    theirs = directory.sources() if directory and not directory.quantisation else {}
    own = {n: (checkpoint.file, s) for n, s in checkpoint.body.items()}
    layers = config.num_layers - checkpoint.final_layers
    sources = {BODY + n: source for n, source in truncate(theirs | own, layers).items()}
    sources |= {FINAL + n: (checkpoint.file, s) for n, s in checkpoint.final.items()}
    sources |= {PROJECTOR + n: (checkpoint.file, s) for n, s in checkpoint.projector.items()}
    sources |= {POOLING + n: (checkpoint.file, s) for n, s in checkpoint.layer_pooling.items()}
    plan = EncoderPlan(checkpoint, config, directory.path if directory else None, sources)
    # First, as what stands beside weights of an unknown form would be taken for the fault.
    for file, names in _by_file(sources):
        file.check_weights(names.values())
    check_plan(plan, directory, theirs)
    return plan


def _config(checkpoint: AdapterCheckpoint, directory: MllmDirectory | None) -> MllmConfig:
    if directory is not None:
        return directory.config
    name = escaped(checkpoint.name)
    if not checkpoint.has_mllm:
        raise EasyRefError(
            f"{name} does not carry the MLLM (adapters of the first training stage do not). Choose "
            "the Qwen2-VL-2B-Instruct directory it was trained from."
        )
    shapes = {n: checkpoint.file.tensors[s].shape for n, s in checkpoint.body.items()}
    try:
        return config_from_shapes(shapes, checkpoint.final_layers, name)
    except KeyError as error:
        raise EasyRefError(
            f"{name} carries only part of the MLLM: {BODY}{error.args[0]} is missing. "
            "Choose the Qwen2-VL-2B-Instruct directory to complete it, or get the file again."
        ) from error
    except IndexError as error:
        raise EasyRefError(
            f"{name} carries an MLLM whose weights have other shapes than Qwen2-VL's. The file is "
            "damaged or was converted wrongly; get it again."
        ) from error
