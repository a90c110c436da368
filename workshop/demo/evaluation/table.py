"""The table as text and as JSON, and its scores as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from easyref_core.errors import EasyRefError
from easyref_core.files import writing
from easyref_core.untrusted import open_regular, read_json

from ..tiny_weights import write_json, write_text
from .metrics import Row, Scores

_COLUMNS = ("condition", "attribute", "group", "score")
_VERDICTS = {True: "met", False: "MISSED", None: ""}


def format_table(rows: Sequence[Row]) -> str:
    """Lines in columns: measure, value with its interval, count, bar, verdict, note."""
    lines = [("measure", "found", "95% interval", "of", "bar", "", "")]
    lines += [cells(row) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def missed(rows: Sequence[Row]) -> list[Row]:
    """Rows that miss their bar."""
    return [row for row in rows if row.met is False]


def write_table(path: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Write the table as JSON.

    Args:
        about: what was evaluated, and how.

    Raises:
        EasyRefError: it cannot be written there.
    """
    content = {"met": not missed(rows), **about, "rows": [asdict(row) for row in rows]}
    with writing(path):
        write_json(path, content)


def is_table(path: Path) -> bool:
    """Whether a file is one of `write_table`."""
    try:
        content = read_json(path)
    except EasyRefError:
        return False
    return isinstance(content, dict) and {"met", "rows"} <= content.keys()


def has_scores(path: Path) -> bool:
    """Whether a file is one of `write_scores`."""
    with open_regular(path) as file:
        return file.readline(1000).strip() == ",".join(_COLUMNS).encode()


def write_scores(path: Path, results: Mapping[str, Scores]) -> None:
    """Write every group's scores, one per line, for other statistics.

    Args:
        results: condition -> attribute -> scores.

    Raises:
        EasyRefError: it cannot be written there.
    """
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(_COLUMNS)
    for condition, attributes in results.items():
        for attribute, scores in attributes.items():
            lines.writerows(
                (condition, attribute, group, f"{score:g}") for group, score in enumerate(scores)
            )
    with writing(path):
        write_text(path, text.getvalue())


def cells(row: Row) -> tuple[str, ...]:
    """The texts of `format_table`'s columns."""
    found = row.found
    verdict = _VERDICTS[row.met]
    if found is None:
        return row.measure, "-", "", "", row.bar, verdict, row.note
    sign = "+" if row.points else ""
    unit = "" if row.points else "%"
    value = f"{100 * found.value:{sign}.1f}{unit}"
    interval = f"{100 * found.low:{sign}.1f} to {100 * found.high:{sign}.1f}"
    return row.measure, value, interval, str(found.count), row.bar, verdict, row.note
