"""The table as text, and everything as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...errors import EasyRefError
from ..tiny_weights import write_json
from .measures import Row

_VERDICTS = {True: "met", False: "MISSED", None: ""}


def format_table(rows: Sequence[Row]) -> str:
    """Lines in columns: measure, value with its interval, count, bar, verdict, note."""
    lines = [("measure", "found", "95% interval", "of", "bar", "", "")]
    lines += [_cells(row) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def missed(rows: Sequence[Row]) -> list[Row]:
    """Rows whose bar was not reached."""
    return [row for row in rows if row.met is False]


def write_results(
    path: Path, rows: Sequence[Row], about: Mapping[str, Any], results: Mapping[str, Any]
) -> None:
    """Write the table and every group's scores, so that other numbers can be made of them.

    Args:
        about: what was measured, and how.
        results: condition -> attribute -> scores.

    Raises:
        EasyRefError: the folder cannot be written to.
    """
    content = {"met": not missed(rows), **about, "rows": [asdict(row) for row in rows]}
    try:
        write_json(path, {**content, "scores": results})
    except OSError as error:
        raise EasyRefError(f"{path} cannot be written: {error}. Choose another place.") from error


def _cells(row: Row) -> tuple[str, ...]:
    found = row.found
    verdict = _VERDICTS[row.met]
    if found is None:
        return row.measure, "-", "", "", row.bar, verdict, row.note
    sign = "+" if row.points else ""
    unit = "" if row.points else "%"
    value = f"{100 * found.value:{sign}.1f}{unit}"
    interval = f"{100 * found.low:{sign}.1f} to {100 * found.high:{sign}.1f}"
    return row.measure, value, interval, str(found.count), row.bar, verdict, row.note
