"""A whole run with fake methods and metrics: its folder, its tables, and what it cannot do."""

from __future__ import annotations

import csv
import errno
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from bench_fakes import FakeMethod, FakeMetric, bench, drawn, make_groups, settings_for
from PIL import Image

from easyref_core.errors import EasyRefError
from easyref_core.evaluation import store
from easyref_core.evaluation.methods import Generated
from easyref_core.evaluation.store import RunFolder
from easyref_core.evaluation.trials import Trial

SIZES = {"held_in/a": 3, "held_in/b": 4, "held_out/c": 5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three groups, of 3, 4 and 5 pictures."""
    make_groups(tmp_path / "groups", SIZES)
    return tmp_path


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "results.json").read_text())


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "run" / "scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_trial_has_its_image_and_its_row(folder: Path) -> None:
    summary = bench(settings_for(folder, ["weight=0.5,1"], images=2))
    assert summary is not None
    assert (summary.done, summary.failed) == (18, 0)
    assert summary.notes == ("DINO is missing.",)
    found = rows(folder)
    assert len(found) == 18
    for row in found:
        image = Image.open(folder / "run" / f"{row['path']}.png")
        assert image.size == (8, 8)
        assert 0 < float(row["level"]) < 1
        assert row["status"] == "done"
    first = found[0]
    assert (first["label"], first["method"], first["weight"]) == (
        "easyref, weight 0.5",
        "easyref",
        "0.5",
    )
    assert (first["group"], first["split"], first["num_references"]) == ("a", "held_in", "2")
    assert first["prompt"].endswith(" of a")


def test_the_page_shows_the_run(folder: Path) -> None:
    bench(settings_for(folder), page=True)
    page = (folder / "run" / "index.html").read_text(encoding="utf-8")
    for text in ("easyref", "Level", "DINO is missing."):
        assert text in page


def test_parquet_holds_the_rows_of_the_csv(folder: Path) -> None:
    from pyarrow import parquet

    bench(settings_for(folder))
    table = parquet.read_table(folder / "run" / "scores.parquet").to_pylist()
    for row, text in zip(table, rows(folder), strict=True):
        assert {name: "" if value is None else str(value) for name, value in row.items()} == text
    assert isinstance(table[0]["seed"], int)
    assert isinstance(table[0]["level"], float)


def test_groups_are_averaged_before_they_are_counted(folder: Path) -> None:
    def unequal(trials: Sequence[Trial]) -> list[Generated]:
        """White, in group c; all others black. Of group c, all but one fail."""
        return [
            Generated(None, error="no")
            if trial.group == "c" and not trial.path.endswith("/0")
            else Generated(Image.new("RGB", (4, 4), "white" if trial.group == "c" else "black"))
            for trial in trials
        ]

    bench(settings_for(folder, images=5, methods=["none"]), unequal)
    by_scope = {(s["split"], s["kind"]): s for s in results(folder)["summaries"]}
    assert list(by_scope) == [("", ""), ("held_in", ""), ("held_out", "")]
    every = by_scope["", ""]
    assert (every["groups"], every["images"], every["failed"]) == (3, 11, 4)
    assert every["column"]["level"]["value"] == pytest.approx(1 / 3)
    assert (every["column"]["level"]["low"], every["column"]["level"]["high"]) == (0, 1)
    assert by_scope["held_out", ""]["column"]["level"]["value"] == 1


def test_results_say_with_what_they_were_made(folder: Path) -> None:
    bench(settings_for(folder, ["references=1,2"], seed=5))
    found = results(folder)
    assert found["settings"]["seed"] == 5
    assert found["settings"]["vary"] == {"references": [1, 2]}
    assert found["methods"]["none"] == {"file": "none", "version": [1, 2]}
    assert found["metrics"] == [{"name": "level", "version": 1}]
    assert found["columns"][0] == {
        "name": "level",
        "title": "Level",
        "scale": "0 to 1",
        "higher_is_better": None,
        "printed": {"100 x": 100.0},
    }
    one = found["summaries"][0]
    assert (one["label"], one["variant"]["references"]) == ("easyref, 1 reference", 1)
    assert (one["num_references"], one["seconds"]) == (1, {"sample": 0.5})


def test_the_table_says_how_long_encoding_and_a_step_took(folder: Path) -> None:
    def act(trials: Sequence[Trial]) -> list[Generated]:
        return [Generated(drawn(trial), {"encode": 2.0, "sample": 1.5}) for trial in trials]

    summary = bench(settings_for(folder, methods=["easyref"], steps=5), act)
    assert summary is not None
    head, row = (line.split("  ") for line in summary.table.splitlines())
    assert [cell.strip() for cell in head[-2:]] == ["encode s", "step s"]
    assert row[-1].strip() == "0.3"
    assert " 2 " in summary.table.splitlines()[1]


def test_trials_are_read_back_as_they_were(folder: Path) -> None:
    seen: list[Trial] = []
    bench(settings_for(folder), seen.extend)
    assert RunFolder(folder / "run").read_trials() == seen


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda items: items[0].update(path="../../outside"), "outside the folder"),
        (lambda items: items[0].update(path=5), "path is 5"),
        (lambda items: items[0].pop("variant"), "damaged"),
        (lambda items: items[0]["variant"].update(weight="a"), "weight is 'a'"),
        (lambda items: items[0].update(references=[1]), "references is 1"),
        (lambda items: items[0].update(licences=[]), "not as many"),
        (lambda items: items.append(3), "damaged"),
    ],
)
def test_trials_of_other_content_are_refused(folder: Path, change: Any, said: str) -> None:
    bench(settings_for(folder))
    path = folder / "run" / "trials.json"
    items = json.loads(path.read_text())
    change(items)
    path.write_text(json.dumps(items))
    with pytest.raises(EasyRefError, match=said):
        RunFolder(folder / "run").read_trials()


def test_combinations_that_are_not_kept_are_not_generated(folder: Path) -> None:
    settings = settings_for(folder, ["references=1,2"], methods=["easyref", "lora"])
    bench(settings, keep=lambda v: v.method != "lora" or v.references == 2)
    trials = json.loads((folder / "run" / "trials.json").read_text())
    kept = {(t["variant"]["method"], t["variant"]["references"]) for t in trials}
    assert kept == {("easyref", 1), ("easyref", 2), ("lora", 2)}


def test_methods_are_closed_before_the_next_one_begins(folder: Path) -> None:
    made: dict[str, FakeMethod] = {}
    open_ones: list[int] = []
    bench(
        settings_for(folder, methods=["easyref", "average", "none"]),
        lambda trials: open_ones.append(sum(m.calls != [] and not m.closed for m in made.values())),
        made=made,
    )
    assert set(open_ones) == {1}
    assert [method.closed for method in made.values()] == [1, 1, 1]


def test_an_image_that_fails_is_marked_and_the_run_goes_on(folder: Path) -> None:
    def nan(trials: Sequence[Trial]) -> list[Generated] | None:
        return [Generated(None, error="It holds NaN.")] if trials[0].group == "b" else None

    summary = bench(settings_for(folder), nan)
    assert summary is not None
    assert (summary.done, summary.failed) == (4, 2)
    assert "2 of 6 images could not be made; the first, images/easyref/b/0: It holds NaN." in (
        summary.notes
    )
    (row,) = (row for row in rows(folder) if row["path"] == "images/none/b/0")
    assert (row["status"], row["error"], row["level"]) == ("failed", "It holds NaN.", "")
    assert not (folder / "run" / "images" / "none" / "b" / "0.png").exists()


def test_a_method_that_refuses_is_marked_and_others_go_on(folder: Path) -> None:
    def refuse(trials: Sequence[Trial]) -> None:
        if trials[0].variant.method == "easyref":
            raise EasyRefError("The adapter does not fit.")

    summary = bench(settings_for(folder), refuse)
    assert summary is not None
    assert (summary.done, summary.failed) == (3, 3)
    assert rows(folder)[0]["error"] == "The adapter does not fit."


def test_where_memory_lacks_a_batch_is_tried_singly(folder: Path) -> None:
    made: dict[str, FakeMethod] = {}

    def greedy(trials: Sequence[Trial]) -> None:
        if len(trials) > 1 or trials[0].group == "b":
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    summary = bench(settings_for(folder, methods=["none"], batch_size=3), greedy, made=made)
    assert summary is not None
    assert (summary.done, summary.failed) == (2, 1)
    assert [len(call) for call in made["none"].calls] == [3, 1, 1, 1]
    assert rows(folder)[1]["error"] == (
        "There is not enough memory (CUDA out of memory. Tried to allocate 2 GiB)."
    )


def test_other_errors_are_not_hidden(folder: Path) -> None:
    def broken(trials: Sequence[Trial]) -> None:
        raise KeyError("a fault of the program")

    with pytest.raises(KeyError):
        bench(settings_for(folder), broken)


def test_a_full_disk_ends_the_run_and_it_can_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = store.write_atomically
    left = [6]

    def full(path: Path, *given: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(path, *given)

    made: dict[str, FakeMethod] = {}
    monkeypatch.setattr(store, "write_atomically", full)
    with pytest.raises(EasyRefError, match=r"png' could not be written \(No space.*to resume"):
        bench(settings_for(folder), made=made)
    assert made["easyref"].closed == 1
    monkeypatch.undo()
    summary = bench(settings_for(folder), made=made)
    assert summary is not None
    assert summary.done == 6
    assert sum(map(len, made["easyref"].calls)) == 1


def test_a_full_disk_within_a_method_ends_the_run(folder: Path) -> None:
    def full(trials: Sequence[Trial]) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise EasyRefError("The tokens cannot be written.") from error

    with pytest.raises(EasyRefError, match="The tokens cannot be written"):
        bench(settings_for(folder), full)


class PickyMetric(FakeMetric):
    """Refuses an image of one group, and has no number for one of another."""

    def score(
        self, trials: Sequence[Trial], images: Sequence[Image.Image]
    ) -> list[dict[str, float]]:
        if any(trial.group == "a" for trial in trials):
            raise EasyRefError("The image has no face.")
        found = super().score(trials, images)
        for trial, scores in zip(trials, found, strict=True):
            if trial.group == "b":
                scores["told"] = float("nan")
        return found


def test_what_a_metric_cannot_score_is_noted_and_left_empty(folder: Path) -> None:
    summary = bench(settings_for(folder), metrics=[PickyMetric()])
    assert summary is not None
    found = {row["path"]: (row["level"], row["told"]) for row in rows(folder)}
    assert found["images/none/a/0"] == ("", "")
    assert found["images/none/b/0"][0] != ""
    assert found["images/none/b/0"][1] == ""
    assert all(found["images/none/c/0"])
    assert "Level, Told: 4 images have no score, the first: The image has no face." in summary.notes
    assert results(folder)["summaries"][0]["column"].keys() == {"level", "told"}


def test_a_column_that_does_not_apply_stays_empty(folder: Path) -> None:
    for path in folder.glob("groups/*/*/*.txt"):
        path.unlink()
    bench(settings_for(folder))
    assert {row["told"] for row in rows(folder)} == {""}
    assert "told" not in results(folder)["summaries"][0]["column"]


def test_without_metrics_there_are_images_and_notes(folder: Path) -> None:
    summary = bench(settings_for(folder), metrics=[])
    assert summary is not None
    assert summary.done == 6
    assert results(folder)["columns"] == []


def test_a_folder_of_something_else_is_never_written_to(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(EasyRefError, match=r"holds something else.*'thesis.txt'"):
            bench(settings_for(folder), overwrite=overwrite)
    names = {path.name for path in (folder / "run").iterdir()}
    assert names <= {"thesis.txt", ".lock"}


@pytest.mark.parametrize("out", ["groups", "groups/held_in", "groups/a/b"])
def test_nothing_is_written_into_the_groups(folder: Path, out: str) -> None:
    with pytest.raises(EasyRefError, match="is read by this run"):
        bench(settings_for(folder, out=str(folder / out)))


def test_groups_within_a_runs_images_are_not_its_input(folder: Path) -> None:
    bench(settings_for(folder))
    with pytest.raises(EasyRefError, match="is read by this run"):
        bench(settings_for(folder, groups=str(folder / "run" / "images")), overwrite=True)
    assert (folder / "run" / "images").exists()


def test_out_may_not_be_a_file(folder: Path) -> None:
    (folder / "run").write_text("")
    with pytest.raises(EasyRefError, match="written"):
        bench(settings_for(folder))


def test_progress_is_shown_on_stderr(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench(settings_for(folder))
    shown = capsys.readouterr().err
    for what in ("reading groups: 100%", "generating: 100%", "scoring: 100%"):
        assert what in shown


def test_leaving_all_combinations_out_is_refused(folder: Path) -> None:
    with pytest.raises(EasyRefError, match="All combinations are left out"):
        bench(settings_for(folder), keep=lambda variant: False)
