"""Whether adapter and MLLM fit together: every weight is there, in its shape, and no other.

Numbers of layers are compared before anything is built: as many as a file may claim would take
hours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..adapter.checkpoint import BODY
from ..errors import EasyRefError
from ..pictures.sizes import CHANNELS, FRAMES, PATCH
from ..qwen2vl.config import MAX_LAYERS, MllmConfig
from ..qwen2vl.directory import MllmDirectory, unread_weights
from ..qwen2vl.names import BLOCKS, EMBEDDING, LAYERS, layer_numbers
from ..untrusted import escaped, shown
from ..weight_file import WeightFile

if TYPE_CHECKING:
    from .plan_encoder import EncoderPlan

PATCH_EMBED = BODY + "visual.patch_embed.proj.weight"
_LONGEST = 200  # of a weight's name in messages
_DIMENSIONS = 8  # of a weight in messages
_AGAIN = "Get the directory again, all its files from one place."


def check_plan(
    plan: EncoderPlan, directory: MllmDirectory | None, theirs: Mapping[str, Any]
) -> None:
    """Check an encoder's plan by names and shapes.

    Args:
        directory: the MLLM's, if one was chosen.
        theirs: weights that may be read from it, by canonical name.

    Raises:
        EasyRefError: another number of layers than the configuration says; weights missing,
            unexpected, or of another shape.
    """
    where = escaped(plan.checkpoint.name)
    where += f" with {escaped(str(directory.path))}" if directory else ""
    _check_layers(plan, directory, theirs, where)
    hint = (
        "The adapter and the MLLM directory are of different sizes; choose the one the adapter was "
        "trained with."
    )
    check_weights(
        {name: tuple(p.shape) for name, p in plan.skeleton().state_dict().items()},
        plan.sources,
        directory,
        where,
        hint if directory else "The file is damaged or was converted wrongly; get it again.",
        lambda missing: _missing_hint(plan, directory, missing),
    )


def check_whole_mllm(directory: MllmDirectory) -> None:
    """Raise EasyRefError unless a directory has readable weights for as many layers as its
    config.json says, so that an encoder can be built of it alone."""
    if directory.quantisation:
        raise EasyRefError(_quantised(directory))
    for prefix, key, stated in _layers_of(directory.config):
        _check_held(directory, len(layer_numbers(directory.sources(), prefix)), key, stated)


def check_weights(
    wanted: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, tuple[WeightFile, str]],
    directory: MllmDirectory | None,
    where: str,
    misshapen_hint: str,
    missing_hint: Callable[[Sequence[str]], str],
) -> None:
    """Compare weights by name with those wanted.

    Args:
        sources: official key -> (file, name in the file).
        where: what has these weights, for messages.
        misshapen_hint, missing_hint: what to do; the second is given the names that are missing.

    Raises:
        EasyRefError: weights are missing, unexpected, or of another shape.
    """
    missing = sorted(wanted.keys() - sources.keys())
    if missing:
        embedding = " (nor its twin lm_head.weight)" if missing[0] == BODY + EMBEDDING else ""
        raise EasyRefError(
            f"{where}: {len(missing)} weights are missing, first {missing[0]}{embedding}. "
            f"{missing_hint(missing)}"
        )
    unexpected = sorted(sources.keys() - wanted.keys())
    if unexpected:
        raise EasyRefError(
            f"{where}: {len(unexpected)} weights are not part of Qwen2-VL with EasyRef, first "
            f"{shown(unexpected[0], _LONGEST)}. The MLLM is of another size or family, or the "
            "file is damaged."
        )
    by = f" by {directory.config_file}" if directory else ""
    for key, (file, name) in sources.items():
        shapes = [wanted[key]]
        if key == PATCH_EMBED:  # a convolution's kernels in the files, a matrix here
            shapes.insert(0, (wanted[key][0], CHANNELS, FRAMES, PATCH, PATCH))
        shape = file.tensors[name].shape
        if shape not in shapes:
            raise EasyRefError(
                f"{shown(name, _LONGEST)} in {escaped(str(file.path))} has shape "
                f"{list(shape[:_DIMENSIONS])}, but {list(shapes[0])} is needed{by}. "
                f"{misshapen_hint}"
            )


def _check_layers(
    plan: EncoderPlan, directory: MllmDirectory | None, theirs: Mapping[str, Any], where: str
) -> None:
    config, final = plan.config, plan.checkpoint.final_layers
    for prefix, key, stated in _layers_of(config):
        used = stated - final if prefix == LAYERS else stated
        if used < 0 or stated > MAX_LAYERS:
            raise EasyRefError(
                f"{where}: an MLLM of {stated} layers ({key}), of which the adapter replaces "
                f"{final}, cannot be. Choose the MLLM that the adapter was trained with."
            )
        found = layer_numbers(plan.sources, BODY + prefix)
        missing = [number for number in range(used) if number not in found]
        if missing:
            first = f"{BODY}{prefix}{missing[0]}."
            raise EasyRefError(
                f"{where}: {len(missing)} layers' weights are missing, first {first}*. "
                f"{_missing_hint(plan, directory, [first])}"
            )
        held = len(layer_numbers(theirs, prefix))
        if directory and held:
            _check_held(directory, held, key, stated)
        own = len(layer_numbers(plan.checkpoint.body, prefix))
        if own > used:
            said = directory.config_file if directory else "its configuration"
            raise EasyRefError(
                f"{escaped(plan.checkpoint.name)} carries {own} layers of the MLLM ({prefix}*), "
                f"but by {said} ({key} {stated}) only {used} are used. Choose the MLLM that the "
                "adapter was trained with."
            )


def _layers_of(config: MllmConfig) -> tuple[tuple[str, str, int], ...]:
    """(start of the names, key in config.json, number) of decoder layers and vision blocks."""
    return (
        (LAYERS, "num_hidden_layers", config.num_layers),
        (BLOCKS, "depth", config.vision.depth),
    )


def _check_held(directory: MllmDirectory, held: int, key: str, stated: int) -> None:
    if held != stated:
        raise EasyRefError(
            f"{directory.config_file} says {key} {stated}, but the weights beside it have {held} "
            f"such layers. {_AGAIN}"
        )


def _quantised(directory: MllmDirectory) -> str:
    return (
        f"The weights in {escaped(str(directory.path))} are quantised (quantization_config: "
        f"{directory.quantisation}), which EasyRef cannot read. Get Qwen2-VL-2B-Instruct itself, "
        "whose weights are bfloat16; the precision int8 rounds them when they are read."
    )


def _missing_hint(
    plan: EncoderPlan, directory: MllmDirectory | None, missing: Sequence[str]
) -> str:
    if not all(name.startswith(BODY) for name in missing):
        return "The files are damaged or belong to different models; get them again."
    if directory is None:
        return "Choose the Qwen2-VL-2B-Instruct directory to complete them."
    if directory.quantisation:
        return _quantised(directory)
    if any(key.startswith(BODY) for key in plan.sources):
        return "The files are damaged or belong to different models; get them again."
    held = unread_weights(directory.path)
    found = f"only {held}, and no index of them" if held else "no weights"
    return (
        "The adapter does not carry the MLLM (those of the first training stage do not), and the "
        f"directory holds {found}. Choose the one it was trained from."
    )
