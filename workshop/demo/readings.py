"""What the judge network reads in the demo's results, against what was wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .parts import Material, Pictures

if TYPE_CHECKING:
    from .judging.judge import Reading

JUDGE_FILE = Path(__file__).resolve().parent / "weights" / "judge.safetensors"

# Result, by the names of `RowPictures.named` -> the judge's answers, one an attribute.
RowReadings = Mapping[str, Sequence["Reading"]]


def read_results(material: Material, pictures: Pictures) -> list[RowReadings] | None:
    """Let the judge read every result; None where its weights are missing.

    Raises:
        EasyRefError: its file cannot be used.
    """
    if not JUDGE_FILE.is_file():
        return None
    from .judging.judge import load_judge, read_pictures

    judge = load_judge(JUDGE_FILE)
    found: list[RowReadings] = []
    for row, made in zip(material.rows, pictures.rows, strict=True):
        named = made.named()
        answers = read_pictures(judge, list(named.values()), row.facts)
        found.append(dict(zip(named, answers, strict=True)))
    return found


def summary(readings: Sequence[Reading]) -> str:
    """One picture's answers in a few words."""
    missed = [r.attribute for r in readings if not r.right]
    right = f"{len(readings) - len(missed)} of {len(readings)}"
    return f"{right}, not {' and '.join(missed)}" if 0 < len(missed) <= 2 else right


def attribute_table(material: Material, readings: Sequence[RowReadings]) -> str:
    """A line for each attribute of each row: wanted, then what each result shows, "=" if wanted."""
    results = list(readings[0])
    lines = [("row", "attribute", "wanted", *results)]
    for row, found in zip(material.rows, readings, strict=True):
        for answers in zip(*found.values(), strict=True):
            cells = ("=" if answer.right else answer.seen for answer in answers)
            lines.append((row.name, answers[0].attribute, answers[0].wanted, *cells))
    totals = []
    for result in results:
        every = [answer.right for found in readings for answer in found[result]]
        totals.append(f"{sum(every)} of {len(every)}")
    lines.append(("all", "right", "", *totals))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
