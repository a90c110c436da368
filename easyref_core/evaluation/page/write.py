"""Writes the page of a run."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from ...files import write_atomically, writing
from .contact_sheet import ContactSheet, contact_sheet
from .plots import PlotGroup, all_plots
from .record import RunRecord, read_run, text_of
from .score_table import SPLITS, score_tables, seconds_text, views
from .series import GREY, colours
from .setup import method_facts, metric_facts, settings_facts

PAGE = "index.html"
MOST_BYTES = 20_000_000
_ROOM = 500_000  # bytes that must be left of the limit
_MOST_FAILURES, _MOST_LICENCES = 50, 20
_HERE = Path(__file__).parent
_TITLES = {
    "mrbench": "MRBench: consistency with several references",
    "coco": "COCO: one reference",
    "dreambooth": "DreamBooth: thirty subjects",
    "multibanana": "MultiBanana: up to eight references",
    "aggregation": "Ways to aggregate references",
    "tokens": "Number and place of the reference tokens",
    "group-size": "Size of the group of references",
}


def write_page(folder: str | Path, most_bytes: int = MOST_BYTES) -> Path:
    """Write a run's `index.html`, one file that needs no other, from what is in its folder.

    Args:
        most_bytes: the page's largest size; thumbnails become smaller, then fewer.

    Returns:
        The page's path.

    Raises:
        EasyRefError: the folder has no results, or cannot be written to.
    """
    run = read_run(folder)
    path = Path(folder) / PAGE
    content = _page(run, most_bytes).encode("utf-8", "replace")
    with writing(path):
        write_atomically(path, lambda file: file.write_bytes(content))
    return path


def _page(run: RunRecord, most_bytes: int) -> str:
    """The page's text, with as many pictures as fit."""
    notes = list(run.notes)
    context = _context(run, notes)
    plain = _render(context, contact_sheet(run, 0), notes)
    room = most_bytes - _ROOM - len(plain.encode("utf-8", "replace"))
    while True:
        sheet = contact_sheet(run, max(0, room))
        page = _render(context, sheet, [*notes, *sheet.notes])
        over = len(page.encode("utf-8", "replace")) - most_bytes
        if over <= 0 or room <= 0:
            return page
        room -= max(over, room // 4)


def _context(run: RunRecord, notes: list[str]) -> dict[str, Any]:
    tables = score_tables(run)
    splits = [table for table in tables if not table.key.startswith("kind")]
    plots: dict[str, list[PlotGroup]] = {}
    try:
        for table in splits:
            plots[table.key] = all_plots(run, table.key.removeprefix("all").removeprefix("split "))
    except ImportError:
        notes.append("The plots are left out: matplotlib is missing. Install easyref[bench].")
    failures = [trial for trial in run.trials if trial.failed]
    protocol = text_of(run.settings.get("protocol"), 60)
    return {
        "run": run,
        "title": text_of(run.settings.get("title"))
        or _TITLES.get(protocol, protocol)
        or "Comparison with references",
        "protocol": protocol,
        "tables": tables,
        "views": views(run),
        "plots": plots,
        "failures": failures[:_MOST_FAILURES],
        "more_failures": max(0, len(failures) - _MOST_FAILURES),
        "splits": {split: SPLITS.get(split, split) for split in _present(run, "split")},
        "kinds": _present(run, "kind"),
        "methods": {m: c for m, c in colours(run).items() if m in {t.method for t in run.trials}},
        "licences": _licences(run),
        "facts": settings_facts(run),
        "method_facts": method_facts(run),
        "metric_facts": metric_facts(run),
        "seconds_text": seconds_text,
        "colour_of": _colour_of_labels(run),
    }


def _colour_of_labels(run: RunRecord) -> dict[str, int]:
    """Label -> colour of its method; grey for labels of no variant."""
    found = {label: GREY for pair in run.preferences for label in (pair.label_a, pair.label_b)}
    palette = colours(run)
    return found | {item.label: palette[item.method] for item in (*run.trials, *run.summaries)}


def _licences(run: RunRecord) -> list[str]:
    """Each licence with the number of pictures that have it."""
    pictures = {
        name: licence
        for trial in run.trials
        for name, licence in zip((*trial.references, *trial.targets), trial.licences, strict=False)
    }
    counts = Counter(filter(None, pictures.values())).most_common(_MOST_LICENCES)
    return [f"{licence} ({count:,})" for licence, count in counts]


def _present(run: RunRecord, name: str) -> list[str]:
    return sorted({getattr(trial, name) for trial in run.trials} - {""})


def _render(context: dict[str, Any], sheet: ContactSheet, notes: list[str]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    style, script = (_HERE.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return environment.get_template("page.html").render(
        **context, sheet=sheet, notes=notes, style=style, script=script, script_hash=digest
    )
