"""Runs the whole corpus and the mutations, and writes their figures into SECURITY.md.

make security-table
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hostile_adapters
import hostile_bench
import hostile_commands
import hostile_links
import hostile_mllms
import hostile_pictures
import hostile_requests
import hostile_tokens
import hostile_training
import test_fuzz
from corpus import Case, check, run
from fork_server import ForkServer, Outcome
from homes import Home, make_home
from sdxl_directory import write_sdxl_directory

from workshop.comfyui.find_comfyui import find_comfyui
from workshop.demo.tiny import write_tiny_set

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "SECURITY.md"
START, END = "<!-- make security-table -->\n", "<!-- end -->\n"

KINDS = {
    "adapter files": hostile_adapters.CASES,
    "saved tokens": hostile_tokens.CASES,
    "MLLM folders": hostile_mllms.CASES,
    "pictures": hostile_pictures.CASES,
    "requests to the routes": hostile_requests.CASES,
    "values over links": hostile_links.CASES,
    "options of `easyref encode`": hostile_commands.CASES,
    "recipes, records, base models": hostile_training.CASES,
    "groups and runs of the benchmark": hostile_bench.CASES,
}
TRAINED = (hostile_training.CASES, hostile_bench.CASES)  # need a server of their own
HEAD = (
    "| what | cases | runs | refused | used | most memory | most computing |",
    "| --- | --- | --- | --- | --- | --- | --- |",
)


def counted() -> dict[str, tuple[int, int]]:
    """Kind -> numbers of its cases and runs."""
    return {
        kind: (len(cases), sum(len(case.ways) for case in cases)) for kind, cases in KINDS.items()
    }


def table(folder: Path) -> Iterator[str]:
    """The lines of the table.

    Raises:
        AssertionError: a case does not end as promised.
    """
    comfyui = find_comfyui()
    assert comfyui is not None, "no ComfyUI: set COMFYUI_PATH"
    yield from HEAD
    arguments = ("--comfyui", str(comfyui), "--base", str(folder / "comfyui"))
    server = ForkServer(folder / "log", *arguments)
    for kind, cases in KINDS.items():
        if cases not in TRAINED:
            yield _row(kind, cases, _outcomes(cases, server, folder))
    server.close()
    sdxl = write_sdxl_directory(folder / "sdxl", write_tiny_set(folder / "tiny"))
    server = ForkServer(folder / "log", "--training")
    cases = hostile_training.CASES
    prepare = partial(hostile_training.make_training_home, sdxl=sdxl)
    yield _row("recipes, records, base models", cases, _outcomes(cases, server, folder, prepare))
    cases, prepare = hostile_bench.CASES, hostile_bench.make_bench_home
    yield _row("groups and runs of the benchmark", cases, _outcomes(cases, server, folder, prepare))
    for target, count in test_fuzz.COUNTS.items():
        home = make_home(folder / target)
        outcome = server.run("fuzz.fuzz", home.base, target, 0, count, seconds=60)
        assert outcome.kind == "done", outcome.text
        assert not outcome.value["failures"], outcome.value["failures"]
        used, refused = outcome.value["used"], outcome.value["refused"]
        numbers = f"{count:,} | {count:,} | {refused:,} | {used:,}"
        figures = f"{outcome.peak:.0f} MB | {outcome.value['slowest']:.1f} s"
        yield f"| mutations of {target} | {numbers} | {figures} |"
    server.close()


def _outcomes(
    cases: tuple[Case, ...],
    server: ForkServer,
    folder: Path,
    prepare: Callable[[Home], Any] | None = None,
) -> list[Outcome]:
    outcomes = []
    for case in cases:
        for way in case.ways:
            home = folder / "home"
            outcome = run(case, way, server, home, prepare)
            try:
                check(case, outcome, home)
            except AssertionError as wrong:
                raise AssertionError(f"{case.name}, by {way}: {wrong}") from None
            outcomes.append(outcome)
            shutil.rmtree(home)
    return outcomes


def _row(kind: str, cases: tuple[Case, ...], outcomes: list[Outcome]) -> str:
    refused = sum(outcome.kind == "refused" for outcome in outcomes)
    memory = max(outcome.peak for outcome in outcomes)
    computing = max(outcome.cpu for outcome in outcomes)
    numbers = f"{len(cases):,} | {len(outcomes):,} | {refused:,} | {len(outcomes) - refused:,}"
    return f"| {kind} | {numbers} | {memory:.0f} MB | {computing:.1f} s |"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for line in table(Path(folder)):
            print(line, flush=True)
            lines.append(line)
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + START + "\n".join(lines) + "\n" + END + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
