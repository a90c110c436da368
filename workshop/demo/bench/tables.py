"""The tables of the command `bench`: what each one generates, and what it is expected to show.

methods   EasyRef beside other methods, by the number of references
layers    reference tokens from the MLLM's last layer, one pool over all layers (LAP), or one for
          texts and one for pictures (DLA): adapters trained for as many steps from the same one
stages    reference tokens alone, with identity, and both in stages of the sampling
training  layer pools and identity trained one after the other, or at once

All but the first have every line of four references again with those of another group, as a
control.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyref_core.adapter.checkpoint import load_checkpoint
from easyref_core.demo_set import shipped_set
from easyref_core.errors import EasyRefError
from easyref_core.evaluation.trials import Variant

from . import layer_findings, ordering, stage_findings, training_findings
from .findings import CONTROL_COUNT
from .options import BenchOptions

_LORA_COUNT = 4  # a LoRA is trained on so many references only
_RUNS = Path("runs/demo")
_FILES = {
    "last": _RUNS / "4_last/easyref_ema.safetensors",
    "lap": _RUNS / "4_lap/easyref_ema.safetensors",
    "dla": _RUNS / "4_layer_pooling/easyref_ema.safetensors",
}
_TRAINED = {
    "two": _RUNS / "merged/easyref.safetensors",
    "one": _RUNS / "5_single_stage/easyref_ema.safetensors",
}
_AGGREGATIONS = {"last": "easyref", "lap": "lap", "dla": "dla"}


@dataclass(frozen=True)
class Table:
    """
    Attributes:
        out: folder of its run, its groups and its base model.
        groups: of each split and kind.
        vary: fields of `Variant` -> their values, and other settings of `easyref bench`.
        keep: whether a combination of varied values is generated.
        expected: what must hold, by the run's scores.csv and the methods that were run.
        found: sentences on what else the scores show.
    """

    out: Path
    groups: int
    splits: tuple[str, ...]
    counts: tuple[int, ...]
    methods: tuple[str, ...]
    settings: Callable[[BenchOptions], Mapping[str, Any]]
    keep: Callable[[BenchOptions, Variant], bool]
    expected: Callable[[Path, Sequence[str]], list[ordering.Verdict]]
    found: Callable[[Path], list[str]] = lambda scores: []


def _plain_settings(options: BenchOptions) -> dict[str, Any]:
    return {"adapter": str(shipped_set() / "easyref.safetensors")}


def _methods_kept(options: BenchOptions, variant: Variant) -> bool:
    """One reference leaves nothing to combine. LoRAs take most of the time: one number of
    references must do.
    """
    if variant.method in ("average", "concatenate"):
        return variant.references > 1
    return not variant.method.startswith("lora") or variant.references == _LORA_COUNT


def _adapters_of(options: BenchOptions, known: Mapping[str, Path] = _FILES) -> dict[str, Path]:
    """Name -> adapter.

    Args:
        known: name -> the file where none is given.

    Raises:
        EasyRefError: a name that is not known, or a file that is missing.
    """
    given = _given(options, known)
    files = {name: Path(given.get(name, path)).resolve() for name, path in known.items()}
    for name, file in files.items():
        if not file.is_file():
            raise EasyRefError(
                f"{file} is missing. Name the adapter that was trained as {name!r}: --adapters "
                f"{name}=FILE."
            )
    return files


def _given(options: BenchOptions, known: Collection[str]) -> dict[str, str]:
    """Name -> file of `--adapters`."""
    given = dict(text.partition("=")[::2] for text in options.adapters)
    unknown = [name for name, file in given.items() if name not in known or not file]
    if unknown:
        raise EasyRefError(
            f"--adapters cannot be used as {unknown[0]!r}. Write NAME=FILE for each of "
            f"{', '.join(known)}."
        )
    return given


def _layer_settings(options: BenchOptions) -> dict[str, Any]:
    files = {_AGGREGATIONS[name]: file for name, file in _adapters_of(options).items()}
    return {"vary": {"adapter": [str(f) for f in files.values()], "aggregation": list(files)}}


def _layer_kept(options: BenchOptions, variant: Variant) -> bool:
    if variant.method == "none":
        return True
    (name,) = (name for name, kind in _AGGREGATIONS.items() if kind == variant.aggregation)
    own = str(_adapters_of(options)[name]) == variant.adapter
    return own and (variant.method == "easyref" or variant.references == CONTROL_COUNT)


def _stage_settings(options: BenchOptions) -> dict[str, Any]:
    file = _given(options, ("dla",)).get("dla")
    adapter = Path(file) if file else shipped_set() / "easyref.safetensors"
    has_pools = "dla" in load_checkpoint(adapter).aggregations
    rows = stage_findings.ROWS.values()
    varied = {name: list(dict.fromkeys(row[name] for row in rows)) for name in next(iter(rows))}
    return {
        "adapter": str(adapter),
        "aggregation": "dla" if has_pools else "easyref",
        "vary": varied,
    }


def _stage_kept(options: BenchOptions, variant: Variant) -> bool:
    rows = stage_findings.ROWS.values()
    return variant.method == "none" or any(
        all(getattr(variant, name) == value for name, value in row.items()) for row in rows
    )


def _training_settings(options: BenchOptions) -> dict[str, Any]:
    files = [str(file) for file in _adapters_of(options, _TRAINED).values()]
    return {"aggregation": "dla", "vary": {"adapter": files, "identity": [0.0, 1.0]}}


TABLES: dict[str, Table] = {
    "methods": Table(
        out=Path("runs/bench"),
        groups=6,
        splits=("held_in", "held_out"),
        counts=(1, 2, 4, 8, 16),
        methods=("easyref", "average", "concatenate", "ip-adapter", "lora", "lora-other", "none"),
        settings=_plain_settings,
        keep=_methods_kept,
        expected=ordering.verdicts,
    ),
    "layers": Table(
        out=Path("runs/bench_layers"),
        groups=40,
        splits=("held_out",),
        counts=(1, 4),
        methods=("easyref", "easyref-other", "none"),
        settings=_layer_settings,
        keep=_layer_kept,
        expected=layer_findings.controls,
        found=layer_findings.found,
    ),
    "stages": Table(
        out=Path("runs/bench_stages"),
        groups=16,
        splits=("held_out",),
        counts=(4,),
        methods=("easyref", "easyref-other", "none"),
        settings=_stage_settings,
        keep=_stage_kept,
        expected=stage_findings.controls,
        found=stage_findings.found,
    ),
    "training": Table(
        out=Path("runs/bench_training"),
        groups=16,
        splits=("held_out",),
        counts=(4,),
        methods=("easyref", "easyref-other", "none"),
        settings=_training_settings,
        keep=lambda options, variant: True,
        expected=training_findings.controls,
        found=training_findings.found,
    ),
}
