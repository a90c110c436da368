"""The command `check`: draws a data set, evaluates the models on it and prints the table.

Its exit status is 0 if every bar is met and 1 if one is missed.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from easyref_core.demo_set import shipped_set
from easyref_core.errors import EasyRefError
from easyref_core.files import check_output

from ..dataset.files import DatasetOptions, write_dataset
from ..models import DemoModels
from ..rows import SamplingSettings
from .classifier import CLASSIFIER_FILE, SHIPPED_CLASSIFIER, Classifier, load_classifier
from .conditions import CheckOptions, Conditions, classifier_accuracy, run_check
from .groups import SPLITS, DrawnSplit, groups_for, open_pictures, read_outlines, read_split
from .processes import SharedCheck, processes_for
from .table import format_table, has_scores, is_table, missed, write_scores, write_table
from .table_rows import COMPARED, all_rows, classifier_rows

# Of the 691 held-out identities the first 160 were used while the recipes were developed, and the
# next 480 are known from the tables of earlier sets; the last 51 are in none. One more would be
# the first again.
_FIRST = groups_for(530)
_MAX_IDENTITIES = 160
_SEED = 4  # other scenes than data sets of the default seed have, and earlier tables (1 to 3)
_MAX_STEPS = 999  # sampling leaves out the lowest of 1,000 timesteps


@dataclass(frozen=True)
class Request:
    """The command's options.

    Attributes:
        models: the set's folder; the shipped set by default.
        data: a drawn data set; a new one by default.
        split: "held_out", or "training" to choose settings with.
        judge: the classifier's file; by default the set's own, else the repository's.
        steps, cfg: of the sampling; the demo's own by default.
        compare: name -> adapter file.
        mllm: for compared adapters without MLLM weights.
        precision: of the MLLM's weights, "fp32" or "int8".
        out: JSON file for the table.
        scores: CSV file for every group's scores.
        overwrite: whether these files may be replaced where they exist.
    """

    models: Path | None = None
    data: Path | None = None
    split: str = "held_out"
    judge: Path | None = None
    identities: int = 160
    steps: int | None = None
    cfg: float | None = None
    compare: Mapping[str, Path] = field(default_factory=dict)
    mllm: Path | None = None
    precision: str = "fp32"
    out: Path | None = None
    scores: Path | None = None
    overwrite: bool = False
    device: torch.device | str = "cpu"


def demo_check(request: Request) -> int:
    """Evaluate and print; returns the exit status, 0 or 1.

    Raises:
        EasyRefError: something is missing, damaged or out of range.
    """
    _check(request)
    start = time.monotonic()
    models = DemoModels(_set_folder(request), request.device)
    judge = load_classifier(_judge_file(request), request.device)
    int8 = request.precision == "int8"
    options = CheckOptions(_settings(request, models), request.compare, request.mllm, int8)
    with tempfile.TemporaryDirectory(prefix="easyref_check_") as scratch:
        split = _split(request, Path(scratch), options.settings.side)
        _check_files(models, split, options)
        _report("the classifier's own accuracy")
        drawn, rebuilt = classifier_accuracy(judge, models, split)
        results = _evaluate(request, models, judge, split, options)
    looks = [group.look for group in split.of_kind("style")]
    rows = [*classifier_rows(drawn, rebuilt), *all_rows(results, looks)]
    print(format_table(rows))
    short = missed(rows)
    names = "; ".join(row.measure.strip() for row in short)
    minutes = (time.monotonic() - start) / 60
    verdict = f"{len(short)} bars missed: {names}" if short else "every bar is met"
    print(f"\n{verdict} ({minutes:.1f} minutes)")
    if request.out is not None:
        settings = {k: v for k, v in asdict(options.settings).items() if k != "seed"}  # not used
        about = {
            "set": models.info,
            "settings": settings,
            "split": request.split,
            "identities": request.identities,
            "device": models.device.type,
            "precision": models.precision,
            "mllm_precision": request.precision,
        }
        write_table(request.out, rows, about)
    if request.scores is not None:
        write_scores(request.scores, results)
    return 1 if short else 0


def parse_compare(texts: Sequence[str]) -> dict[str, Path]:
    """NAME=FILE entries.

    Raises:
        EasyRefError: another name, or no file.
    """
    adapters: dict[str, Path] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not equals or not file or name not in COMPARED:
            raise EasyRefError(
                f"--compare {text}: write NAME=FILE with one of the names {', '.join(COMPARED)}."
            )
        adapters[name] = Path(file)
    return adapters


def _check(request: Request) -> None:
    if not 2 <= request.identities <= _MAX_IDENTITIES:
        raise EasyRefError(
            f"--identities is {request.identities}; 2 to {_MAX_IDENTITIES} are possible."
        )
    if request.steps is not None and not 1 <= request.steps <= _MAX_STEPS:
        raise EasyRefError(f"--steps is {request.steps}; 1 to {_MAX_STEPS}.")
    if request.cfg is not None and not math.isfinite(request.cfg):
        raise EasyRefError(
            f"--cfg is {request.cfg}; give a number, such as {SamplingSettings().cfg}."
        )
    if request.split not in SPLITS:
        raise EasyRefError(f"There is no split {request.split!r}; choose {' or '.join(SPLITS)}.")
    if request.split == "training" and request.data is None:
        raise EasyRefError("--split training needs --data: the folder the set was trained on.")
    inputs = (request.models, request.data, request.judge, request.mllm, *request.compare.values())
    read = [path for path in inputs if path is not None]
    for path, kind, is_one in (
        (request.out, "a table of an evaluation", is_table),
        (request.scores, "scores of an evaluation", has_scores),
    ):
        if path is not None:
            check_output(path, kind, is_one, read, request.overwrite)


def _settings(request: Request, models: DemoModels) -> SamplingSettings:
    """The demo's, at the size that the set was trained for, unless options say otherwise."""
    chosen = {"side": models.info.get("side"), "steps": request.steps, "cfg": request.cfg}
    given = {name: value for name, value in chosen.items() if value is not None}
    return replace(SamplingSettings(), **given)


def _evaluate(
    request: Request,
    models: DemoModels,
    judge: Classifier,
    split: DrawnSplit,
    options: CheckOptions,
) -> Conditions:
    processes = processes_for(models.device)
    if processes == 1:
        return run_check(models, judge, split, options, _report)
    shared = SharedCheck(models.directory, _judge_file(request), split, options, _report)
    return shared.run(processes)


def _check_files(models: DemoModels, split: DrawnSplit, options: CheckOptions) -> None:
    """Read every file once, before minutes are spent on sampling."""
    for file in (None, *options.compare.values()):
        models.adapter(file, options.mllm if file else None, options.int8)
    for group in split.groups:
        open_pictures((group.target, *group.references))
    read_outlines(split.groups, options.settings.side)


def _judge_file(request: Request) -> Path:
    own = _set_folder(request) / CLASSIFIER_FILE
    return request.judge or (own if own.is_file() else SHIPPED_CLASSIFIER)


def _set_folder(request: Request) -> Path:
    return request.models or shipped_set()


def _split(request: Request, scratch: Path, side: int) -> DrawnSplit:
    if request.data is not None:
        return read_split(request.data, request.split).first(request.identities)
    count = groups_for(request.identities)
    _report(f"drawing {count} held-out groups")
    drawn = DatasetOptions(1, count, side=side, seed=_SEED, first_held_out=_FIRST)
    return read_split(write_dataset(scratch / "drawn", drawn)).first(request.identities)


def _report(text: str) -> None:
    print(f"check: {text}", file=sys.stderr, flush=True)
