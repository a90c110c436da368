"""The demo's tables but that of methods: what they generate, and what is said of the scores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from bench_fakes import bench
from PIL import Image

from easyref_core.errors import EasyRefError
from easyref_core.evaluation.metrics import Column
from easyref_core.evaluation.page.record import read_run
from easyref_core.evaluation.statistics import Estimate
from easyref_core.evaluation.trials import Trial, Variant
from workshop.demo.bench.command import BenchOptions, bench_settings
from workshop.demo.bench.drawn_groups import GroupOptions, write_groups
from workshop.demo.bench.findings import ChanceVerdict, Finding
from workshop.demo.bench.tables import TABLES
from workshop.pages import bench_results
from workshop.pages.bench_tables import SHORT, details

PARTS = ("tokens", "tokens and identity")
COLUMNS = ("identity", "scene", "clip_i", "clip_t", "dino_i", "dino_nearest", "dino_copied")


class MadeUpScores:
    """Identity is 0.2 for a wrong group and for none, else 0.6, more with pools and with identity,
    0.05 less where both were trained at once; of crowded groups 0.1 less. All other scores are 0.5.
    """

    columns = tuple(Column(name, name.upper(), "share") for name in COLUMNS)

    def identity(self) -> dict[str, Any]:
        return {"name": "made up"}

    def score(
        self, trials: Sequence[Trial], images: Sequence[Image.Image]
    ) -> list[dict[str, float]]:
        return [dict.fromkeys(COLUMNS, 0.5) | {"identity": _identity(trial)} for trial in trials]


def _identity(trial: Trial) -> float:
    variant = trial.variant
    if variant.method != "easyref":
        return 0.2
    pools = {"easyref": 0.0, "lap": 0.2, "dla": 0.1}[variant.aggregation]
    pools -= 0.05 * (Path(variant.adapter).stem == "one")
    return 0.6 + pools + 0.1 * variant.identity - 0.1 * (trial.kind == "crowded")


def made_up(table: str, folder: Path) -> Path:
    """A table's run without models; returns its folder."""
    names = {"layers": ("last", "lap", "dla"), "training": ("two", "one")}.get(table, ())
    files = {name: folder / f"{name}.safetensors" for name in names}
    for file in files.values():
        file.touch()
    given = tuple(f"{name}={file}" for name, file in files.items())
    options = BenchOptions(folder, table=table, adapters=given)
    chosen = GroupOptions(1, references=4, side=32, splits=TABLES[table].splits)
    write_groups(folder / "groups", chosen)
    bench(
        bench_settings(options),
        metrics=[MadeUpScores()],
        keep=partial(TABLES[table].keep, options),
    )
    return folder / "run"


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up("layers", tmp_path_factory.mktemp("layers"))


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up("stages", tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up("training", tmp_path_factory.mktemp("training"))


def test_each_adapter_is_read_by_its_own_aggregation(layers: Path) -> None:
    run = read_run(layers)
    made = {
        (row.method, row.variant["aggregation"], Path(row.variant["adapter"]).stem)
        for row in run.scope()
        if row.method != "none"
    }
    pairs = (("easyref", "last"), ("lap", "lap"), ("dla", "dla"))
    assert made == {(m, *pair) for m in ("easyref", "easyref-other") for pair in pairs}
    assert len(run.scope()) == 3 * 2 + 3 + 1
    assert {trial.split for trial in run.trials} == {"held_out"}


def test_what_layers_show_is_said_with_numbers(layers: Path) -> None:
    table = TABLES["layers"]
    expected = table.expected(layers / "scores.csv", table.methods)
    assert len(expected) == 6
    assert all(verdict.holds for verdict in expected)
    assert table.expected(layers / "scores.csv", ("easyref", "none")) == [], "no controls were run"
    said = table.found(layers / "scores.csv")
    assert "shows: one pool above two on identity (+10.0 points" in said[2]
    assert said[2].endswith("in the paper: DINO-I .752, .748")
    assert said[3].startswith("does not show at this size: two pools above one on the prompt (+0.0")
    assert "of four (+10.0 points" in said[-2]


def test_the_readmes_table_of_layers_has_a_line_for_each_aggregation(layers: Path) -> None:
    lines = SHORT["layers"](read_run(layers)).splitlines()
    assert lines[2:] == [
        "| last layer | 55 | 55 | 50 | 20 | 50.0 |",
        "| one pool (LAP) | 75 | 75 | 70 | 20 | 50.0 |",
        "| two pools (DLA) | 65 | 65 | 60 | 20 | 50.0 |",
        "| no reference | 20 | 20 | 20 | 20 | 50.0 |",
    ]


def test_stages_are_compared_with_a_wrong_group_each(stages: Path) -> None:
    run = read_run(stages)
    made = [
        tuple(row.variant[name] for name in ("weight", "identity", "stages"))
        for row in run.scope()
        if row.method == "easyref"
    ]
    assert set(made) == {
        (1.0, 0.0, ""),
        (1.0, 0.5, ""),
        (1.0, 1.0, ""),
        (1.0, 1.0, "late"),
        (1.0, 1.0, "noise"),
        (1.0, 1.0, "steps"),
        (0.0, 1.0, ""),
    }
    assert len(run.scope()) == 2 * len(made) + 1 == 15
    lines = SHORT["stages"](run).splitlines()
    assert lines[2:4] == [
        "| tokens | 65 | 50 | 50.0 | 50 | 20 | 0.03 |",
        "| tokens, half identity | 70 | 50 | 50.0 | 50 | 20 | 0.03 |",
    ]


def test_what_stages_show_is_said_with_numbers(stages: Path) -> None:
    said = details("stages", read_run(stages))
    assert "- shows: identity beside tokens adds identity (+10.0 points" in said
    assert "- holds: tokens: own group > another group on identity (+45.0 points" in said
    assert "- does not show at this size: stages at the same noise copy less" in said
    assert "| stages, same noise, of another group | 0.200" in said
    assert "| seconds an image | of encoding | a step |" in said


def test_both_ways_of_training_are_compared_with_and_without_identity(training: Path) -> None:
    said = details("training", read_run(training))
    lines = [line.split(" | ")[0] for line in said.splitlines() if line.startswith("| ")]
    names = [f"{way}, {part}" for way in ("two stages", "one stage") for part in PARTS]
    assert lines[2:-1] == [
        f"| {name}{control}" for control in ("", ", of another group") for name in names
    ]
    assert "- holds: one stage, tokens: own group > another group on identity (+40.0" in said
    assert "- shows: two stages above one on identity, tokens (+5.0 points" in said
    assert "- does not show at this size: two stages above one on the prompt, tokens (+0.0" in said


def test_documents_get_the_tables_of_a_run_in_their_places(
    layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    documents = [tmp_path / "README.md", tmp_path / "docs" / "benchmark.md"]
    for document in documents:
        marks = (f"<!-- {end}bench layers -->\n" for end in ("", "end "))
        document.write_text("before\n" + "".join(marks) + "after\n")
    monkeypatch.setattr(bench_results, "ROOT", tmp_path)
    bench_results.write_table("layers", layers)
    first = [document.read_text() for document in documents]
    assert all(text.startswith("before\n<!-- bench layers -->\n") for text in first)
    assert all(text.endswith("<!-- end bench layers -->\nafter\n") for text in first)
    assert "| one pool (LAP) | 75 |" in first[0]
    assert "- shows: one pool above two on identity" in first[1]
    plot = (tmp_path / "docs" / "bench_layers.png").read_bytes()
    bench_results.write_table("layers", layers)
    assert [document.read_text() for document in documents] == first
    assert (tmp_path / "docs" / "bench_layers.png").read_bytes() == plot


def test_an_effect_within_chance_and_its_opposite_are_told_apart() -> None:
    assert Finding("a", Estimate(0.02, -0.03, 0.05, 9)).sentence == (
        "does not show at this size: a (+2.0 points, 95% interval -3.0 to +5.0)"
    )
    assert Finding("a", Estimate(-0.02, -0.03, -0.01, 9)).sentence.startswith("THE OPPOSITE shows")
    assert Finding("a", None, "b").sentence == "not measured: a; in the paper: b"


def test_a_control_may_lie_above_chance_within_its_interval_only() -> None:
    assert ChanceVerdict("tokens", Estimate(0.02, -0.03, 0.05, 9)).holds
    assert not ChanceVerdict("tokens", Estimate(0.04, 0.01, 0.08, 9)).holds
    assert ChanceVerdict("tokens", Estimate(-0.1, -0.2, -0.05, 9)).holds
    assert not ChanceVerdict("tokens", None).holds


def test_adapters_that_are_missing_or_unknown_are_named(tmp_path: Path) -> None:
    def settings(*given: str) -> Any:
        return bench_settings(BenchOptions(tmp_path, table="layers", adapters=given))

    with pytest.raises(EasyRefError, match="trained as 'last': --adapters last=FILE"):
        settings(f"last={tmp_path / 'nothing'}")
    with pytest.raises(EasyRefError, match=r"'first'\. Write NAME=FILE for each of last, lap, dla"):
        settings("first=a.safetensors")
    of_stages = BenchOptions(tmp_path, table="stages", adapters=("lap=a.safetensors",))
    with pytest.raises(EasyRefError, match=r"'lap'\. Write NAME=FILE for each of dla"):
        bench_settings(of_stages)


def test_all_lines_but_controls_are_made_at_each_number_of_references() -> None:
    kept = partial(TABLES["methods"].keep, BenchOptions(Path()))
    assert not kept(Variant("average", references=1))
    assert not kept(Variant("lora", references=8))
    assert kept(Variant("lora", references=4))
