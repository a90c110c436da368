"""The run's tables: a row for each trial, and means over groups with their intervals."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from itertools import product
from typing import Any

from .metrics import Column, Metric
from .scoring import Scores
from .statistics import estimate
from .store import RunFolder, TrialState
from .trials import Trial, Variant

States = dict[str, TrialState]
"""Trial's path -> what became of it."""

_NAMES = {"identity": "identity_weight"}  # metrics may have a column "identity"
_FIELDS = [
    _NAMES.get(field.name, field.name)
    for field in dataclasses.fields(Variant)
    if field.name != "method"
]
_HEAD = (
    *("path", "label", "method", *_FIELDS, "group", "split", "kind"),
    *("num_references", "prompt", "seed", "status", "error"),
)


def columns_of(metrics: Sequence[Metric]) -> list[Column]:
    """All columns of scores, each once."""
    found = {column.name: column for metric in metrics for column in metric.columns}
    return list(found.values())


def rows_of(trials: Sequence[Trial], states: States, scores: Scores) -> list[dict[str, Any]]:
    """One row a trial, in the plan's order; columns without a score are absent."""
    return [
        {
            "path": trial.path,
            "label": trial.label,
            **{_NAMES.get(n, n): v for n, v in dataclasses.asdict(trial.variant).items()},
            "group": trial.group,
            "split": trial.split,
            "kind": trial.kind,
            "num_references": len(trial.references),
            "prompt": trial.prompt,
            "seed": trial.seed,
            "status": states[trial.path].status,
            "error": states[trial.path].error,
            **scores.get(trial.path, {}),
        }
        for trial in trials
    ]


def write_rows(
    folder: RunFolder, rows: Sequence[dict[str, Any]], columns: Sequence[Column]
) -> None:
    """scores.csv and scores.parquet, the same bytes for the same rows.

    Raises:
        EasyRefError: they cannot be written.
    """
    import pyarrow as pa
    from pyarrow import parquet

    names = [*_HEAD, *(column.name for column in columns)]
    folder.write_text("scores.csv", _csv(names, rows))
    texts = {"path", "label", "method", "adapter", "aggregation", "stages"}
    texts |= {"group", "split", "kind", "prompt", "status"}
    whole = {"references", "insert_before", "image_size", "steps", "num_references", "seed"}
    types = {name: pa.string() for name in (*texts, "error")} | dict.fromkeys(whole, pa.int64())
    schema = pa.schema([(name, types.get(name, pa.float64())) for name in names])
    plain = [{name: _utf8(row.get(name)) for name in names} for row in rows]
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(plain, schema), buffer)
    folder.write_bytes("scores.parquet", buffer.getvalue())


def _utf8(value: Any) -> Any:
    """Names of files may hold bytes that are no text."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _csv(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_times(folder: RunFolder, trials: Sequence[Trial], states: States) -> None:
    """times.csv: seconds of each stage, by trial.

    Raises:
        EasyRefError: it cannot be written.
    """
    stages = sorted({stage for state in states.values() for stage in state.seconds})
    rows = [{"path": trial.path, **states[trial.path].seconds} for trial in trials]
    folder.write_text("times.csv", _csv(["path", *stages], rows))


def summaries(
    trials: Sequence[Trial], states: States, scores: Scores, columns: Sequence[Column]
) -> list[dict[str, Any]]:
    """Means of each variant: over all groups, and over those of each split and kind.

    A group's images are averaged first; then groups are, which the intervals resample.
    """
    splits = _distinct(trial.split for trial in trials)
    kinds = _distinct(trial.kind for trial in trials)
    found = []
    for label in dict.fromkeys(trial.label for trial in trials):
        of_label = [trial for trial in trials if trial.label == label]
        for split, kind in product(splits, kinds):
            chosen = [
                trial
                for trial in of_label
                if split in ("", trial.split) and kind in ("", trial.kind)
            ]
            if chosen:
                summary = _summary(chosen, states, scores, columns)
                found.append({"label": label, "split": split, "kind": kind, **summary})
    return found


def _distinct(names: Any) -> list[str]:
    """ "" for all, then each one's, unless there is one only."""
    different = list(dict.fromkeys(names))
    return ["", *(name for name in different if name)] if len(different) > 1 else [""]


def _summary(
    trials: Sequence[Trial], states: States, scores: Scores, columns: Sequence[Column]
) -> dict[str, Any]:
    done = [trial for trial in trials if states[trial.path].status == "done"]
    column = {}
    for name in (column.name for column in columns):
        by_group: dict[str, list[float]] = {}
        for trial in done:
            if name in scores[trial.path]:
                by_group.setdefault(trial.group, []).append(scores[trial.path][name])
        if by_group:
            mean = estimate([sum(values) / len(values) for values in by_group.values()])
            column[name] = {"value": mean.value, "low": mean.low, "high": mean.high}
    stages: dict[str, list[float]] = {}
    for trial in done:
        for stage, seconds in states[trial.path].seconds.items():
            stages.setdefault(stage, []).append(seconds)
    return {
        "variant": dataclasses.asdict(trials[0].variant),
        "groups": len({trial.group for trial in trials}),
        "images": len(done),
        "failed": len(trials) - len(done),
        "num_references": sum(len(trial.references) for trial in trials) / len(trials),
        "column": column,
        "seconds": {stage: sum(values) / len(values) for stage, values in stages.items()},
    }


def text_table(found: Sequence[dict[str, Any]], columns: Sequence[Column]) -> str:
    """The summaries over all groups, for a terminal."""
    rows = [["", "images", *(column.title for column in columns), "encode s", "step s"]]
    for summary in found:
        if not summary["split"] and not summary["kind"]:
            scores = summary["column"]
            cells = [f"{scores[c.name]['value']:.3f}" if c.name in scores else "-" for c in columns]
            rows.append([summary["label"], str(summary["images"]), *cells, *_times(summary)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def _times(summary: dict[str, Any]) -> list[str]:
    """Seconds of encoding, and of a step of the sampling."""
    seconds, steps = summary["seconds"], summary["variant"]["steps"]
    times = (seconds.get("encode"), seconds["sample"] / steps if "sample" in seconds else None)
    return ["-" if time is None else f"{time:.2g}" for time in times]


def plain_column(column: Column) -> dict[str, Any]:
    return {**dataclasses.asdict(column), "printed": dict(column.printed)}
