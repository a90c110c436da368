"""The demo's tables of layers, stages and training as Markdown, from their runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from easyref_core.evaluation.page.document import markdown_table
from easyref_core.evaluation.page.record import RunRecord, SummaryRecord
from easyref_core.evaluation.page.score_table import seconds_text
from workshop.demo.bench import layer_findings, stage_findings, training_findings
from workshop.demo.bench.findings import CONTROL_COUNT
from workshop.demo.bench.judge import IDENTITY, SCENE
from workshop.demo.bench.tables import TABLES

from .bench_plot import ENCODING, STEP, Lines

LAYER_COLUMNS = (IDENTITY, SCENE, "clip_i", "clip_t", "dino_i")
STAGE_COLUMNS = (IDENTITY, SCENE, "clip_t", "dino_i", "dino_nearest", "dino_copied")
_CONTROL, _NONE = "easyref-other", "none"
DETAILS = """{groups} held-out groups, half of them crowded (`--groups {each}`), {steps} steps:

{tables}
{said}"""


def details(table: str, run: RunRecord) -> str:
    """All scores of a run of any table but `methods`, and what they show."""
    scores = run.folder / "scores.csv"
    found = TABLES[table].expected(scores, TABLES[table].methods)
    said = [*(verdict.sentence for verdict in found), *TABLES[table].found(scores)]
    if table == "layers":
        all_groups, crowded = (
            markdown_table(run, LAYER_COLUMNS, seconds=not kind, kind=kind, name=layer_name)
            for kind in ("", "crowded")
        )
        tables = f"{all_groups}\nThe crowded ones alone:\n\n{crowded}"
    else:
        names = {"stages": stage_name, "training": partial(training_name, run)}
        tables = markdown_table(run, STAGE_COLUMNS, name=names[table], seconds=table == "stages")
    most = max(row.groups for row in run.scope())
    return DETAILS.format(
        groups=most,
        each=most // 2,
        steps=run.scope()[0].variant["steps"],
        tables=tables,
        said="".join(f"- {sentence}\n" for sentence in said),
    )


def layer_name(row: SummaryRecord) -> str:
    """A line's name in the table of layers."""
    if row.method == _NONE:
        return "no reference"
    count = int(row.variant["references"])
    group = " of another group" if row.method == _CONTROL else ""
    name = layer_findings.NAMES[row.variant["aggregation"]]
    return f"{name}, {count} reference{'s' if count > 1 else ''}{group}"


def stage_name(row: SummaryRecord) -> str:
    """A line's name in the table of stages."""
    if row.method == _NONE:
        return "no reference"
    name = _stage(row)
    return f"{name}, of another group" if row.method == _CONTROL else name


def _stage(row: SummaryRecord) -> str:
    fields = ("weight", "identity", "stages")
    return next(
        name
        for name, line in stage_findings.ROWS.items()
        if all(row.variant[field] == line[field] for field in fields)
    )


def training_name(run: RunRecord, row: SummaryRecord) -> str:
    """A line's name in the table of training."""
    if row.method == _NONE:
        return "no reference"
    adapters = [r.variant["adapter"] for r in run.scope() if r.method == row.method]
    fields = row.variant["adapter"], [*dict.fromkeys(adapters)], row.variant["identity"]
    name = training_findings.name_of(*fields)
    return f"{name}, of another group" if row.method == _CONTROL else name


def short_layers(run: RunRecord) -> str:
    """README's table of layers: identity in %, and CLIP-T x 100."""
    titles = ("1 reference", "4 references", "crowded, 4", "4 of another group", "CLIP-T")
    lines: list[Sequence[str]] = [("identity, %", *titles)]
    for aggregation, name in layer_findings.NAMES.items():
        one = {"method": "easyref", "aggregation": aggregation, "references": 1}
        four = {**one, "references": CONTROL_COUNT}
        identity = (_score(run, fields, IDENTITY) for fields in (one, four))
        crowded = _score(run, four, IDENTITY, "crowded")
        control = _score(run, {**four, "method": _CONTROL}, IDENTITY)
        lines.append((name, *identity, crowded, control, _score(run, four, "clip_t")))
    none = {"method": _NONE}
    alone, crowded = (_score(run, none, IDENTITY, kind) for kind in ("", "crowded"))
    lines.append(("no reference", alone, alone, crowded, alone, _score(run, none, "clip_t")))
    return _markdown(lines)


def short_stages(run: RunRecord) -> str:
    """README's table of stages: shares and CLIP-T x 100, seconds of a step."""
    titles = ("identity", "scene", "CLIP-T", "copied", "another group", "seconds a step")
    lines: list[Sequence[str]] = [("%", *titles)]
    for name, fields in stage_findings.ROWS.items():
        own = {"method": "easyref", **fields}
        columns = (IDENTITY, SCENE, "clip_t", "dino_copied")
        control = _score(run, {**own, "method": _CONTROL}, IDENTITY)
        lines.append((name, *(_score(run, own, c) for c in columns), control, _seconds(run, own)))
    none = {"method": _NONE}
    scores = [_score(run, none, column) for column in (IDENTITY, SCENE, "clip_t")]
    lines.append(("no reference", *scores, "", "", _seconds(run, none)))
    return _markdown(lines)


def layer_lines(run: RunRecord) -> Lines:
    """The lines of the table of layers, with their controls, for a plot."""
    lines = {}
    for count in (1, CONTROL_COUNT):
        for aggregation, name in layer_findings.NAMES.items():
            own = {"method": "easyref", "aggregation": aggregation, "references": count}
            pair = _row(run, own), _row(run, {**own, "method": _CONTROL})
            lines[f"{name}, {count}"] = pair
    return {**lines, "no reference": (_row(run, {"method": _NONE}), None)}


def stage_lines(run: RunRecord) -> Lines:
    """The lines of the table of stages, with their controls, for a plot."""
    own = {name: {"method": "easyref", **fields} for name, fields in stage_findings.ROWS.items()}
    lines = {
        name: (_row(run, fields), _row(run, {**fields, "method": _CONTROL}))
        for name, fields in own.items()
    }
    return {**lines, "no reference": (_row(run, {"method": _NONE}), None)}


def _score(run: RunRecord, wanted: dict[str, object], column: str, kind: str = "") -> str:
    """A mean times 100; empty where there is none."""
    found = _row(run, wanted, kind)
    digits = 1 if column == "clip_t" else 0
    has = found is not None and column in found.scores
    return f"{100 * found.scores[column].value:.{digits}f}" if has else ""


def _seconds(run: RunRecord, wanted: dict[str, object]) -> str:
    found = _row(run, wanted)
    known = found is not None and found.seconds_a_step is not None
    return seconds_text(found.seconds_a_step) if known else ""


def _row(run: RunRecord, wanted: dict[str, object], kind: str = "") -> SummaryRecord | None:
    matches = (
        row
        for row in run.scope("", kind)
        if all(row.variant.get(name) == value for name, value in wanted.items())
    )
    return next(matches, None)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rows = lines
    ruled = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in ruled).replace("|  |", "| |")


SHORT: dict[str, Callable[[RunRecord], str]] = {"layers": short_layers, "stages": short_stages}
"""Table -> what README shows of it."""
LINES: dict[str, Callable[[RunRecord], Lines]] = {"layers": layer_lines, "stages": stage_lines}
"""Table -> what its plot shows."""
TABLE_PLOTTED = {
    "layers": (IDENTITY, "clip_t", ENCODING),
    "stages": (IDENTITY, "clip_t", "dino_nearest", STEP),
}
"""Table -> the columns of its plot."""
