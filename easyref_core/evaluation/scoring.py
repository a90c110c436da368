"""Score the images of trials with each metric; scores are kept by metric, in chunks of trials."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import EasyRefError
from ..out_of_memory import lack_of_memory
from ..untrusted import number, read_json
from .generate import concerns_disk, free_memory
from .metrics import Metric
from .planning import batches_of
from .store import RunFolder, TrialState
from .trials import Trial

_LARGEST = 1e30  # a score; sums of larger ones may be no numbers
_CHUNK = 16  # trials

Scores = dict[str, dict[str, float]]
"""Trial's path -> column -> score."""


def chunks_of(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Trials that are scored, and whose scores are kept, together."""
    return batches_of(trials, _CHUNK)


def score(
    metrics: Sequence[Metric],
    chunks: Sequence[Sequence[Trial]],
    folder: RunFolder,
    show: Callable[[int], object] = lambda count: None,
) -> None:
    """Score images, where that was not done for the very same images.

    Args:
        show: called with the number of images, for each metric, that are scored.

    Raises:
        EasyRefError: the disk is full or not writable.
    """
    for chunk in chunks:
        states = {trial.path: folder.state(trial) for trial in chunk}
        marks = _marks(chunk, states)
        finished = [trial for trial in chunk if trial.path in marks]
        images: list[Image.Image] = []
        for metric in metrics:
            name = _file_of(metric, chunk)
            stored = _stored(folder.path / name, marks)
            if stored is None or stored["errors"]:  # which are tried again
                images = images or [folder.image(trial) for trial in finished]
                folder.write_json(name, {"images": marks, **_scored(metric, finished, images)})
            show(len(chunk))


def read_scores(
    metrics: Sequence[Metric],
    trials: Sequence[Trial],
    folder: RunFolder,
    states: Mapping[str, TrialState],
    notes: list[str],
) -> Scores:
    """All that was scored.

    Args:
        states: what became of each trial, by its path.
        notes: gets a sentence for each metric that could not score some images.
    """
    scores: Scores = {trial.path: {} for trial in trials}
    for metric in metrics:
        errors: list[str] = []
        for chunk in chunks_of(trials):
            path = folder.path / _file_of(metric, chunk)
            content = _stored(path, _marks(chunk, states)) or {}
            errors += map(str, content.get("errors", []))
            for path, values in content.get("scores", {}).items():
                scores[path].update(values)
        if errors:
            titles = ", ".join(column.title for column in metric.columns)
            notes.append(f"{titles}: {len(errors)} images have no score, the first: {errors[0]}")
    return scores


def metric_key(metric: Metric) -> str:
    """Differs between metrics whose scores may differ."""
    parts = [metric.identity(), [column.name for column in metric.columns]]
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _file_of(metric: Metric, chunk: Sequence[Trial]) -> str:
    digest = hashlib.sha256("\n".join(trial.path for trial in chunk).encode("utf-8", "replace"))
    return f"work/scores/{metric_key(metric)}/{digest.hexdigest()[:16]}.json"


def _marks(chunk: Sequence[Trial], states: Mapping[str, TrialState | None]) -> dict[str, str]:
    """The checksums of the images that are there, by the trials' paths."""
    found = ((trial.path, states[trial.path]) for trial in chunk)
    return {path: state.sha256 for path, state in found if state and state.sha256}


def _stored(path: Path, marks: dict[str, str]) -> dict[str, Any] | None:
    """Scores of these images, and why some are missing; None where nothing is stored."""
    try:
        content = read_json(path)
    except EasyRefError:
        return None
    if not isinstance(content, dict) or content.get("images") != marks:
        return None
    scores, errors = content.get("scores"), content.get("errors")
    if (
        not isinstance(scores, dict)
        or scores.keys() != marks.keys()
        or not isinstance(errors, list)
    ):
        return None
    try:
        for values in scores.values():
            for name, value in values.items():
                number(value, name, -_LARGEST, _LARGEST)
    except (EasyRefError, AttributeError):
        return None
    return content


def _scored(
    metric: Metric, trials: Sequence[Trial], images: Sequence[Image.Image]
) -> dict[str, Any]:
    """Scores by path, and the reasons why some are missing."""
    scores: dict[str, dict[str, float]] = {trial.path: {} for trial in trials}
    errors: list[str] = []
    if trials:
        for trial, values in _attempted(metric, trials, images):
            if isinstance(values, str):
                errors.append(values)
                continue
            finite = {n: value for n, value in values.items() if abs(value) <= _LARGEST}
            scores[trial.path] = {name: float(value) for name, value in finite.items()}
            if len(finite) < len(values):
                errors.append(f"{trial.path} has scores that are not numbers.")
    return {"scores": scores, "errors": errors}


def _attempted(
    metric: Metric, trials: Sequence[Trial], images: Sequence[Image.Image]
) -> Iterator[tuple[Trial, dict[str, float] | str]]:
    """Each trial with its scores, or the reason why there are none: together, or else singly."""
    reason = ""
    try:
        found = metric.score(trials, images)
    except Exception as error:
        memory = lack_of_memory(error)
        if memory is None and (not isinstance(error, EasyRefError) or concerns_disk(error)):
            raise
        reason = str(error) if memory is None else f"There is not enough memory ({memory})."
    if not reason:
        yield from zip(trials, found, strict=True)
        return
    free_memory()
    if len(trials) == 1:
        yield trials[0], reason
        return
    for trial, image in zip(trials, images, strict=True):
        yield from _attempted(metric, [trial], [image])
