"""Write the tables of docs/demo.md from docs/demo_check.json, which `check --out` writes.

python -m workshop.pages.make_tables
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"


from easyref_core.evaluation.statistics import Estimate  # noqa: E402
from workshop.demo.evaluation.metrics import Row  # noqa: E402
from workshop.demo.evaluation.table import cells  # noqa: E402
from workshop.demo.evaluation.table_rows import COMPARED  # noqa: E402

BEGIN, END = "<!-- measured -->\n", "<!-- end -->\n"
MEASURES = re.compile(
    r"identity(,|:| at| with)|place and time|crowded|wrong|style: (pattern and palette$|shape|two)"
    r"|outline with|prompt only(:|, style:)"
)


def rows(check: Mapping[str, Any]) -> list[Row]:
    """The rows of a `python -m workshop.demo check --out` file."""
    found = [row | {"found": row["found"] and Estimate(**row["found"])} for row in check["rows"]]
    return [Row(**row) for row in found]


def tables(check: Mapping[str, Any]) -> str:
    """Both tables as Markdown."""
    measured = rows(check)
    adapters = ("this adapter", *COMPARED.values())
    own = [row for row in measured if MEASURES.match(row.measure.strip())]
    main = [("measure", "found", "95% interval", "bar")]
    for row in own:
        name, found, interval, _, bar, verdict, note = cells(row)
        if row.measure.startswith("identity at"):  # its number is the whole rise
            found, interval = note, ""
        main.append((name.strip(), found, interval, f"{bar}: {verdict}" if bar else ""))
    values = {row.measure: cells(row)[1] for row in measured}
    other = [("adapter", "identity", "crowded")]
    other += [
        (name, values[f"{name}: identity"], values[f"{name}: crowded"])
        for name in adapters
        if f"{name}: identity" in values  # measured, too
    ]
    return f"{_markdown(main)}\n{_markdown(other)}"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *body = lines
    return "".join(map(_line, (head, ["---"] * len(head), *body)))


def _line(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |\n".replace("|  |", "| |")


def main() -> None:
    document, check = DOCS / "demo.md", json.loads((DOCS / "demo_check.json").read_text("utf-8"))
    before, rest = document.read_text(encoding="utf-8").split(BEGIN)
    text = before + BEGIN + tables(check) + END + rest.split(END)[1]
    document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
