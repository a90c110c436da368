"""The command `check` from end to end on untrained models, and its errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from easyref_core.errors import EasyRefError
from workshop.demo.__main__ import main
from workshop.demo.dataset.characters import ATTRIBUTES
from workshop.demo.dataset.files import DatasetOptions, draw_group, write_dataset
from workshop.demo.evaluation import command
from workshop.demo.evaluation.classifier import (
    CLASSIFIER_FILE,
    Classifier,
    load_classifier,
    save_classifier,
)
from workshop.demo.evaluation.conditions import CheckOptions, run_check
from workshop.demo.evaluation.groups import Group, read_outlines, read_split, strangers
from workshop.demo.evaluation.processes import SharedCheck
from workshop.demo.evaluation.table import has_scores, is_table
from workshop.demo.evaluation.table_rows import OUTLINE
from workshop.demo.models import DemoModels
from workshop.demo.rows import SamplingSettings
from workshop.demo.tiny import write_tiny_set

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untrained set with an untrained classifier."""
    directory = write_tiny_set(tmp_path_factory.mktemp("check") / "set")
    torch.manual_seed(0)
    save_classifier(Classifier(), directory / CLASSIFIER_FILE)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = DatasetOptions(groups=5, held_out_groups=10)
    return write_dataset(tmp_path_factory.mktemp("drawn") / "set", options, workers=1)


def test_untrained_models_miss_bars(models: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "check.json"
    options = ["--set", str(models), "--identities", "2", "--steps", "1", "--device", "cpu"]
    scores = tmp_path / "new" / "scores.csv"
    assert main(["check", *options, "--out", str(out), "--scores", str(scores)]) == 1
    printed = capsys.readouterr()
    assert "identity, 4 references" in printed.out
    assert "bars missed: identities judged; " in printed.out
    assert "drawing 5 held-out groups" in printed.err
    for written, option in ((out, "--out"), (scores, "--scores")):
        assert main(["check", *options, option, str(written)]) == 2
        assert f"{written.name} exists. Choose another name" in capsys.readouterr().err
    assert is_table(out)
    assert has_scores(scores)
    report = json.loads(out.read_text(encoding="utf-8"))
    assert (report["met"], report["split"], report["settings"]["steps"]) == (False, "held_out", 1)
    assert report["device"] == "cpu"
    assert report["precision"] == DemoModels(models).precision
    assert report["mllm_precision"] == "fp32"
    assert "seed" not in report["settings"]
    groups = {row["measure"]: row["found"]["count"] for row in report["rows"] if row["found"]}
    assert (groups["judge: colour"], groups["judge: style ground"]) == (4, 1)
    lines = scores.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "condition,attribute,group,score"
    assert sum(line.startswith("easyref,colour,") for line in lines) == 2
    assert {row["measure"] for row in report["rows"] if row["found"]} >= {
        "judge: colour",
        "  crowded: joint less averaged",
        "style: pattern and palette",
        "prompt only: all that it names",
        "prompt only, style: shape",
        "outline, ControlNet alone",
    }


def test_each_condition_samples_images_of_its_own(
    models: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mean_levels(
        self: Classifier, pixels: torch.Tensor, facts: object
    ) -> dict[str, list[float]]:
        return {"level": pixels.float().mean((1, 2, 3)).tolist()}

    monkeypatch.setattr(Classifier, "scores", mean_levels)
    adapter = models / "easyref.safetensors"
    settings = SamplingSettings(steps=1)
    options = CheckOptions(settings, {"averaging": adapter, "stage1": adapter}, models / "mllm")
    reported: list[str] = []
    loaded = DemoModels(models, half=False)
    results = run_check(loaded, Classifier(), read_split(data).first(2), options, reported.append)
    levels = {name: tuple(scores["level"]) for name, scores in results.items()}
    # The set's own adapter under both names: encoded together, and averaged.
    same = [
        {"easyref", "weight 1", "stage1 easyref"},
        {"crowded 4", "stage1 crowded 4"},
        {"crowded average", "averaging crowded 4"},
        {"wrong", "wrong own"},
    ]
    for names in same:
        assert len({levels[name] for name in names}) == 1
    assert len(set(levels.values())) == len(levels) - sum(len(names) - 1 for names in same)
    assert all(len(set(pair)) == 2 for name, pair in levels.items() if "style" not in name)
    assert "crowded, 1 reference: 2 pictures" in reported


def test_the_mllm_is_measured_in_the_precision_asked_for(
    models: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    used: list[set[torch.dtype]] = []
    load = DemoModels.adapter

    def noted(*given: Any, **options: Any) -> Any:
        adapter = load(*given, **options)
        used.append({weight.dtype for weight in adapter.encoder.parameters()})
        return adapter

    def stop(*_: Any, **__: Any) -> None:
        raise EasyRefError("Enough.")

    monkeypatch.setattr(command, "processes_for", lambda device: 1)
    monkeypatch.setattr(DemoModels, "adapter", noted)
    monkeypatch.setattr(DemoModels, "sample", stop)
    options = ["--set", str(models), "--data", str(data), "--identities", "2", "--device", "cpu"]
    for precision, wanted in (
        ("fp32", {torch.float32}),
        ("int8", {torch.float32, torch.int8}),
    ):
        assert main(["check", *options, "--precision", precision]) == 2
        assert capsys.readouterr().err.endswith("demo: Enough.\n")
        assert used == [wanted] * 2  # once to try the file, once to sample
        used.clear()


def test_several_processes_give_the_scores_of_one(models: Path, data: Path) -> None:
    adapter, judge = models / "easyref.safetensors", models / CLASSIFIER_FILE
    options = CheckOptions(SamplingSettings(steps=1), {"averaging": adapter}, models / "mllm")
    split = read_split(data).first(2)
    alone = run_check(DemoModels(models), load_classifier(judge), split, options, print)
    shared = SharedCheck(models, judge, split, options, print).run(2)
    assert shared.keys() == alone.keys()
    for name, scores in alone.items():
        assert shared[name].keys() == scores.keys()
        assert shared[name].get(OUTLINE) == pytest.approx(scores.get(OUTLINE), abs=0.01)


def test_errors_end_with_status_2(
    models: Path, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    notes = tmp_path / "notes"
    notes.write_text("mine\n")
    own = str(models / "set.json")
    for options, message in (
        (["--set", str(models), "--out", str(notes), "--overwrite"], "holds something else than"),
        (["--set", str(models), "--scores", str(notes), "--overwrite"], "holds something else"),
        (["--set", str(models), "--out", own, "--overwrite"], "which is read"),
        (["--set", str(tmp_path)], "not a demo model set"),
        (["--set", str(models), "--judge", str(tmp_path / "j")], "no weight file"),
        (["--set", str(models), "--data", str(tmp_path)], "held_out.json"),
        (["--set", str(models), "--data", str(data), "--identities", "1"], "--identities is 1"),
        (["--set", str(models), "--steps", "0"], "--steps is 0"),
        (["--set", str(models), "--steps", "1000"], "1 to 999"),
        (["--set", str(models), "--cfg", "nan"], "--cfg is nan"),
        (["--set", str(models), "--split", "all"], "no split 'all'"),
        (["--set", str(models), "--split", "training"], "needs --data"),
        (["--set", str(models), "--compare", "stage9=x"], "stage1, stage2, scratch, averaging"),
        (["--set", str(models), "--compare", "stage1"], "write NAME=FILE"),
        (["--set", str(models), "--device", "abacus"], "'abacus' cannot be used"),
        (["--set", str(models), "--data", str(data)], "4 identity groups; 160 identities need 160"),
        (["--set", str(models), "--out", str(tmp_path)], "Is a directory"),
        (["--set", str(models), "--scores", str(models / "set.json" / "x")], "cannot be written"),
    ):
        assert main(["check", *options]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("demo: ")
    assert notes.read_text() == "mine\n"


def test_an_unexpected_exception_is_not_a_missed_bar(
    models: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr("workshop.demo.evaluation.command.load_classifier", fail)
    assert main(["check", "--set", str(models), "--device", "cpu"]) == 2
    assert "ZeroDivisionError: surprise" in capsys.readouterr().err


def test_nothing_was_chosen_by_the_evaluated_characters_and_some_are_in_no_earlier_table(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[DatasetOptions] = []

    def stop(folder: Path, options: DatasetOptions) -> None:
        drawn.append(options)
        raise EasyRefError("stop")

    def identities(options: DatasetOptions, first: int, count: int) -> set[tuple[str, ...]]:
        small = replace(options, pictures=2, side=32)
        numbers = [n for n in range(first, first + count) if n % 5 < 2]
        facts = [draw_group(small, "held_out", n)[1][0].facts for n in numbers]
        return {tuple(of_group[name] for name in ATTRIBUTES) for of_group in facts}

    monkeypatch.setattr("workshop.demo.evaluation.command.write_dataset", stop)
    assert main(["check", "--set", str(models), "--device", "cpu"]) == 2
    (options,) = drawn
    evaluated = identities(options, options.first_held_out, options.held_out_groups)
    known = identities(DatasetOptions(), 0, 1200)  # while the recipes were developed, and later
    assert (len(evaluated), len(known)) == (160, 480)
    assert evaluated.isdisjoint(known)
    assert len(evaluated - identities(DatasetOptions(), 1200, 400)) == 50


@pytest.mark.parametrize(
    "file", ["text_encoders/clip_l/model.safetensors", "vae/diffusion_pytorch_model.safetensors"]
)
def test_a_damaged_part_is_named(models: Path, tmp_path: Path, capsys: Capture, file: str) -> None:
    damaged = tmp_path / "set"
    shutil.copytree(models, damaged)
    (damaged / file).write_text("version https://git-lfs.github.com/spec/v1", encoding="utf-8")
    assert main(["check", "--set", str(damaged)]) == 2
    assert f"{file.split('/')[0]} of the model set" in capsys.readouterr().err


def test_all_drawn_images_are_read_before_any_is_sampled(
    models: Path, data: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DemoModels, "sample", lambda *_, **__: pytest.fail("sampled"))
    drawn = tmp_path / "drawn"
    shutil.copytree(data, drawn)
    for name, message in (
        ("held_out/00002_1.png", "There is no picture"),  # a crowded group's reference
        ("held_out/00004_0_outline.png", "There is no outline"),
    ):
        (drawn / name).rename(tmp_path / "moved.png")
        options = ["--set", str(models), "--data", str(drawn), "--identities", "2"]
        assert main(["check", *options]) == 2
        assert message in capsys.readouterr().err
        (tmp_path / "moved.png").rename(drawn / name)


def test_the_first_groups_of_each_kind_are_used(data: Path) -> None:
    chosen = read_split(data).first(3)
    kinds = [group.kind for group in chosen.groups]
    assert kinds == ["identity"] * 3 + ["crowded"] * 3 + ["style"] * 2
    for group in chosen.groups:
        assert group.facts == chosen.facts[group.target]
        alone = len(group.alone)
        assert alone == (1 if group.kind == "crowded" else 5)
    assert read_outlines(chosen.groups[:2], 128).shape == (2, 3, 128, 128)
    with pytest.raises(EasyRefError, match="--side 64"):
        read_outlines(chosen.groups[:2], 64)
    training = read_split(data, "training").first(2)
    assert not {g.target for g in training.groups} & {g.target for g in chosen.groups}


def test_groups_that_are_too_few_or_too_small_are_refused(data: Path) -> None:
    split = read_split(data)
    with pytest.raises(EasyRefError, match=r"4 identity groups.* need 5\. Draw 15 groups"):
        split.first(5)
    with pytest.raises(EasyRefError, match="0 style groups"):
        replace(split, groups=[g for g in split.groups if g.kind != "style"]).first(3)
    short = [replace(group, references=group.references[:3]) for group in split.groups]
    with pytest.raises(EasyRefError, match="3 references; 4 are needed"):
        replace(split, groups=short).first(3)


def test_each_groups_references_are_used_once_as_wrong_ones_and_differ_most(data: Path) -> None:
    groups = read_split(data).of_kind("identity")
    others = strangers(groups)
    assert sorted(other.number for other in others) == sorted(group.number for group in groups)
    assert all(group is not other for group, other in zip(groups, others, strict=True))

    def shared(order: Sequence[Group]) -> int:
        pairs = zip(groups, order, strict=True)
        return sum(one.facts[name] == two.facts[name] for one, two in pairs for name in ATTRIBUTES)

    assert shared(others) == min(
        shared(order)
        for order in permutations(groups)
        if all(group is not other for group, other in zip(groups, order, strict=True))
    )


def test_a_folder_that_was_not_drawn_is_refused(tmp_path: Path) -> None:
    (tmp_path / "held_out.json").write_text('[{"text": ["x"]}]')
    (tmp_path / "facts.json").write_text("{}")
    with pytest.raises(EasyRefError, match="not drawn by"):
        read_split(tmp_path)
    (tmp_path / "facts.json").write_text("{")
    with pytest.raises(EasyRefError, match="not JSON"):
        read_split(tmp_path)
