"""Write the tables and the plot of the embedded benchmark from a run of `make bench-demo`.

    python -m workshop.pages.bench_results [RUN]

README.md              identity by number of references, and whether the expected ordering holds
docs/benchmark.md      all scores of held-out groups
docs/bench_curves.png  scores against the number of references
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from easyref_core.evaluation.page.document import markdown_table, save_plot
from easyref_core.evaluation.page.record import RunRecord, read_run
from workshop.demo.bench.command import METHODS, OUT
from workshop.demo.bench.judge import IDENTITY
from workshop.demo.bench.ordering import verdicts

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
BEGIN, END = "<!-- bench -->\n", "<!-- end bench -->\n"
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


def replace(document: Path, text: str) -> None:
    """Put text between the document's marks."""
    before, rest = document.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    document.write_text(f"{before}{BEGIN}{text}{END}{after}", encoding="utf-8")


def main(arguments: Sequence[str]) -> None:
    folder = Path(arguments[0]) if arguments else OUT / "run"
    run = read_run(folder)
    found = verdicts(folder / "scores.csv", METHODS)
    said = "".join(f"- {verdict.sentence}\n" for verdict in found)
    groups = max(row.groups for row in run.scope("held_out"))
    replace(ROOT / "README.md", README.format(table=identity_table(run), groups=groups))
    # Without seconds, which depend on what else the computer does.
    table = markdown_table(run, COLUMNS, "held_out", seconds=False)
    replace(
        ROOT / "docs" / "benchmark.md",
        DETAILS.format(table=table, said=said, groups=groups, each=groups // 2),
    )
    plot = ROOT / "docs" / "bench_curves.png"
    save_plot(run, plot, columns=PLOTTED, split="held_out", seconds=False)


if __name__ == "__main__":
    main(sys.argv[1:])
