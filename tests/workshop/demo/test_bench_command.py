"""The embedded benchmark, tiny: every method on drawn groups, and what is expected of the table."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection
from transformers import CLIPModel, Dinov2Model

from easyref_core.demo_set import shipped_set
from easyref_core.errors import EasyRefError
from easyref_core.evaluation.read_groups import read_groups
from easyref_core.evaluation.trials import Trial, Variant
from easyref_core.pictures.loading import open_picture
from workshop.demo.bench import clip, dino, ip_adapter
from workshop.demo.bench.command import (
    CLIP,
    DINO,
    IP_ADAPTER,
    BenchOptions,
    arguments,
    prepare,
    report,
    run,
)
from workshop.demo.bench.drawn_groups import GroupOptions, read_facts, write_groups
from workshop.demo.bench.judge import Judge
from workshop.demo.bench.ordering import verdicts
from workshop.demo.stored_weights import load_stored
from workshop.pages.bench_results import identity_table


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that have learned nothing."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    clip.write_tokenizer(folder / CLIP)
    clip.write_clip(CLIPModel(clip.clip_config()), folder / CLIP)
    dino.write_dino(Dinov2Model(dino.dino_config()), folder / DINO)
    unet = load_stored(UNet2DConditionModel, shipped_set() / "unet").requires_grad_(False)
    ip_adapter.attach(unet, ImageProjection(clip.WIDTH, 96, ip_adapter.TOKENS))
    ip_adapter.write_ip_adapter(unet, folder / IP_ADAPTER)
    return folder


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_groups(tmp_path_factory.mktemp("groups"), GroupOptions(1, references=2))


@pytest.mark.slow
def test_every_method_runs_through_easyref_bench_and_a_second_time_changes_nothing(
    models: Path, tmp_path: Path
) -> None:
    options = BenchOptions(tmp_path, models, groups=1, steps=1, counts=(1, 4), lora_steps=1)
    prepare(options)
    run(options)
    report(options)
    scores = (tmp_path / "run" / "scores.csv").read_bytes()
    rows = list(csv.DictReader(scores.decode().splitlines()))
    assert {row["status"] for row in rows} == {"done"}
    made = {(row["method"], row["references"]) for row in rows}
    both = {(m, n) for m in ("easyref", "ip-adapter") for n in "14"}
    several = {(m, "4") for m in ("average", "concatenate", "lora", "lora-other")}
    assert made == both | several | {("none", "0")}
    assert {(row["split"], row["kind"]) for row in rows} == {
        (split, kind) for split in ("held_in", "held_out") for kind in ("character", "crowded")
    }
    assert all(row["identity"] and row["scene"] and row["dino_i"] for row in rows)
    images = sorted((tmp_path / "run" / "images").rglob("*.png"))
    before = [image.stat().st_mtime_ns for image in images]
    prepare(options)
    run(options)
    assert [image.stat().st_mtime_ns for image in images] == before
    assert (tmp_path / "run" / "scores.csv").read_bytes() == scores


def test_groups_show_one_character_and_captions_name_the_scene_only(groups: Path) -> None:
    found = read_groups(groups, notes := [])
    assert notes == []
    facts = read_facts(groups)
    assert {(g.split, g.kind, g.target, len(g.pictures)) for g in found} == {
        (split, kind, 0, 3)
        for split in ("held_in", "held_out")
        for kind in ("character", "crowded")
    }
    for group in found:
        known = facts[group.name]
        assert known["place"] in group.pictures[0].caption
        assert not any(known["colour"] in picture.caption for picture in group.pictures)


def test_groups_are_drawn_once(groups: Path, tmp_path: Path) -> None:
    options = GroupOptions(1, references=2)
    again = write_groups(tmp_path, options)
    names = sorted(path.relative_to(groups) for path in groups.rglob("*.png"))
    assert [(groups / n).read_bytes() for n in names] == [(again / n).read_bytes() for n in names]
    (again / names[0]).unlink()
    write_groups(again, options)
    assert not (again / names[0]).exists()  # kept as it was
    write_groups(again, GroupOptions(1, references=2, seed=1))
    assert (again / names[0]).read_bytes() != (groups / names[0]).read_bytes()


def test_the_judge_sees_a_drawn_targets_character_and_scene(groups: Path) -> None:
    facts = read_facts(groups)
    judge = Judge(facts)
    group = next(g for g in read_groups(groups, []) if g.kind == "character")
    trial = Trial(Variant("none"), "none", "0", group.name, "", "", (), (), "", 0)
    target = open_picture(group.pictures[0].source.path)
    drawn, grey = judge.score([trial, trial], [target, Image.new("RGB", (128, 128), "grey")])
    assert drawn == {"identity": 1.0, "scene": 1.0}
    assert grey["identity"] < 0.7


def write_scores(path: Path, identity: Mapping[str, float]) -> Path:
    """Two held-out groups, all methods at 4 references; a held-in group says the opposite."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "references", "group", "split", "identity"])
        for method, score in identity.items():
            for group in ("a", "b"):
                writer.writerow([method, 4, group, "held_out", score])
            writer.writerow([method, 4, "c", "held_in", 1 - score])
    return path


GOOD = {"easyref": 0.8, "average": 0.6, "concatenate": 0.8, "ip-adapter": 0.5} | {
    "lora": 0.7,
    "lora-other": 0.3,
    "none": 0.3,
}


def test_the_papers_ordering_holds(tmp_path: Path) -> None:
    found = verdicts(write_scores(tmp_path / "scores.csv", GOOD), list(GOOD))
    assert len(found) == 6
    assert all(verdict.holds for verdict in found)
    assert "+20.0 points" in found[0].sentence


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({"average": 0.9}, "average on held-out identity"),
        ({"lora-other": 0.7}, "a LoRA of the group > a LoRA of another group"),
        ({"none": 0.8}, "EasyRef > no reference"),
    ],
)
def test_what_does_not_hold_is_said(tmp_path: Path, change: dict[str, float], broken: str) -> None:
    found = verdicts(write_scores(tmp_path / "scores.csv", GOOD | change), list(GOOD))
    said = [verdict.sentence for verdict in found if not verdict.holds]
    assert len(said) == 1
    assert said[0].startswith("DOES NOT HOLD")
    assert broken in said[0]


def test_methods_that_were_not_run_are_not_judged(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "scores.csv", {"easyref": 0.8, "none": 0.3})
    assert [v.claim for v in verdicts(path, ["easyref", "none"])] == ["EasyRef > no reference"]


def test_the_readmes_table_has_a_row_a_method_and_marks_the_best() -> None:
    def row(method: str, references: int, value: float) -> SimpleNamespace:
        scores = {"identity": SimpleNamespace(value=value)}
        return SimpleNamespace(variant={"method": method, "references": references}, scores=scores)

    rows = [row("easyref", 1, 0.5), row("easyref", 4, 0.81), row("lora", 4, 0.7)]
    run: Any = SimpleNamespace(scope=lambda split: [*rows, row("none", 0, 0.2)])
    assert identity_table(run).splitlines() == [
        "| references | 1 | 4 |",
        "| --- | ---: | ---: |",
        "| EasyRef | **50** | **81** |",
        "| LoRA of the group | | 70 |",
        "| no reference | 20 | 20 |",
    ]


def test_missing_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(EasyRefError, match="bench-models"):
        prepare(BenchOptions(tmp_path / "out", models=tmp_path / "models"))


def test_processes_get_the_same_options() -> None:
    given = {"out": Path("runs/x"), "lora_steps": 3, "counts": (1, 2), "overwrite": False}
    assert arguments(given) == ["--out", "runs/x", "--lora-steps", "3", "--counts", "1", "2"]
    assert arguments({"overwrite": True}) == ["--overwrite"]
