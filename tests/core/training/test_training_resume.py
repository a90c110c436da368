"""Runs in the folder of an earlier one: resumed, refused or restarted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from easyref_core.adapter.checkpoint import load_checkpoint
from easyref_core.errors import EasyRefError
from easyref_core.training import loop
from easyref_core.training.checkpoints import Checkpoints, list_checkpoints
from easyref_core.training.config import Settings
from easyref_core.training.loop import train

Make = Callable[..., Settings]


def steps_on_disk(folder: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(folder)]


def test_a_restart_removes_the_run_before(settings: Make, tmp_path: Path) -> None:
    train(settings(optimiser_steps=6))
    assert steps_on_disk(tmp_path / "run") == [4, 6]

    def die(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings(optimiser_steps=6), resume=False, on_step=die)
    assert steps_on_disk(tmp_path / "run") == [2]
    lines = (tmp_path / "run" / "losses.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert list(train(settings(optimiser_steps=6)).losses) == [3, 4, 5, 6]


def test_another_number_of_processes_is_named(settings: Make, tmp_path: Path) -> None:
    train(settings(optimiser_steps=2))
    path = tmp_path / "run" / "checkpoint-2" / "state.json"
    path.write_text(path.read_text().replace('"processes": 1', '"processes": 2'))
    with pytest.raises(EasyRefError, match="other settings: processes: 2 -> 1"):
        train(settings(optimiser_steps=4))
    assert list(train(settings(optimiser_steps=4), force=True).losses) == [3, 4]


def test_a_state_sharded_in_another_way_is_refused_even_when_forced(
    settings: Make, tmp_path: Path
) -> None:
    train(settings(optimiser_steps=2))
    path = tmp_path / "run" / "checkpoint-2" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"strategy": "FSDP"}))
    with pytest.raises(EasyRefError, match="state FSDP, which is now whole in each process"):
        train(settings(optimiser_steps=4), force=True)
    state.pop("strategy")  # as in older checkpoints
    path.write_text(json.dumps(state))
    (path.parent / "sharded").mkdir()
    with pytest.raises(EasyRefError, match="state sharded, which is now whole in each process"):
        train(settings(optimiser_steps=4), force=True)
    (path.parent / "sharded").rmdir()
    assert list(train(settings(optimiser_steps=3)).losses) == [3]


@pytest.mark.parametrize("name", ["optimiser.pt", "easyref.safetensors"])
def test_a_truncated_checkpoint_is_named(settings: Make, tmp_path: Path, name: str) -> None:
    train(settings(optimiser_steps=1))
    file = tmp_path / "run" / "checkpoint-1" / name
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(EasyRefError, match=r"checkpoint-1 cannot be restored.*remove it to resume"):
        train(settings(optimiser_steps=2))


@pytest.mark.parametrize("content", ["{}", "null", '{"settings": []}', "no JSON"])
def test_a_damaged_state_is_named(settings: Make, tmp_path: Path, content: str) -> None:
    train(settings(optimiser_steps=1))
    (tmp_path / "run" / "checkpoint-1" / "state.json").write_text(content, encoding="utf-8")
    with pytest.raises(EasyRefError, match="checkpoint-1"):
        train(settings(optimiser_steps=2))


def test_machines_that_find_different_checkpoints_are_told_to_share_a_folder(
    settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "load_base", lambda *_: pytest.fail("loaded models"))
    monkeypatch.setattr(
        "easyref_core.training.checkpoints.gather_object", lambda found: [*found, 40]
    )
    with pytest.raises(
        EasyRefError, match=r"\(none, step 40\)\. output\.folder must be on storage"
    ):
        train(settings())


def test_a_cache_is_another_setting(settings: Make, tmp_path: Path) -> None:
    train(settings(optimiser_steps=2))
    with pytest.raises(EasyRefError, match=r"data\.cache: None -> "):
        train(settings(optimiser_steps=4, data_cache=str(tmp_path / "cache")))


def test_forcing_applies_what_was_changed(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings(optimiser_steps=2))
    decays, restore = [], Checkpoints.restore

    def spy(self: Checkpoints, accelerator: Any, model: Any, optimiser: Any, *others: Any) -> None:
        restore(self, accelerator, model, optimiser, *others)
        decays.extend(group["weight_decay"] for group in optimiser.param_groups)

    monkeypatch.setattr(Checkpoints, "restore", spy)
    changed = settings(optimiser_steps=4, optimiser_weight_decay=0.5, optimiser_ema=0.9)
    assert list(train(changed, force=True).losses) == [3, 4]
    assert decays == [0.5]
    assert (tmp_path / "run" / "easyref_ema.safetensors").is_file()


def test_forcing_cannot_change_the_parts(settings: Make) -> None:
    train(settings(optimiser_steps=2))
    with pytest.raises(EasyRefError, match=r"made with other parts or sizes.*even with --force"):
        train(settings(optimiser_steps=4, optimiser_parts=["projector"]), force=True)


def test_a_full_disk_leaves_nothing_half_written(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    save_file = safetensors.torch.save_file

    def full(tensors: Any, path: Path, *others: Any) -> None:
        if "ema" in str(path):
            raise RuntimeError("No space left on device")
        save_file(tensors, path, *others)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(EasyRefError, match="No space left"):
        train(settings(optimiser_ema=0.9))
    assert not list((tmp_path / "run").glob(".checkpoint*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_losses_that_cannot_be_written_stop_the_run(settings: Make, tmp_path: Path) -> None:
    train(settings(optimiser_steps=2))
    log = tmp_path / "run" / "losses.jsonl"
    log.unlink()
    log.symlink_to("/dev/full")
    with pytest.raises(EasyRefError, match=r"losses\.jsonl could not be written.*free some space"):
        train(settings(optimiser_steps=4))
    assert steps_on_disk(tmp_path / "run") == [2]


def test_a_line_of_losses_cut_by_a_kill_is_removed(settings: Make, tmp_path: Path) -> None:
    train(settings(optimiser_steps=2))
    log = tmp_path / "run" / "losses.jsonl"
    with log.open("a") as file:
        file.write('{"step": 3, "lo')
    train(settings(optimiser_steps=4))
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3, 4]


@pytest.mark.parametrize("start", [train, loop.dry_run])
def test_an_impossible_output_folder_is_refused_before_anything_is_loaded(
    settings: Make, tmp_path: Path, start: Callable[[Settings], Any], monkeypatch: Any
) -> None:
    monkeypatch.setattr(loop, "load_base", lambda *_: pytest.fail("loaded models"))
    (tmp_path / "file").write_text("")
    with pytest.raises(EasyRefError, match=r"cannot be written.*Not a directory"):
        start(settings(output_folder=str(tmp_path / "file" / "run")))


def test_trackers_that_cannot_write_are_named(settings: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "logs").write_text("")
    with pytest.raises(EasyRefError, match="logs cannot be written"):
        train(settings(output_trackers=["tensorboard"]))


def test_a_gpu_out_of_memory_is_explained(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setattr(loop.TrainingRun, "_optimise", full)
    with pytest.raises(EasyRefError, match=r"Tried to allocate\)\. Lower optimiser"):
        train(settings())


def test_a_finetuned_mllm_stays_in_the_export_of_a_stage_that_freezes_it(
    settings: Make, tmp_path: Path
) -> None:
    first = train(settings(optimiser_steps=1, output_folder=str(tmp_path / "first")))
    then = settings(
        optimiser_steps=1,
        optimiser_parts=["projector"],
        model_adapter=str(first.exported),
        output_folder=str(tmp_path / "then"),
    )
    assert load_checkpoint(train(then).exported).has_mllm
    fresh = settings(optimiser_steps=1, optimiser_parts=["projector"])
    assert not load_checkpoint(train(fresh).exported).has_mllm


def test_the_recipes_accumulation_overrides_accelerates_configuration(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(name: str) -> dict[int, float]:
        return train(settings(optimiser_accumulation=2, output_folder=str(tmp_path / name))).losses

    plain = losses("plain")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    assert losses("configured") == plain


def test_worker_processes_give_the_losses_of_none(settings: Make, tmp_path: Path) -> None:
    alone = train(settings(optimiser_steps=2)).losses
    folder = str(tmp_path / "workers")
    assert train(settings(optimiser_steps=2, data_workers=1, output_folder=folder)).losses == alone


def test_a_cache_notices_new_pictures_and_another_precision(
    settings: Make, training_set: Any, tmp_path: Path
) -> None:
    records = json.loads(training_set.records.read_text())
    for name in {name for r in records for name in (r["target"], *r["image_file"])}:
        (tmp_path / name).write_bytes((training_set.data / name).read_bytes())
    cache = tmp_path / "cache"

    def losses(name: str, **changes: Any) -> dict[int, float]:
        AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the precision
        changes |= {"data_root": str(tmp_path), "output_folder": str(tmp_path / name)}
        return train(settings(optimiser_steps=2, **changes)).losses

    old = losses("old", data_cache=str(cache))
    for record in records:
        Image.new("RGB", (90, 70), "white").save(tmp_path / record["target"])
        os.utime(tmp_path / record["target"], (1, 1))
    assert losses("new", data_cache=str(cache)) == losses("uncached") != old
    kept = len(list(cache.rglob("*.safetensors")))
    losses("half", data_cache=str(cache), optimiser_precision="bf16")
    assert len(list(cache.rglob("*.safetensors"))) > kept
