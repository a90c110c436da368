"""A training run's settings: a readable YAML file, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import EasyRefError
from ..pictures.preprocessing import MIN_IMAGE_SIZE

STAGES = ("alignment", "single_reference", "multi_reference")
PARTS = ("final_layers", "projector", "cross_attention", "mllm", "lora")
CROPS = ("random", "center", "aspect")
AGGREGATIONS = ("easyref", "average")
PRECISIONS = ("no", "bf16", "fp16")
SCHEDULES = ("constant", "cosine")
WEIGHTINGS = ("none", "min_snr", "debiased")
TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class ModelSettings:
    """What is trained from.

    Attributes:
        base: SDXL directory in the diffusers layout (unet, vae, text encoders, tokenizers,
            scheduler).
        mllm: Qwen2-VL directory.
        adapter: EasyRef checkpoint of the stage before; None starts anew.
        reference_tokens, final_layers, lora_rank: of a new adapter.
        aggregation: "easyref" lets the MLLM read a group together; "average" reads each picture
            alone and takes the mean of their tokens, to compare with.
    """

    base: str
    mllm: str
    adapter: str | None = None
    reference_tokens: int = 64
    final_layers: int = 1
    lora_rank: int = 128
    aggregation: str = "easyref"


@dataclass(frozen=True)
class DataSettings:
    """What is trained on, and how it is varied.

    Attributes:
        files: JSON lists in the official layout, or WebDataset tar shards.
        root: folder that the pictures' names in JSON lists are relative to.
        resolution: of the target, in pixels.
        crop: "random" or "center" square of the target (and of its single reference, alike);
            "aspect" keeps its shape, in multiples of 64.
        image_size: of the references (the official `cond_image_size`).
        max_references: at most so many of a group.
        subset_probability: how often only a random subset of at least 2 is shown.
        drop_image, drop_text, drop_both: how often the references become the black picture, the
            text becomes empty, or both.
        workers: processes that read pictures.
        cache: folder for VAE latents and text states; only where every target and text comes out
            the same each time (crop "center" or "aspect").
    """

    files: tuple[str, ...]
    root: str = "."
    resolution: int = 1024
    crop: str = "random"
    image_size: int = 336
    max_references: int = 28
    subset_probability: float = 0.0
    drop_image: float = 0.05
    drop_text: float = 0.05
    drop_both: float = 0.05
    workers: int = 4
    cache: str | None = None


@dataclass(frozen=True)
class OptimiserSettings:
    """How it is trained.

    Attributes:
        parts: what is trained; everything else is frozen.
        learning_rate_schedule: "constant", or "cosine" down to a fiftieth at the last step.
        warmup_steps: in which the learning rate rises to the full one.
        loss_weighting: of noise levels: "none" as officially, "min_snr" (with `snr_gamma`) or
            "debiased", which count strong noise for more.
        noise_levels: at how many, spread evenly over the schedule, each sample is trained for one
            reading of its references: 1 as officially.
        batch_size: samples a process and step of accumulation.
        accumulation: batches an optimiser step.
        ema: decay of an exponential moving average that is exported too; None for none.
    """

    parts: tuple[str, ...]
    steps: int
    learning_rate: float
    weight_decay: float = 0.0
    batch_size: int = 8
    accumulation: int = 1
    max_grad_norm: float | None = None
    precision: str = "bf16"
    gradient_checkpointing: bool = True
    ema: float | None = None
    learning_rate_schedule: str = "constant"
    warmup_steps: int = 0
    loss_weighting: str = "none"
    snr_gamma: float = 5.0
    noise_levels: int = 1


@dataclass(frozen=True)
class OutputSettings:
    """Where results go.

    Attributes:
        folder: of checkpoints, logs and validation pictures.
        save_every, validate_every, log_every: optimiser steps.
        keep: newest checkpoints kept.
        trackers: "tensorboard", "wandb".
        validation: JSON list of groups for the validation pictures; None for none.
    """

    folder: str
    save_every: int = 1000
    keep: int = 2
    log_every: int = 10
    validate_every: int = 1000
    trackers: tuple[str, ...] = ("tensorboard",)
    validation: str | None = None


@dataclass(frozen=True)
class Settings:
    """One stage of training."""

    stage: str
    model: ModelSettings
    data: DataSettings
    optimiser: OptimiserSettings
    output: OutputSettings
    seed: int = 0
    source: str = field(default="", compare=False)


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a recipe and apply `section.key=value` overrides.

    Relative paths in the recipe are relative to the folder the command runs in.

    Raises:
        EasyRefError: no such file, not YAML, unknown or missing keys (with the nearest known
            one), values of a wrong kind or out of range.
    """
    return make_settings(read_recipe(path), overrides, str(path))


def make_settings(
    content: dict[str, Any], overrides: Sequence[str] = (), source: str = ""
) -> Settings:
    """Settings from a recipe's content; see `load_settings`."""
    import yaml

    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise EasyRefError(
                f"{override!r} is not a setting; write section.key=value, such as "
                "optimiser.steps=100."
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise EasyRefError(f"{override!r}: the value is not YAML: {error}") from error
        _set(content, name.strip().split("."), value, override)
    settings = build(Settings, content, "")
    _check(settings)
    return dataclasses.replace(settings, source=source)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """A recipe's sections and keys, unchecked.

    Raises:
        EasyRefError: no such file, or not YAML.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise EasyRefError(f"The recipe {path} cannot be read ({error}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EasyRefError(f"The recipe {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise EasyRefError(f"The recipe {path} holds no settings. See recipes/ for examples.")
    return content


def _set(content: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        content = content.setdefault(key, {})
        if not isinstance(content, dict):
            raise EasyRefError(f"{override!r}: {key} is not a section.")
    content[keys[-1]] = value


def build(kind: type, content: Any, where: str) -> Any:
    """A settings dataclass from plain values, strictly.

    Args:
        where: names the section in errors, with a dot at its end; empty for a whole recipe.

    Raises:
        EasyRefError: unknown or missing keys, values of a wrong kind.
    """
    if not isinstance(content, Mapping):
        raise EasyRefError(f"{where or 'The recipe'} must be a section of keys, not {content!r}.")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name != "source"}
    for key in content:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f" Did you mean {near[0]}?" if near else f" Known are {', '.join(fields)}."
            raise EasyRefError(f"There is no setting {where}{key}.{hint}")
    values: dict[str, Any] = {}
    for name, item in fields.items():
        if name in content:
            values[name] = _value(hints[name], content[name], where + name)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise EasyRefError(f"The setting {where}{name} is missing.")
    return kind(**values)


def _value(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(hint, value, f"{name}.")
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        items = [value] if isinstance(value, kind) else value
        if not isinstance(items, list) or not all(type(i) is kind for i in items):
            what = "names" if kind is str else "numbers"
            raise EasyRefError(f"{name} must be a list of {what}, not {value!r}.")
        return tuple(items)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    if value is False and hint is str:  # YAML reads no as false
        return "no"
    if type(value) is not hint:
        raise EasyRefError(f"{name} must be of type {hint.__name__}, not {value!r}.")
    return value


def _check(settings: Settings) -> None:
    data, optimiser, output = settings.data, settings.optimiser, settings.output
    _one_of("stage", settings.stage, STAGES)
    _one_of("model.aggregation", settings.model.aggregation, AGGREGATIONS)
    _one_of("data.crop", data.crop, CROPS)
    _one_of("optimiser.precision", optimiser.precision, PRECISIONS)
    _one_of("optimiser.learning_rate_schedule", optimiser.learning_rate_schedule, SCHEDULES)
    _one_of("optimiser.loss_weighting", optimiser.loss_weighting, WEIGHTINGS)
    for part in optimiser.parts:
        _one_of("optimiser.parts", part, PARTS)
    for tracker in output.trackers:
        _one_of("output.trackers", tracker, TRACKERS)
        if find_spec(tracker) is None:
            raise EasyRefError(
                f"output.trackers names {tracker}, which is not installed: pip install {tracker}"
            )
    positive = {
        "optimiser.steps": optimiser.steps,
        "optimiser.learning_rate": optimiser.learning_rate,
        "optimiser.snr_gamma": optimiser.snr_gamma,
        "optimiser.noise_levels": optimiser.noise_levels,
        "optimiser.batch_size": optimiser.batch_size,
        "optimiser.accumulation": optimiser.accumulation,
        "data.resolution": data.resolution,
        "data.max_references": data.max_references,
        "model.reference_tokens": settings.model.reference_tokens,
        "model.final_layers": settings.model.final_layers,
        "output.save_every": output.save_every,
        "output.validate_every": output.validate_every,
        "output.log_every": output.log_every,
        "output.keep": output.keep,
    }
    for name, value in positive.items():
        if not value > 0:
            raise EasyRefError(f"{name} is {value}; it must be above 0.")
    least = {
        "seed": (settings.seed, 0),
        "data.workers": (data.workers, 0),
        "data.image_size": (data.image_size, MIN_IMAGE_SIZE),
        "model.lora_rank": (settings.model.lora_rank, 1 if "lora" in optimiser.parts else 0),
        "optimiser.weight_decay": (optimiser.weight_decay, 0),
    }
    for name, (value, bound) in least.items():
        if not value >= bound:
            raise EasyRefError(f"{name} is {value}; it must be {bound} or more.")
    if optimiser.max_grad_norm is not None and not optimiser.max_grad_norm > 0:
        raise EasyRefError(
            f"optimiser.max_grad_norm is {optimiser.max_grad_norm}; it must be above 0, or null "
            "to leave gradients as they are."
        )
    if optimiser.ema is not None and not 0 <= optimiser.ema < 1:
        raise EasyRefError(
            f"optimiser.ema is {optimiser.ema}; it must be from 0 to less than 1, or null."
        )
    if not 0 <= optimiser.warmup_steps <= optimiser.steps:
        raise EasyRefError(
            f"optimiser.warmup_steps is {optimiser.warmup_steps}; it must be 0 to "
            f"{optimiser.steps}, the run's steps."
        )
    rates = (data.drop_image, data.drop_text, data.drop_both)
    if min(rates) < 0 or sum(rates) > 1 or not 0 <= data.subset_probability <= 1:
        raise EasyRefError(
            f"data.drop_image, drop_text and drop_both are {rates} and subset_probability is "
            f"{data.subset_probability}; they are probabilities, the first three 1 at most in sum."
        )
    if not optimiser.parts or not data.files:
        raise EasyRefError("optimiser.parts and data.files must each name at least one.")
    if data.cache is not None and data.crop == "random":
        raise EasyRefError("data.cache needs the same target each time: use crop center or aspect.")
    if settings.stage != "alignment" and settings.model.adapter is None:
        raise EasyRefError(
            f"The stage {settings.stage} starts from the adapter of the stage before it. Name that "
            "file as model.adapter, or set stage=alignment to train from scratch."
        )
    for name, folder in (("base", settings.model.base), ("mllm", settings.model.mllm)):
        if not Path(folder).is_dir():
            raise EasyRefError(f"model.{name}: there is no folder {folder}.")
    if settings.model.adapter is not None and not Path(settings.model.adapter).is_file():
        raise EasyRefError(
            f"model.adapter: there is no file {settings.model.adapter}. Train the stage before "
            "this one first."
        )
    if Path(output.folder).exists() and not Path(output.folder).is_dir():
        raise EasyRefError(f"output.folder: {output.folder} is a file. Name a folder.")
    for name in (*data.files, *([output.validation] if output.validation else [])):
        if not Path(name).is_file():
            raise EasyRefError(f"There is no data file {name}. Check data.files and validation.")


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise EasyRefError(f"{name} is {value!r}; it can be {', '.join(known)}.{hint}")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """Settings that differ between two runs, as "name: old -> new"."""
    found: list[str] = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{where}{name}.")
        elif before != after:
            found.append(f"{where}{name}: {before!r} -> {after!r}")
    return found
