"""Runs in the folder of an earlier one: resumed, refused or restarted."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from easyref_core.adapter.checkpoint import load_checkpoint
from easyref_core.errors import EasyRefError
from easyref_core.training import loop
from easyref_core.training.checkpoints import Checkpoints, list_checkpoints
from easyref_core.training.config import Settings
from easyref_core.training.loop import train
from easyref_core.training.model import TrainedModel
from easyref_core.training.progress import Losses
from easyref_core.training.state_file import check_files, read_state, write_state

Make = Callable[..., Settings]


def steps_on_disk(folder: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(folder)]


def edit_state(checkpoint: Path, **changes: Any) -> None:
    """Replace entries of a checkpoint's state."""
    write_state(checkpoint, read_state(checkpoint) | changes)


def test_overwriting_removes_the_run_before(settings: Make, tmp_path: Path) -> None:
    train(settings(optimiser_steps=6))
    assert steps_on_disk(tmp_path / "run") == [4, 6]

    def die(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings(optimiser_steps=6), overwrite=True, on_step=die)
    assert steps_on_disk(tmp_path / "run") == [2]
    lines = (tmp_path / "run" / "losses.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert list(train(settings(optimiser_steps=6)).losses) == [3, 4, 5, 6]


def test_another_number_of_processes_is_named(settings: Make, tmp_path: Path) -> None:
    train(settings(optimiser_steps=2))
    edit_state(tmp_path / "run" / "checkpoint-2", processes=2)
    with pytest.raises(EasyRefError, match="other settings: processes: 2 -> 1"):
        train(settings(optimiser_steps=4))
    assert list(train(settings(optimiser_steps=4), force=True).losses) == [3, 4]


def test_a_state_sharded_in_another_way_is_refused_even_when_forced(
    settings: Make, tmp_path: Path
) -> None:
    train(settings(optimiser_steps=2))
    checkpoint = tmp_path / "run" / "checkpoint-2"
    edit_state(checkpoint, strategy="FSDP")
    with pytest.raises(EasyRefError, match="state FSDP, which is now whole in each process"):
        train(settings(optimiser_steps=4), force=True)
    edit_state(checkpoint, strategy=None)  # as in older checkpoints
    (checkpoint / "sharded").mkdir()
    with pytest.raises(EasyRefError, match="state sharded, which is now whole in each process"):
        train(settings(optimiser_steps=4), force=True)
    (checkpoint / "sharded").rmdir()
    assert list(train(settings(optimiser_steps=3)).losses) == [3]


def flip_a_bit(file: Path, at: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(len(content) * at)] ^= 0x10
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("optimiser.pt", flip_a_bit),
        ("easyref.safetensors", flip_a_bit),
        ("easyref_ema.safetensors", cut),
        ("state.json", Path.unlink),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_resumed(
    settings: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], None],
) -> None:
    made = settings(optimiser_ema=0.9, optimiser_steps=2, output_save_every=1)
    whole = train(made).losses
    exported = load_file(tmp_path / "run" / "easyref.safetensors")
    damage(tmp_path / "run" / "checkpoint-2" / name)
    capsys.readouterr()
    assert train(made).losses == {2: whole[2]}
    said = capsys.readouterr().err
    assert "checkpoint-2 is damaged: " in said
    assert f"checkpoint-2/{name}" in said
    assert "checkpoint-1 instead" in said
    again = load_file(tmp_path / "run" / "easyref.safetensors")
    assert all(torch.equal(exported[n], again[n]) for n in exported)
    assert steps_on_disk(tmp_path / "run") == [1, 2]
    check_files(tmp_path / "run" / "checkpoint-2", read_state(tmp_path / "run" / "checkpoint-2"))


def test_damage_without_an_earlier_checkpoint_is_told(settings: Make, tmp_path: Path) -> None:
    train(settings(optimiser_steps=1))
    flip_a_bit(tmp_path / "run" / "checkpoint-1" / "optimiser.pt")
    with pytest.raises(EasyRefError, match=r"optimiser\.pt differs .* anew with --overwrite"):
        train(settings(optimiser_steps=2))
    assert list(train(settings(optimiser_steps=2), overwrite=True).losses) == [1, 2]


@pytest.mark.parametrize("content", ["{}", "null", '{"settings": []}', "no JSON", "[" * 100_000])
def test_a_damaged_state_is_named(settings: Make, tmp_path: Path, content: str) -> None:
    train(settings(optimiser_steps=1))
    (tmp_path / "run" / "checkpoint-1" / "state.json").write_text(content, encoding="utf-8")
    with pytest.raises(EasyRefError, match="checkpoint-1"):
        train(settings(optimiser_steps=2))


def test_checkpoints_without_checksums_still_resume(settings: Make, tmp_path: Path) -> None:
    train(settings(optimiser_steps=1))
    path = tmp_path / "run" / "checkpoint-1" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in state.items() if k not in ("files", "checksum")}))
    assert list(train(settings(optimiser_steps=2)).losses) == [2]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    def noted_rename(source: Any, target: Any) -> None:
        assert {p.name for p in (source, *source.iterdir())} <= {*done}
        done.clear()
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    train(settings(optimiser_steps=1))
    assert done[0] == "run"


def test_what_a_killed_run_left_is_removed_when_the_next_starts(
    settings: Make, tmp_path: Path
) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    train(settings(optimiser_steps=2, data_cache=str(cache)))
    stale = run / ".checkpoint-3.tmp"
    stale.mkdir()
    (stale / "easyref.safetensors").write_text("half")
    for folder in (run, next(cache.iterdir())):
        partial = folder / f".easyref-{7:032x}.part"
        partial.mkdir()
        (partial / "lock").touch()
    (run / ".checkpoint-notes.tmp").mkdir()
    loop.dry_run(settings(optimiser_steps=2, data_cache=str(cache)))
    assert stale.exists()  # a run may be writing it
    train(settings(optimiser_steps=2, data_cache=str(cache)))
    left = [p.name for p in (*run.iterdir(), *cache.rglob("*")) if p.name.startswith(".")]
    assert left == [".checkpoint-notes.tmp"]


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


def test_a_run_that_had_no_checkpoint_yet_keeps_its_logs(settings: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def die(step: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings(), on_step=die)
    (run / "validation").mkdir()
    first = (run / "losses.jsonl").read_text()
    train(settings(optimiser_steps=2))
    assert (run / "losses_1.jsonl").read_text() == first
    assert (run / "validation_1").is_dir()
    assert len((run / "losses.jsonl").read_text().splitlines()) == 2


def test_results_are_replaced_only_where_that_was_asked_for(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = train(settings(optimiser_steps=1)).exported
    assert exported is not None
    before = exported.read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoint-1")
    with monkeypatch.context() as patched:
        patched.setattr(loop, "load_base", lambda *_: pytest.fail("loaded models"))
        with pytest.raises(EasyRefError, match=r"easyref\.safetensors exists.*--overwrite"):
            train(settings(optimiser_steps=2))
    assert exported.read_bytes() == before
    train(settings(optimiser_steps=2), overwrite=True)
    assert exported.read_bytes() != before


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("name", ["easyref.safetensors", "easyref_ema.safetensors", "losses.jsonl"])
def test_files_of_another_kind_in_the_output_folder_are_kept(
    settings: Make, tmp_path: Path, name: str, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "load_base", lambda *_: pytest.fail("loaded models"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("my notes\n")
    with pytest.raises(EasyRefError, match=f"{name} exists and holds something else"):
        train(settings(), overwrite=overwrite)
    assert (tmp_path / "run" / name).read_text() == "my notes\n"


@pytest.mark.parametrize("overwrite", [True, False])
def test_checkpoints_of_other_programs_are_kept(
    settings: Make, tmp_path: Path, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "load_base", lambda *_: pytest.fail("loaded models"))
    foreign = tmp_path / "run" / "checkpoint-500"
    foreign.mkdir(parents=True)
    (foreign / "model.safetensors").write_text("weeks of work")
    with pytest.raises(EasyRefError, match="checkpoint-500 is no checkpoint of this program"):
        train(settings(), overwrite=overwrite)
    assert (foreign / "model.safetensors").read_text() == "weeks of work"


def test_a_stage_does_not_replace_the_adapter_it_starts_from(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings(optimiser_steps=1))
    monkeypatch.setattr(loop, "load_base", lambda *_: pytest.fail("loaded models"))
    for name in ("easyref.safetensors", "checkpoint-1/easyref.safetensors"):
        adapter = tmp_path / "run" / name
        before = adapter.read_bytes()
        then = settings(stage="single_reference", model_adapter=str(adapter))
        for options in ({"overwrite": True}, {"force": True}):
            with pytest.raises(EasyRefError, match="is read by this run"):
                train(then, **options)
        assert adapter.read_bytes() == before


def test_a_run_writes_nothing_into_the_models_it_reads(settings: Make, training_set: Any) -> None:
    before = sorted(training_set.base.rglob("*"))
    with pytest.raises(EasyRefError, match="which is read; nothing can be written there"):
        train(settings(output_folder=str(training_set.base / "run")), overwrite=True)
    assert sorted(training_set.base.rglob("*")) == before


def test_weights_that_are_not_numbers_are_not_saved(settings: Make, tmp_path: Path) -> None:
    train(settings(optimiser_steps=2))
    with pytest.raises(EasyRefError, match=r"After step 4 the weight .* no checkpoint was written"):
        train(settings(), on_step=spoil_at(4))
    assert steps_on_disk(tmp_path / "run") == [2]


def test_a_broken_weight_is_not_blamed_on_the_data(settings: Make, tmp_path: Path) -> None:
    with pytest.raises(EasyRefError, match=r"loss of step 2 .* so it is not the data"):
        train(settings(), on_step=spoil_at(1))


def spoil_at(wanted: int) -> Callable[[int, float], None]:
    """Puts a NaN into a trained weight after a step."""

    def spoil(step: int, loss: float) -> None:
        if step == wanted:
            (model,) = (o for o in gc.get_objects() if type(o) is TrainedModel)
            next(iter(model.trained_parameters().values())).data.view(-1)[0] = float("nan")

    gc.collect()
    return spoil


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

    save_file, written = safetensors.torch.save_file, []

    def full(tensors: Any, path: Path, *others: Any) -> None:
        if written:  # the averages
            raise RuntimeError("No space left on device")
        save_file(tensors, path, *others)
        written.append(path)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(EasyRefError, match="No space left"):
        train(settings(optimiser_ema=0.9))
    assert not list((tmp_path / "run").glob(".checkpoint*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_losses_that_cannot_be_written_stop_the_run(settings: Make, tmp_path: Path) -> None:
    train(settings(optimiser_steps=2))
    log = tmp_path / "run" / "losses.jsonl"

    def fill(step: int, loss: float) -> None:
        log.unlink()
        log.symlink_to("/dev/full")

    with pytest.raises(EasyRefError, match=r"losses\.jsonl could not be written.*free some space"):
        train(settings(optimiser_steps=4), on_step=fill)
    assert steps_on_disk(tmp_path / "run") == [2]


def test_losses_have_one_line_a_step(settings: Make, tmp_path: Path) -> None:
    losses = train(settings(optimiser_steps=1)).losses
    log = tmp_path / "run" / "losses.jsonl"
    with log.open("a") as file:  # a kill before the next checkpoint
        file.write('{"step": 2, "loss": 1}\n')
    losses |= train(settings(optimiser_steps=2)).losses
    assert [json.loads(line) for line in log.read_text().splitlines()] == [
        {"step": step, "loss": losses[step]} for step in (1, 2)
    ]


@pytest.mark.parametrize(
    "left",
    [
        '{"step": 3, "loss": 1}\n{"step": 4, "loss": 1}\n',
        '{"step": 3, "lo',
        "\0" * 60,
        "[1]\n\n",
        '{"step": 1, "loss": 9}\n{"step": 2, "loss": 9}\n',
        '{"step": "3", "loss": 1}\n' + "[" * 100_000,
    ],
)
def test_what_a_kill_left_in_the_losses_is_removed(tmp_path: Path, left: str) -> None:
    whole = '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n'
    log = tmp_path / "losses.jsonl"
    log.write_text(whole + left)
    losses = Losses(tmp_path, 2)
    assert log.read_text() == whole
    losses.write(3, 0.125)
    assert log.read_text() == whole + '{"step": 3, "loss": 0.125}\n'


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


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you Tried to allocate"),
        MemoryError("Tried to allocate"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_lack_of_memory_is_explained(
    settings: Make, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(loop, "load_base", full)
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


def test_damaged_files_of_a_cache_are_computed_again(settings: Make, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def losses(name: str) -> dict[int, float]:
        return train(settings(data_cache=str(cache), output_folder=str(tmp_path / name))).losses

    first = losses("first")
    files = sorted(cache.rglob("*.safetensors"))
    before = [file.read_bytes() for file in files]
    for number, file in enumerate(files):
        (flip_a_bit, cut, lambda file: flip_a_bit(file, 0.99))[number % 3](file)
    assert losses("second") == first
    assert [file.read_bytes() for file in files] == before


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
