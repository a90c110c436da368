"""Groups and run folders that were made to break a benchmark."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from bench_fakes import bench, make_groups, picture, settings_for

from easyref_core.errors import EasyRefError
from easyref_core.evaluation.building.build_groups import BuildOptions, build_groups
from easyref_core.evaluation.building.group_files import folder_names
from easyref_core.evaluation.building.tagged_pictures import Tag
from easyref_core.evaluation.groups import ReferenceGroup
from easyref_core.evaluation.page.write import write_page
from easyref_core.evaluation.planning import _unique
from easyref_core.evaluation.rating.rate import add_preferences
from easyref_core.evaluation.read_groups import named_apart, read_metadata

NAMES = (
    *("a\nb", "<script>alert(1)<", "{{ 7 * 7 }}", "\x1b[31mred", "=1+1", "%s", "a b", "a!b"),
    *("A B", "a-b", "CON", "nul.txt", "Lpt1", "x" * 200, "ünï", "\udcff\udcfe", "-", "--out"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two groups of two pictures."""
    make_groups(tmp_path / "groups", {"a": 2, "b": 2})
    return tmp_path


def test_groups_of_any_name_have_their_own_files(tmp_path: Path) -> None:
    made = []
    for number, name in enumerate(NAMES):
        with suppress(OSError):  # a file system that does not take the name
            for index in range(2):
                picture(tmp_path / "groups" / name / f"{index}.png", 10 * number + index)
            made.append(name)
    summary = bench(settings_for(tmp_path, methods=["none"]))
    assert summary is not None
    assert (summary.done, summary.failed) == (len(made), 0)
    found = {path.parent.name for path in (tmp_path / "run" / "images").rglob("*.png")}
    assert len({name.casefold() for name in found}) == len(made)
    assert not {name.split(".")[0].casefold() for name in found} & {"con", "nul", "lpt1"}
    assert all(name.isascii() and name.isprintable() for name in found)


def test_a_group_named_like_another_ones_file_gets_a_file_of_its_own() -> None:
    taken = _unique(["a b", "a!b"])["a!b"]
    files = _unique(["a b", taken, "a!b"])
    assert len(set(files.values())) == 3


def test_groups_of_one_name_are_told_apart() -> None:
    names = [("x", "held_in"), ("x", "held_in"), ("x", ""), ("x (2)", ""), ("y", "held_out")]
    named = named_apart([ReferenceGroup(name, (), split) for name, split in names])
    found = [group.name for group in named]
    assert found == ["held_in/x", "held_in/x (2)", "x", "x (2)", "y"]
    assert named_apart(named) == named


def test_a_folder_and_a_record_of_one_name_are_two_groups(tmp_path: Path) -> None:
    groups = make_groups(tmp_path / "groups", {"held_in/held_in-0": 2, "held_in/b": 2})
    record = {"image_file": ["held_in/b/0.png"], "text": "x", "target": "held_in/b/1.png"}
    (groups / "held_in.json").write_text(json.dumps([record]))
    bench(settings_for(tmp_path, methods=["none"]))
    assert len(json.loads((tmp_path / "run" / "trials.json").read_text())) == 3


def test_descriptions_of_a_million_short_lines_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text("1\n" * 1_000_001)
    notes: list[str] = []
    assert read_metadata(tmp_path, notes) == {}
    assert "more than the 1,000,000 lines" in notes[0]


def test_pipes_links_and_folders_among_the_pictures_are_passed_over(folder: Path) -> None:
    group = folder / "groups" / "a"
    os.mkfifo(group / "pipe.png")
    os.mkfifo(group / "0.txt.png")
    (group / "device.png").symlink_to("/dev/zero")
    (group / "circle.png").symlink_to("circle.png")
    (group / "folder.png").mkdir()
    (group / "up").symlink_to(folder)
    (group / "0.txt").unlink()
    os.mkfifo(group / "0.txt")
    os.mkfifo(folder / "groups" / "b" / "metadata.jsonl")
    os.mkfifo(folder / "groups" / "held_in.json")
    summary = bench(settings_for(folder))
    assert summary is not None
    assert (summary.done, summary.failed) == (4, 0)


def _first(folder: Path, pattern: str) -> Path:
    return min((folder / "run").glob(pattern))


def _edit(pattern: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = _first(folder, pattern)
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def _set_scores(value: float) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for scores in content["scores"].values():
            scores["level"] = value

    return change


_STATE, _SCORES = "images/*/*/*.json", "work/scores/*/*.json"


@pytest.mark.parametrize(
    "damage",
    [
        _edit(_STATE, lambda state: state.update(seconds=5)),
        _edit(_STATE, lambda state: state.update(seconds={"sample": float("nan")})),
        _edit(_STATE, lambda state: state.update(seconds={"sample": "long"})),
        _edit(_STATE, lambda state: state.update(error=5)),
        _edit(_STATE, lambda state: state.update(status=[1])),
        _edit(_STATE, lambda state: state.update(status="failed", seconds=None)),
        _edit(_SCORES, _set_scores(float("nan"))),
        _edit(_SCORES, _set_scores(1e308)),
        _edit("work/pictures.json", lambda known: min(known.values(), key=str).update(pixels=[1])),
        lambda folder: (folder / "run" / "work" / "pictures.json").write_text("[" * 100_000),
        lambda folder: (folder / "run" / "trials.json").write_text('[{"path": []}]'),
    ],
)
def test_what_is_damaged_in_a_run_is_made_again(
    folder: Path, damage: Callable[[Path], object]
) -> None:
    bench(settings_for(folder))
    whole = (folder / "run" / "scores.csv").read_bytes()
    damage(folder)
    summary = bench(settings_for(folder))
    assert summary is not None
    assert (summary.done, summary.failed) == (4, 0)
    assert (folder / "run" / "scores.csv").read_bytes() == whole


def test_a_pipe_in_place_of_the_lock_is_not_waited_for(folder: Path) -> None:
    bench(settings_for(folder))
    lock = folder / "run" / ".lock"
    lock.unlink()
    os.mkfifo(lock)
    with suppress(EasyRefError):
        bench(settings_for(folder))


def test_results_with_values_that_are_no_numbers_take_no_preferences(folder: Path) -> None:
    bench(settings_for(folder))
    path = folder / "run" / "results.json"
    results = json.loads(path.read_text())
    results["summaries"][0]["variant"]["image_size"] = float("nan")
    path.write_text(json.dumps(results))
    damaged = path.read_bytes()
    with pytest.raises(EasyRefError, match="is damaged"):
        add_preferences(folder / "run")
    assert path.read_bytes() == damaged


def test_a_label_without_trials_has_its_row_on_the_page(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("easyref_core.evaluation.page.write.all_plots", lambda *_: [])
    bench(settings_for(folder))
    path = folder / "run" / "results.json"
    results = json.loads(path.read_text())
    results["summaries"][0] |= {"label": "<b>nobody's</b>", "split": "elsewhere"}
    path.write_text(json.dumps(results))
    page = write_page(folder / "run").read_text("utf-8")
    assert "&lt;b&gt;nobody" in page
    assert "<b>nobody" not in page


def test_folders_of_built_groups_can_be_made_everywhere() -> None:
    tags = [Tag("con"), Tag("a b"), Tag("a!b"), Tag("a_b_2")]
    tags += [Tag("x" * 60 + str(number)) for number in range(20_000)]
    names = folder_names(tags)
    assert list(names.values())[:4] == ["group_con", "a_b", "a_b_2", "a_b_2_2"]
    assert len(set(names.values())) == len(tags)


def test_a_full_disk_is_not_said_of_the_picture_that_is_copied(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(EasyRefError, match=r"built cannot be written \(No space left"):
        build_groups(BuildOptions(folder / "groups", folder / "built", least=2))
    assert {path.name for path in folder.iterdir()} == {"groups"}
