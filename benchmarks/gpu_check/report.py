"""Rows of measurements, their verdicts, and the table; nothing here needs PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

PASS, FAIL, MEASURED, NOT_HERE = "pass", "fail", "measured", "not run here"


class NotHere(Exception):
    """A check that this computer or this ComfyUI cannot run; says why."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        check: which check made it.
        name: what was measured.
        value: in `unit`; None where there is nothing to say but the verdict.
        bar: what the value may be; `at_most` says on which side.
        verdict: one of this module's four words.
        note: why it failed or was not run, or details.
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
    """A row that passes where the value keeps to its bar, if it has one; NaN never does."""
    bar = at_most if at_most is not None else at_least
    verdict = MEASURED
    if bar is not None:
        verdict = PASS if (value <= bar if at_most is not None else value >= bar) else FAIL
    return Row("", name, float(value), unit, bar, at_most is not None, verdict, note)


def stated(name: str, holds: bool, note: str = "") -> Row:
    """A row that says yes or no."""
    return Row("", name, verdict=PASS if holds else FAIL, note=note)


def table(rows: Sequence[Row]) -> str:
    """Every row in a line: check, measurement, value, bar, verdict, note."""
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
    """How many rows there are of each verdict."""
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
