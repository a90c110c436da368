"""A run that is stopped anywhere goes on, and leaves the very same files."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from bench_fakes import (
    FakeMethod,
    FakeMetric,
    bench,
    make_groups,
    picture,
    settings_for,
    snapshot,
    timeless,
)

from easyref_core.errors import EasyRefError
from easyref_core.evaluation.methods import Generated
from easyref_core.evaluation.settings import BenchSettings
from easyref_core.evaluation.store import OtherRun, RunFolder
from easyref_core.evaluation.trials import NEWER, Trial

SECONDS = 0.02  # of a batch in runs that are killed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_groups(tmp_path / "groups", {"held_in/a": 3, "held_out/b": 4})
    return tmp_path


def calls(made: dict[str, FakeMethod]) -> list[list[str]]:
    return [call for method in made.values() for call in method.calls]


@contextmanager
def running(settings: BenchSettings, seconds: float) -> Iterator[BaseProcess]:
    """A run in a process of its own, which is killed in the end.

    Args:
        seconds: that each batch takes.
    """
    context = multiprocessing.get_context("fork")  # what is imported need not be again
    process = context.Process(target=bench, args=(settings, lambda trials: time.sleep(seconds)))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def wait_for(condition: Callable[[], bool], process: BaseProcess) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.is_alive()
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_finished_run_makes_nothing_again(folder: Path) -> None:
    metric = FakeMetric()
    bench(settings_for(folder), metrics=[metric])
    before = snapshot(folder / "run")
    made: dict[str, FakeMethod] = {}
    again = FakeMetric()
    summary = bench(settings_for(folder), metrics=[again], made=made)
    assert summary is not None
    assert summary.done == 4
    assert calls(made) == []
    assert again.scored == []
    assert snapshot(folder / "run") == before


def without_newer(folder: Path) -> None:
    """A run as it was before variants had the fields of `NEWER`."""
    run, trials = (json.loads((folder / n).read_text()) for n in ("run.json", "trials.json"))
    for name in NEWER:
        del run["settings"][name]
        for trial in trials:
            del trial["variant"][name]
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "trials.json").write_text(json.dumps(trials))


def test_a_run_of_an_earlier_version_goes_on_and_is_read(folder: Path) -> None:
    bench(settings_for(folder))
    before, trials = snapshot(folder / "run"), RunFolder(folder / "run").read_trials()
    without_newer(folder / "run")
    assert RunFolder(folder / "run").read_trials() == trials
    made: dict[str, FakeMethod] = {}
    bench(settings_for(folder), made=made)
    assert calls(made) == []
    assert snapshot(folder / "run") == before
    without_newer(folder / "run")
    with pytest.raises(OtherRun, match="identity: "):
        bench(settings_for(folder, identity=0.5))


def test_a_batch_with_a_missing_image_is_made_again_as_a_whole(folder: Path) -> None:
    settings = settings_for(folder, batch_size=2)
    bench(settings)
    before = snapshot(folder / "run")
    (folder / "run" / "images" / "none" / "b" / "0.json").unlink()
    made: dict[str, FakeMethod] = {}
    bench(settings, made=made)
    assert calls(made) == [["images/none/a/0", "images/none/b/0"]]
    assert snapshot(folder / "run") == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("images/none/a/0.png", b"cut off"),
        ("images/none/a/0.png", None),
        ("images/none/a/0.json", b"{"),
        ("images/none/a/0.json", b"[]"),
        ("images/none/a/0.json", b'{"status": "done", "sha256": ""}'),
        ("images/none/a/0.json", b'{"status": "done", "sha256": "", "seconds": 5}'),
        ("images/none/a/0.json", b'{"status": 5, "other": 1}'),
    ],
)
def test_what_is_damaged_is_made_again(folder: Path, name: str, content: bytes | None) -> None:
    bench(settings_for(folder))
    before = snapshot(folder / "run")
    path = folder / "run" / name
    path.unlink() if content is None else path.write_bytes(content)
    made: dict[str, FakeMethod] = {}
    bench(settings_for(folder), made=made)
    assert calls(made) == [["images/none/a/0"]]
    assert snapshot(folder / "run") == before


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"{}", b'{"images": {}, "scores": {"a": {"b": "c"}}}']
)
def test_damaged_scores_are_computed_again(folder: Path, content: bytes) -> None:
    bench(settings_for(folder))
    before = snapshot(folder / "run")
    for path in (folder / "run" / "work" / "scores").rglob("*.json"):
        path.write_bytes(content)
    metric = FakeMetric()
    bench(settings_for(folder), metrics=[metric])
    assert len(metric.scored) == 4
    assert snapshot(folder / "run") == before


def test_a_damaged_list_of_trials_is_written_again(folder: Path) -> None:
    bench(settings_for(folder))
    before = snapshot(folder / "run")
    for content in (b"{", b"[1]", b"5"):
        (folder / "run" / "trials.json").write_bytes(content)
        bench(settings_for(folder))
        assert snapshot(folder / "run") == before


def test_failed_images_are_tried_again(folder: Path) -> None:
    def fail(trials: Sequence[Trial]) -> list[Generated] | None:
        return [Generated(None, error="no memory")] if trials[0].path == "images/none/b/0" else None

    (folder / "other").mkdir()
    bench(settings_for(folder, out=str(folder / "other")))
    first = bench(settings_for(folder), fail)
    made: dict[str, FakeMethod] = {}
    second = bench(settings_for(folder), made=made)
    assert first is not None
    assert second is not None
    assert (first.failed, second.failed) == (1, 0)
    assert calls(made) == [["images/none/b/0"]]
    assert _scores(folder / "run") == _scores(folder / "other")


def _scores(run: Path) -> tuple[bytes, bytes]:
    return (run / "scores.csv").read_bytes(), (run / "scores.parquet").read_bytes()


@pytest.mark.parametrize(
    ("vary", "changes", "said"),
    [
        ((), {"weight": 0.5}, r"weight: 1.0 -> 0.5\. Restore"),
        ((), {"seed": 3, "steps": 9}, r"seed: 0 -> 3; steps: 30 -> 9"),
        (("weight=0.5",), {}, r"vary.weight: None -> \[0.5\]"),
        ((), {"methods": ["none"]}, r"methods: \['easyref', 'none'\] -> \['none'\]"),
        ((), {"base": "/other"}, r"base: '' -> '/other'"),
    ],
)
def test_other_settings_are_refused_and_named(
    folder: Path, vary: Sequence[str], changes: dict[str, Any], said: str
) -> None:
    bench(settings_for(folder))
    before = snapshot(folder / "run")
    with pytest.raises(OtherRun, match=said):
        bench(settings_for(folder, vary, **changes))
    assert snapshot(folder / "run") == before


def test_settings_that_change_no_image_may_change(folder: Path) -> None:
    bench(settings_for(folder))
    made: dict[str, FakeMethod] = {}
    bench(settings_for(folder, offline=True, clip="/elsewhere"), made=made)
    assert calls(made) == []


def test_a_changed_model_is_refused_and_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench(settings_for(folder))
    monkeypatch.setattr(FakeMethod, "identity", lambda self: {"file": "other", "version": (1, 2)})
    with pytest.raises(OtherRun, match=r"easyref.file: 'easyref' -> 'other'; none.file"):
        bench(settings_for(folder))


def test_changed_groups_are_refused_and_named(folder: Path) -> None:
    bench(settings_for(folder))
    other = folder / "groups" / "held_in" / "a" / "0.png"
    content = other.read_bytes()
    picture(other, 12345)
    with pytest.raises(OtherRun, match=r"the picture .*0\.png"):
        bench(settings_for(folder))
    other.write_bytes(content)
    os.utime(other, (1, 1))
    bench(settings_for(folder))  # the same pixels
    (folder / "groups" / "held_in" / "a" / "1.txt").write_text("another caption")
    with pytest.raises(OtherRun, match=r"images/easyref/a/0\.captions"):
        bench(settings_for(folder))
    picture(folder / "groups" / "held_in" / "a" / "3.png", 3)
    with pytest.raises(OtherRun, match=r"images/easyref/a/0"):
        bench(settings_for(folder))


def test_another_metric_scores_the_same_images(folder: Path) -> None:
    bench(settings_for(folder), metrics=[])
    made: dict[str, FakeMethod] = {}
    bench(settings_for(folder), metrics=[FakeMetric()], made=made)
    first = _scores(folder / "run")
    bench(settings_for(folder), metrics=[FakeMetric(version=2)], made=made)
    assert _scores(folder / "run") != first
    bench(settings_for(folder), metrics=[FakeMetric()], made=made)
    assert _scores(folder / "run") == first
    assert calls(made) == []


def test_overwrite_begins_anew_and_keeps_votes(folder: Path) -> None:
    bench(settings_for(folder))
    (folder / "run" / "votes.jsonl").write_text("{}\n")
    (folder / "run" / "images" / "old.png").write_text("old")
    made: dict[str, FakeMethod] = {}
    bench(settings_for(folder, seed=1), overwrite=True, made=made)
    assert len(calls(made)) == 4
    assert not (folder / "run" / "images" / "old.png").exists()
    assert (folder / "run" / "votes_1.jsonl").read_text() == "{}\n"
    assert json.loads((folder / "run" / "run.json").read_text())["settings"]["seed"] == 1


def test_overwrite_that_was_stopped_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is a run's until the last of it is gone."""
    from easyref_core.evaluation import store

    bench(settings_for(folder))
    monkeypatch.setattr(store.shutil, "rmtree", lambda path: (_ for _ in ()).throw(OSError("cut")))
    with pytest.raises(EasyRefError):
        bench(settings_for(folder, seed=1), overwrite=True)
    monkeypatch.undo()
    summary = bench(settings_for(folder, seed=1), overwrite=True)
    assert summary is not None
    assert summary.done == 4


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Groups, and what a run that nobody stops leaves."""
    folder = tmp_path_factory.mktemp("bench")
    make_groups(folder / "groups", {"held_in/a": 3, "held_out/b": 4, "held_out/c": 5})
    bench(settings_for(folder, batch_size=2, images=2))
    found = snapshot(folder / "run")
    return folder, found


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killing_at_any_time_changes_no_file(
    uninterrupted: tuple[Path, dict[str, bytes]], tmp_path: Path, seed: int
) -> None:
    folder, wanted = uninterrupted
    out = tmp_path / "run"
    settings = settings_for(folder, out=str(out), batch_size=2, images=2)
    moments = random.Random(seed)
    for _ in range(4):
        with running(settings, SECONDS):
            time.sleep(moments.uniform(0, 0.5))
    bench(settings)
    assert timeless(snapshot(out)) == timeless(wanted)


def test_a_second_run_on_the_folder_is_refused(folder: Path) -> None:
    with running(settings_for(folder), 60) as process:
        wait_for((folder / "run" / "run.json").exists, process)
        with pytest.raises(EasyRefError, match="Another benchmark run works in"):
            bench(settings_for(folder))
    bench(settings_for(folder))  # it is free again


def test_a_key_press_keeps_what_is_finished(folder: Path) -> None:
    def interrupt(trials: Sequence[Trial]) -> None:
        if trials[0].path == "images/easyref/b/0":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(settings_for(folder), interrupt)
    made: dict[str, FakeMethod] = {}
    bench(settings_for(folder), made=made)
    assert len(calls(made)) == 3
