"""Write the tables and the plot of the embedded benchmark from the runs that are there.

    python -m workshop.pages.bench_results [TABLE ...]

README.md              of each table of `python -m workshop.demo bench` the main scores
docs/benchmark.md      all scores of held-out groups, and what of the expected holds
docs/bench_curves.png  scores against the number of references
docs/bench_layers.png, docs/bench_stages.png  scores of each line, and of its control
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from easyref_core.evaluation.page.document import markdown_table, save_plot
from easyref_core.evaluation.page.record import RunRecord, read_run
from workshop.demo.bench.judge import IDENTITY
from workshop.demo.bench.ordering import verdicts
from workshop.demo.bench.tables import TABLES
from workshop.pages.bench_plot import save_dots
from workshop.pages.bench_tables import LINES, SHORT, TABLE_PLOTTED, details

ROOT = Path(__file__).resolve().parents[2]
README = """`make bench-demo` compares them on the small [demo models](docs/demo.md): the share of a
held-out character's attributes that an image shows, in %, by the number of references
({groups} groups). The IP-Adapter and the LoRAs there are
[under-trained](docs/benchmark.md#its-models), no measure of real ones:

{table}
![Scores against the number of references](docs/bench_curves.png)
"""
DETAILS = """On {groups} held-out groups (`--groups {each}`), written by
`python -m workshop.pages.bench_results`:

{table}
{said}
![Scores against the number of references](bench_curves.png)
"""
LAYERS = """The MLLM's last layer against pools over all of its layers, in % of a held-out
character's attributes ({groups} groups):

{table}
![Identity and prompt by layers](docs/bench_layers.png)

Filled: the group's own references; hollow: another group's.
"""
STAGES = """Reference tokens, identity (self-attention that also reads the references' latents), and
both in stages of the sampling, in % ({groups} groups, 4 references):

{table}
![Identity, prompt, nearest reference and seconds by stages](docs/bench_stages.png)

Filled: the group's own references; hollow: another group's.
"""
MARKS = {
    "methods": "bench",
    "layers": "bench layers",
    "stages": "bench stages",
    "training": "bench training",
}
"""Table -> what its place in documents is called."""
COLUMNS = (IDENTITY, "scene", "clip_i", "clip_t", "dino_i")
PLOTTED = (IDENTITY, "clip_i", "dino_i")
NAMES = {
    "easyref": "EasyRef",
    "ip-adapter": "IP-Adapter, embeddings averaged",
    "lora": "LoRA of the group",
    "lora-other": "LoRA of another group",
    "none": "no reference",
}


def identity_table(run: RunRecord, split: str = "held_out") -> str:
    """Methods by numbers of references: % of a character's attributes, the best of each bold."""
    found: dict[str, dict[int, float]] = {}
    for row in run.scope(split):
        if IDENTITY in row.scores:
            count = int(row.variant.get("references", 0))
            found.setdefault(row.variant["method"], {})[count] = 100 * row.scores[IDENTITY].value
    counts = sorted({count for values in found.values() for count in values if count})
    best = {count: max(v.get(count, 0.0) for v in found.values()) for count in counts}
    lines: list[Sequence[str]] = [("references", *map(str, counts))]
    lines.append(["---", *["---:"] * len(counts)])
    for method, values in found.items():
        cells = []
        for count in counts:
            value = values.get(count, values.get(0))  # 0: whatever their number
            text = "" if value is None else f"{value:.0f}"
            cells.append(f"**{text}**" if value == best[count] and text else text)
        lines.append((NAMES.get(method, method), *cells))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("|  |", "| |")


def replace(document: Path, mark: str, text: str) -> None:
    """Put text between the document's marks."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- end {mark} -->\n"
    before, rest = document.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    document.write_text(f"{before}{begin}{text}{end}{after}", encoding="utf-8")


def write_methods(folder: Path) -> None:
    """The table of methods, and the plot."""
    run = read_run(folder)
    found = verdicts(folder / "scores.csv", TABLES["methods"].methods)
    said = "".join(f"- {verdict.sentence}\n" for verdict in found)
    groups = max(row.groups for row in run.scope("held_out"))
    short = README.format(table=identity_table(run), groups=groups)
    replace(ROOT / "README.md", MARKS["methods"], short)
    # Without seconds, which depend on what else the computer does.
    table = markdown_table(run, COLUMNS, "held_out", seconds=False)
    text = DETAILS.format(table=table, said=said, groups=groups, each=groups // 2)
    replace(ROOT / "docs" / "benchmark.md", MARKS["methods"], text)
    plot = ROOT / "docs" / "bench_curves.png"
    save_plot(run, plot, columns=PLOTTED, split="held_out", seconds=False)


def write_table(table: str, folder: Path) -> None:
    """Any other table; that of training has neither a short form nor a plot."""
    run = read_run(folder)
    replace(ROOT / "docs" / "benchmark.md", MARKS[table], details(table, run))
    if table == "training":
        return
    groups = max(row.groups for row in run.scope())
    text = {"layers": LAYERS, "stages": STAGES}[table].format(
        table=SHORT[table](run), groups=groups
    )
    replace(ROOT / "README.md", MARKS[table], text)
    plot = ROOT / "docs" / f"bench_{table}.png"
    save_dots(run, plot, LINES[table](run), TABLE_PLOTTED[table])


def main(arguments: Sequence[str]) -> None:
    for name in arguments or TABLES:
        folder = TABLES[name].out / "run"
        if not arguments and not (folder / "results.json").is_file():
            print(f"{name}: there is no run in {folder}, so its tables stay as they are")
        elif name == "methods":
            write_methods(folder)
        else:
            write_table(name, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
