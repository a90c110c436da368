"""`easyref bench` on a tiny SDXL in its real layout, with its options and exit status."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bench_fakes import make_groups, picture, snapshot
from score_models import write_clip
from sdxl_directory import write_sdxl_directory

from easyref_core.cli import main
from easyref_core.evaluation import options, run
from easyref_core.evaluation.methods import METHODS
from easyref_core.evaluation.protocols import PRESETS
from easyref_core.evaluation.settings import BenchSettings, make_bench_settings
from workshop.demo.tiny import write_tiny_set

Capture = pytest.CaptureFixture[str]


@dataclass(frozen=True)
class Models:
    base: Path
    mllm: Path
    adapter: Path
    clip: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    pytest.importorskip("peft")
    root = tmp_path_factory.mktemp("models")
    tiny = write_tiny_set(root / "tiny")
    base = write_sdxl_directory(root / "base", tiny)
    return Models(base, tiny / "mllm", tiny / "easyref.safetensors", write_clip(root / "clip"))


@pytest.fixture
def groups(tmp_path: Path) -> Path:
    folder = make_groups(tmp_path / "groups", {"held_in/a": 3, "held_out/b": 3})
    for path in folder.rglob("*.png"):
        picture(path, len(path.parts) + int(path.stem), side=64)
    return folder


def command(groups: Path, models: Models, *more: object) -> list[str]:
    given = {"--groups": groups, "--base": models.base, "--adapter": models.adapter}
    given |= {"--mllm": models.mllm, "--clip": models.clip, "--dino": "nowhere/dino"}
    given |= {"--out": groups.parent / "run", "--steps": 2, "--size": 64, "--device": "cpu"}
    flat = [str(part) for option in given.items() for part in option]
    return ["bench", "--offline", *flat, *map(str, more)]


@pytest.mark.slow
def test_a_run_on_a_tiny_sdxl(groups: Path, models: Models, capsys: Capture) -> None:
    arguments = command(groups, models, "--vary", "weight=0.5,1")
    assert main(arguments) == 0
    printed = capsys.readouterr()
    out = groups.parent / "run"
    with (out / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (3 * 2 + 1)  # the plain model knows no weight
    assert {row["status"] for row in rows} == {"done"}
    assert all(-1 <= float(row["clip_i"]) <= 1 for row in rows)
    lines = printed.out.splitlines()
    assert lines[0].split()[:2] == ["images", "CLIP-I"]
    assert [line.partition(",")[0].split()[0] for line in lines[1:8]] == [
        *["easyref"] * 2,
        *["average"] * 2,
        *["concatenate"] * 2,
        "none",
    ]
    assert "easyref: ip-adapter is left out: it needs --ip-adapter" in printed.err
    assert "DINO-I is left out" in printed.err
    assert len({path.read_bytes() for path in out.glob("images/*/a/0.png")}) == 7
    before = snapshot(out)
    assert main(arguments) == 0
    assert snapshot(out) == before


def test_an_image_that_cannot_be_made_is_a_note_and_the_status_is_zero(
    groups: Path, models: Models, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_results(monkeypatch, done=3, failed=1)
    assert main(command(groups, models)) == 0
    assert "easyref: 1 image failed" in capsys.readouterr().err


def test_where_no_image_could_be_made_the_status_is_one(
    groups: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_results(monkeypatch, done=0, failed=4)
    assert main(command(groups, models)) == 1


def _with_results(monkeypatch: pytest.MonkeyPatch, done: int, failed: int) -> None:
    found = run.BenchSummary(Path("run"), done, failed, (f"{failed} image failed\n",), "table")
    monkeypatch.setattr(run, "run_bench", lambda settings, **more: found)


def test_a_key_press_says_how_to_go_on(
    groups: Path, models: Models, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_bench", interrupted)
    assert main(command(groups, models)) == 130
    assert "interrupted; the same command goes on from here" in capsys.readouterr().err


def test_options_become_settings(
    groups: Path, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[BenchSettings] = []
    monkeypatch.setattr(run, "run_bench", lambda settings, **more: seen.append(settings))
    more = ("--method", "lora", "--method", "none", "--protocol", "group-size", "--images", "3")
    more += ("--vary", "references=1,2", "--vary", "adapter=a,b", "--seed", "7", "--overwrite")
    assert main(command(groups, models, *more)) == 0
    (settings,) = seen
    assert (settings.methods, settings.protocol) == (("lora", "none"), "group-size")
    assert (settings.images, settings.seed, settings.steps, settings.size) == (3, 7, 2, 64)
    assert settings.vary.references == (1, 2)
    assert [Path(name).name for name in settings.vary.adapter] == ["a", "b"]
    assert (settings.weight, settings.references, settings.offline) == (1.0, None, True)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--weight", "99"), "weight is 99.0; it must be 10 or less."),
        (("--weight", "nan"), "weight is nan; it must be"),
        (("--steps", "0"), "steps is 0; it must be above 0."),
        (("--size", "100"), "size is 100; it must be a multiple of 8."),
        (("--dtype", "int8"), "dtype is 'int8'; it can be 'float32', 'bfloat16' or 'float16'."),
        (("--seed", "-1"), "seed is -1; it must be 0 or more."),
        (("--vary", "wieght=1"), "--vary cannot be used as 'wieght=1'. Write --vary KEY=VALUE"),
        (("--vary", "weight=1", "--vary", "weight=2"), "--vary is given twice."),
        (("--vary", "weight=a"), "vary.weight must be of type float, not 'a'."),
        (("--vary", "weight="), "--vary cannot be used as 'weight='."),
        (("--device", "cuda:1000"), "The device 'cuda:1000' cannot be used"),
        (("--groups", "/nowhere"), "There is neither a folder nor a file '/nowhere'."),
        (("--groups", ""), "Name groups of pictures with --groups."),
        (("--base", ""), "name SDXL with --base."),
    ],
)
def test_options_that_cannot_be_used_are_refused(
    groups: Path, models: Models, capsys: Capture, more: tuple[str, ...], said: str
) -> None:
    assert main(command(groups, models, *more)) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_the_options_know_all_methods_and_protocols() -> None:
    assert options.METHODS == METHODS
    assert options.PROTOCOLS.keys() == PRESETS.keys()
    for name in PRESETS:
        settings = make_bench_settings({"groups": "a", "out": "b", "protocol": name})
        assert (settings.protocol, settings.methods) == (name, ())
    every = make_bench_settings({"groups": "a", "out": "b", "methods": list(METHODS)})
    assert every.methods == METHODS


def test_help_explains_every_option(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name in (*PRESETS, *METHODS):
        assert name in text
