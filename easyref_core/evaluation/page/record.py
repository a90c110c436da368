"""A run's folder as the page reads it. Everything in it may be damaged or made up: what cannot be
used is left out, and texts become one line without control characters.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import EasyRefError
from ...untrusted import escaped, is_regular, number, read_bytes, read_json
from ..metrics import Column
from ..statistics import Estimate

RESULTS = "results.json"
_LARGEST = 512_000_000  # bytes of a list of trials or scores
_LONGEST_NAME, _LONGEST_TEXT = 120, 600  # characters
_MOST_COUNT = 10**12


@dataclass(frozen=True)
class SummaryRecord:
    """Scores of a variant over some groups.

    Attributes:
        variant: fields of `trials.Variant`.
        split, kind: of the groups; empty for all.
        references: that an image has, on average.
        scores: column's name -> mean; columns without a score are absent.
        seconds: stage -> mean seconds an image.
    """

    label: str
    variant: Mapping[str, Any]
    split: str
    kind: str
    groups: int
    images: int
    failed: int
    references: float
    scores: Mapping[str, Estimate]
    seconds: Mapping[str, float]

    @property
    def method(self) -> str:
        return str(self.variant.get("method") or self.label)

    @property
    def seconds_a_step(self) -> float | None:
        """Of the sampling, an image; None where that is not known."""
        steps = _finite(self.variant.get("steps"))
        return self.seconds["sample"] / steps if steps and "sample" in self.seconds else None


@dataclass(frozen=True)
class TrialRecord:
    """One image of the run.

    Attributes:
        path: in the run's folder, without extension.
        references, targets: paths of pictures.
        licences: of references and targets, in order; empty where not known.
        failed: why there is no image; empty if there is, or should be.
        scores: column's name -> score of this image.
    """

    path: str
    label: str
    method: str
    group: str
    split: str
    kind: str
    prompt: str
    seed: int
    references: tuple[str, ...]
    targets: tuple[str, ...]
    licences: tuple[str, ...] = ()
    failed: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PreferenceRecord:
    """Votes between two variants.

    Attributes:
        rate: how often the first is preferred, a tie as half a win.
    """

    label_a: str
    label_b: str
    wins_a: int
    wins_b: int
    ties: int
    rate: Estimate | None

    @property
    def votes(self) -> int:
        return self.wins_a + self.wins_b + self.ties


@dataclass(frozen=True)
class RunRecord:
    """All that the page shows.

    Attributes:
        settings, methods, metrics: as stored; values of any kind.
        columns: those that are better the higher first.
        summaries: in the table's order.
    """

    folder: Path
    settings: Mapping[str, Any]
    methods: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]
    columns: tuple[Column, ...]
    summaries: tuple[SummaryRecord, ...]
    preferences: tuple[PreferenceRecord, ...]
    notes: tuple[str, ...]
    trials: tuple[TrialRecord, ...]

    def scope(self, split: str = "", kind: str = "") -> list[SummaryRecord]:
        """The summaries over the groups of a split and a kind; empty for all."""
        return [s for s in self.summaries if (s.split, s.kind) == (split, kind)]

    @property
    def labels(self) -> list[str]:
        """Of the variants, in order, including those without results."""
        return list(
            dict.fromkeys([s.label for s in self.summaries] + [t.label for t in self.trials])
        )


def read_run(folder: str | Path) -> RunRecord:
    """Read what a run has written.

    Raises:
        EasyRefError: there are no results, or they are none.
    """
    folder = Path(folder)
    results = read_json(folder / RESULTS, _LARGEST, "file of results")
    if not isinstance(results, dict) or not isinstance(results.get("summaries"), list):
        raise EasyRefError(
            f"{escaped(str(folder / RESULTS))} holds no results of `easyref bench`. Name the "
            "folder that was its --out."
        )
    notes = [text_of(note) for note in _list(results.get("notes"))]
    columns = [_column(item) for item in _dicts(results.get("columns")) if item.get("name")]
    columns.sort(key=lambda column: column.higher_is_better is not True)
    names = [column.name for column in columns]
    try:
        scores = _rows(folder / "scores.csv")
        trials = _dicts(read_json(folder / "trials.json", _LARGEST, "list of trials"))
    except EasyRefError as error:
        notes.append(f"The page shows no pictures: {error}")
        scores, trials = {}, []
    return RunRecord(
        folder=folder,
        settings=_dict(results.get("settings")),
        methods=_dict(results.get("methods")),
        metrics=tuple(_dicts(results.get("metrics"))),
        columns=tuple(columns),
        summaries=tuple(_summary(item, names) for item in _dicts(results["summaries"])),
        preferences=tuple(_preference(p) for p in _dicts(results.get("preferences"))),
        notes=tuple(dict.fromkeys(filter(None, notes))),
        trials=tuple(_trial(item, scores, names) for item in trials),
    )


def text_of(value: Any, longest: int = _LONGEST_TEXT) -> str:
    """A text from outside as one line, cut where it is too long; empty for other values."""
    if not isinstance(value, str):
        return ""
    text = escaped(" ".join(value[: 4 * longest].split()))
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _column(item: Mapping[str, Any]) -> Column:
    better = item.get("higher_is_better")
    printed = item.get("printed")
    pairs = printed.items() if isinstance(printed, dict) else _list(printed)
    factors = [
        (text_of(pair[0], _LONGEST_NAME), factor)
        for pair in pairs
        if isinstance(pair, (list, tuple)) and len(pair) == 2
        if (factor := _finite(pair[1])) is not None
    ]
    name = _name(item.get("name"))
    return Column(
        name=name,
        title=_name(item.get("title")) or name,
        scale=_name(item.get("scale")),
        higher_is_better=better if isinstance(better, bool) else None,
        printed=tuple(factors),
    )


def _summary(item: Mapping[str, Any], columns: Iterable[str]) -> SummaryRecord:
    found = _dict(item.get("column"))
    groups = _count(item.get("groups"))
    estimates = ((name, _estimate(found.get(name), groups)) for name in columns)
    seconds = ((_name(k), _finite(v)) for k, v in _dict(item.get("seconds")).items())
    variant = _dict(item.get("variant"))
    return SummaryRecord(
        label=_name(item.get("label")) or "without a name",
        variant=variant | {"method": _name(variant.get("method"))},
        split=_name(item.get("split")),
        kind=_name(item.get("kind")),
        groups=groups,
        images=_count(item.get("images")),
        failed=_count(item.get("failed")),
        references=_finite(item.get("num_references")) or 0.0,
        scores={name: found for name, found in estimates if found is not None},
        seconds={k: v for k, v in seconds if v is not None},
    )


def _estimate(item: Any, count: int) -> Estimate | None:
    """A mean with its interval; where that is missing, it is the mean itself."""
    item = _dict(item)
    value = _finite(item.get("value"))
    if value is None:
        return None
    low, high = _finite(item.get("low")), _finite(item.get("high"))
    return Estimate(value, value if low is None else low, value if high is None else high, count)


def _preference(item: Mapping[str, Any]) -> PreferenceRecord:
    wins = _count(item.get("wins_a")), _count(item.get("wins_b")), _count(item.get("ties"))
    rate = _estimate(item | {"value": item.get("rate")}, sum(wins))
    return PreferenceRecord(_name(item.get("label_a")), _name(item.get("label_b")), *wins, rate)


def _trial(
    item: Mapping[str, Any], rows: Mapping[str, Mapping[str, str]], columns: Iterable[str]
) -> TrialRecord:
    path = item.get("path")
    row = rows.get(path, {}) if isinstance(path, str) else {}
    scores = ((name, _parsed(row.get(name))) for name in columns)
    error = text_of(row.get("error")) or "no reason was given"
    return TrialRecord(
        path=path if isinstance(path, str) else "",
        label=_name(item.get("label")),
        method=_name(_dict(item.get("variant")).get("method")),
        group=_name(item.get("group")),
        split=_name(item.get("split")),
        kind=_name(item.get("kind")),
        prompt=text_of(item.get("prompt")),
        seed=int(_finite(item.get("seed")) or 0),
        references=tuple(p for p in _list(item.get("references")) if isinstance(p, str)),
        targets=tuple(p for p in _list(item.get("targets")) if isinstance(p, str)),
        licences=tuple(_name(licence) for licence in _list(item.get("licences"))),
        failed=error if row.get("status") == "failed" else "",
        scores={name: score for name, score in scores if score is not None},
    )


def _rows(path: Path) -> dict[str, Mapping[str, str]]:
    """The rows of scores.csv by the path of their image; none where there is no such file.

    Raises:
        EasyRefError: it cannot be read.
    """
    if not is_regular(path):
        return {}
    text = read_bytes(path, _LARGEST, "table of scores").decode("utf-8-sig", "replace")
    return {row["path"]: row for row in _readable(io.StringIO(text, newline="")) if "path" in row}


def _readable(file: io.StringIO) -> Iterator[dict[str, str]]:
    try:
        yield from csv.DictReader(file)
    except csv.Error:  # a field without end; the rows before it count
        return


def _parsed(cell: str | None) -> float | None:
    try:
        return _finite(float(cell or "nan"))
    except (TypeError, ValueError):
        return None


def _finite(value: Any) -> float | None:
    try:
        return number(value, "a score")
    except EasyRefError:
        return None


def _count(value: Any) -> int:
    found = _finite(value)
    return int(min(max(found, 0), _MOST_COUNT)) if found else 0


def _name(value: Any) -> str:
    return text_of(value, _LONGEST_NAME)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in _list(value) if isinstance(item, dict)]
