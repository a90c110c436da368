"""Rows of measurements, their verdicts, and the table; without PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

PASS, FAIL, MEASURED, NOT_HERE = "pass", "fail", "measured", "not run here"


class NotHere(Exception):
    """A check that cannot run on this computer or ComfyUI; the text says why."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        check: name of its check.
        name: name of the measurement.
        value: in `unit`; None if there is only a verdict.
        bar: limit of the value: an upper one if `at_most`, else a lower one.
        verdict: PASS, FAIL, MEASURED or NOT_HERE.
        note: reason of a failure or for not running, or details.
    """

    check: str
    name: str
    value: float | None = None
    unit: str = ""
    bar: float | None = None
    at_most: bool = True
    verdict: str = MEASURED
    note: str = ""

    def written(self) -> dict[str, Any]:
        return asdict(self)


def measured(
    name: str,
    value: float,
    unit: str = "",
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    note: str = "",
) -> Row:
    """A row; with a limit it passes or fails. NaN fails."""
    bar = at_most if at_most is not None else at_least
    verdict = MEASURED
    if bar is not None:
        verdict = PASS if (value <= bar if at_most is not None else value >= bar) else FAIL
    return Row("", name, float(value), unit, bar, at_most is not None, verdict, note)


def stated(name: str, holds: bool, note: str = "") -> Row:
    """A row that passes or fails, without a value."""
    return Row("", name, verdict=PASS if holds else FAIL, note=note)


def table(rows: Sequence[Row]) -> str:
    """One line per row: check, measurement, value, limit, verdict, note."""
    head = ("check", "measured", "value", "bar", "verdict")
    lines = [head] + [
        (row.check, row.name, _value(row.value, row.unit), _bar(row), row.verdict) for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    notes = ["", *(row.note for row in rows)]
    text = []
    for line, note in zip(lines, notes, strict=True):
        cells = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        text.append(f"{cells}  {_short(note)}".rstrip())
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def summary(rows: Iterable[Row]) -> dict[str, int]:
    """Number of rows per verdict."""
    counts = dict.fromkeys((PASS, FAIL, MEASURED, NOT_HERE), 0)
    for row in rows:
        counts[row.verdict] += 1
    return counts


def _value(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.4g} {unit}".rstrip()


def _bar(row: Row) -> str:
    if row.bar is None:
        return ""
    return f"{'<=' if row.at_most else '>='} {_value(row.bar, row.unit)}"


def _short(note: str, longest: int = 160) -> str:
    line = " ".join(note.split())
    return line if len(line) <= longest else line[: longest - 3] + "..."
