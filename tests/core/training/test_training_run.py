"""Whole runs: the loss falls, a killed run resumes, two processes equal one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from easyref_core.adapter.checkpoint import load_checkpoint
from easyref_core.encode.plan_encoder import plan_encoder
from easyref_core.errors import EasyRefError
from easyref_core.training.checkpoints import list_checkpoints
from easyref_core.training.config import Settings, load_settings
from easyref_core.training.loop import TrainingRun, dry_run, train

Make = Callable[..., Settings]


def test_loss_falls_on_a_memorised_batch(settings: Make) -> None:
    run = TrainingRun(settings())
    batch = run.batches.make([run.samples[0], run.samples[1]])
    trained = [p for p in run.model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=5e-3)
    losses = []
    for _ in range(12):
        loss = run.model(batch).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_killed_run_resumes_to_the_same_losses(
    settings: Make, tmp_path: Path, recipe: Callable[..., Path]
) -> None:
    whole = train(settings(output_folder=str(tmp_path / "whole"), optimiser_ema=0.9))

    def die(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    killed = settings(output_folder=str(tmp_path / "killed"), optimiser_ema=0.9)
    with pytest.raises(KeyboardInterrupt):
        train(killed, on_step=die)
    rest = train(killed)
    assert list(rest.losses) == [3, 4]
    assert all(rest.losses[s] == whole.losses[s] for s in (3, 4))
    for name in ("easyref", "easyref_ema"):
        first = load_file(tmp_path / "whole" / f"{name}.safetensors")
        second = load_file(tmp_path / "killed" / f"{name}.safetensors")
        assert first.keys() == second.keys()
        assert all(torch.equal(first[n], second[n]) for n in first)


def test_a_run_killed_by_a_signal_resumes(recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe(optimiser_steps=6)
    whole = train(load_settings(path, [f"output.folder={tmp_path / 'whole'}"])).losses
    folder = tmp_path / "killed"
    program = (
        "import os, signal\n"
        "from easyref_core.training.config import load_settings\n"
        "from easyref_core.training.loop import train\n"
        f"s = load_settings({str(path)!r}, ['output.folder={folder}'])\n"
        "train(s, on_step=lambda n, l: os.kill(os.getpid(), signal.SIGKILL) if n == 5 else None)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as here, for the same sums
        check=False,
    )
    assert done.returncode == -9, done.stderr[-2000:]
    assert [step for step, _ in list_checkpoints(folder)] == [2, 4]
    rest = train(load_settings(path, [f"output.folder={folder}"])).losses
    assert rest == {step: whole[step] for step in (5, 6)}


def test_two_processes_equal_one_with_accumulation(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path = recipe(optimiser_steps=3)
    one = train(load_settings(path, ["optimiser.accumulation=2"])).losses
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc_per_node", "2", "-m", "easyref_core.cli", "train", str(path)]
    launch += [f"output.folder={tmp_path / 'two'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(tmp_path / "two" / "easyref.safetensors")]
    lines = (tmp_path / "two" / "losses.jsonl").read_text().splitlines()
    two = {line["step"]: line["loss"] for line in map(json.loads, lines)}
    assert two == pytest.approx(one, abs=1e-5)


def test_export_reads_back_as_a_checkpoint(settings: Make, training_set) -> None:
    exported = train(settings(optimiser_steps=1)).exported
    checkpoint = load_checkpoint(exported)
    assert (checkpoint.num_tokens, checkpoint.lora_rank, checkpoint.has_mllm) == (4, 2, True)
    plan_encoder(checkpoint, training_set.mllm).build()


def test_a_checkpoint_names_the_size_of_its_references(settings: Make, tmp_path: Path) -> None:
    train(settings(optimiser_steps=2, output_save_every=1, optimiser_ema=0.9))
    folder = tmp_path / "run" / "checkpoint-1"
    for name in ("easyref", "easyref_ema"):
        assert load_checkpoint(folder / f"{name}.safetensors").image_size == 56


def test_first_stage_exports_no_mllm(settings: Make, training_set) -> None:
    parts = ["final_layers", "projector", "cross_attention"]
    exported = train(settings(optimiser_steps=1, optimiser_parts=parts, model_lora_rank=0)).exported
    checkpoint = load_checkpoint(exported)
    assert not checkpoint.has_mllm
    assert checkpoint.lora_rank == 0


def test_next_stage_continues_and_adds_the_lora(settings: Make, tmp_path: Path) -> None:
    parts = ["final_layers", "projector", "cross_attention"]
    first = train(
        settings(
            optimiser_steps=2,
            optimiser_parts=parts,
            model_lora_rank=0,
            output_folder=str(tmp_path / "stage1"),
        )
    )
    second = train(
        settings(
            stage="single_reference",
            model_adapter=str(first.exported),
            optimiser_steps=1,
            optimiser_learning_rate=1e-9,
            output_folder=str(tmp_path / "stage2"),
        )
    )
    before, after = load_file(first.exported), load_file(second.exported)
    for name, weight in before.items():
        assert torch.allclose(weight, after[name], atol=1e-6), name
    assert any("_lora." in name for name in after)


def test_only_the_named_parts_change(settings: Make, tmp_path: Path) -> None:
    def trained(parts: list[str], folder: str) -> dict[str, torch.Tensor]:
        changes = {"optimiser_parts": parts, "output_folder": str(tmp_path / folder)}
        return load_file(train(settings(optimiser_steps=2, **changes)).exported)

    one = trained(["projector"], "projector")
    other = trained(["cross_attention"], "cross_attention")
    changed = {n for n in one if not torch.equal(one[n], other[n])}
    assert changed
    assert all(n.startswith("image_proj_model.") or "_ip." in n for n in changed)


def test_newest_two_checkpoints_are_kept(settings: Make, tmp_path: Path) -> None:
    train(settings(optimiser_steps=4, output_save_every=1))
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [3, 4]


def test_bf16_with_gradient_checkpointing_trains(settings: Make) -> None:
    made = settings(
        optimiser_precision="bf16", optimiser_gradient_checkpointing=True, optimiser_steps=2
    )
    losses = train(made).losses
    assert all(0 < loss < 10 for loss in losses.values())


def test_gradient_checkpointing_changes_nothing(settings: Make, tmp_path: Path) -> None:
    plain = train(settings(optimiser_steps=2, output_folder=str(tmp_path / "a"))).losses
    saving = train(
        settings(
            optimiser_steps=2,
            optimiser_gradient_checkpointing=True,
            output_folder=str(tmp_path / "b"),
        )
    ).losses
    assert list(saving.values()) == pytest.approx(list(plain.values()), abs=1e-6)


def test_cached_latents_and_texts_change_nothing_the_second_time(
    settings: Make, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")
    first = train(settings(data_cache=cache, output_folder=str(tmp_path / "a"))).losses
    files = sorted(Path(cache).rglob("*.safetensors"))
    second = train(settings(data_cache=cache, output_folder=str(tmp_path / "b"))).losses
    assert files
    assert files == sorted(Path(cache).rglob("*.safetensors"))
    assert first == second


def test_dry_run_says_what_is_trained_and_draws_the_batch(settings: Make, tmp_path: Path) -> None:
    text = dry_run(settings(optimiser_parts=["projector"]))
    assert "projector" in text
    assert "memory about" in text
    assert (tmp_path / "run" / "first_batch.png").is_file()
    assert not list_checkpoints(tmp_path / "run")


def test_frozen_weights_are_kept_in_half_precision(settings: Make) -> None:
    run = TrainingRun(settings(optimiser_parts=["projector"], optimiser_precision="bf16"))
    kinds = {p.requires_grad: p.dtype for p in run.model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


def test_validation_pictures_are_drawn(settings: Make, training_set, tmp_path: Path) -> None:
    few = tmp_path / "few.json"
    few.write_text(json.dumps(json.loads(training_set.records.read_text())[:1]))
    train(settings(optimiser_steps=1, output_validation=str(few)))
    assert (tmp_path / "run" / "validation" / "0000001.png").is_file()


def test_nan_loss_stops_and_names_the_batch(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from easyref_core.training import model

    def broken(self, batch):
        return torch.full((len(batch.captions),), float("nan"), requires_grad=True)

    monkeypatch.setattr(model.TrainedModel, "forward", broken)
    with pytest.raises(EasyRefError, match="loss of step 1 is not a number"):
        train(settings())
    batch = json.loads((tmp_path / "run" / "nan_step1_process0.json").read_text())
    assert len(batch) == 2
    assert "groups.json" in batch[0]["record"]


def test_full_disk_leaves_the_old_checkpoint(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings(optimiser_steps=2))
    real = torch.save

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(EasyRefError, match="No space left"):
        train(settings(optimiser_steps=4))
    monkeypatch.setattr(torch, "save", real)
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [2]
    assert not list((tmp_path / "run").glob(".checkpoint*"))
    assert list(train(settings(optimiser_steps=4)).losses) == [3, 4]


def test_resuming_with_other_settings_is_refused_unless_forced(settings: Make) -> None:
    train(settings(optimiser_steps=2))
    with pytest.raises(EasyRefError, match=r"optimiser\.learning_rate: 0\.001 -> 0\.01"):
        train(settings(optimiser_steps=3, optimiser_learning_rate=1e-2))
    forced = train(settings(optimiser_steps=3, optimiser_learning_rate=1e-2), force=True)
    assert list(forced.losses) == [3]


def test_a_gpu_that_is_too_small_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from easyref_core.training.memory import check_fits

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**10))
    with pytest.raises(EasyRefError, match=r"needs about 3\.0 GB .* has 1\.0 GB free"):
        check_fits({"weights": 2 * 10**9, "optimiser": 10**9}, torch.device("cuda", 0))
    check_fits({"weights": 10**8}, torch.device("cuda", 0))
    with pytest.raises(EasyRefError, match=r"needs about 1000000\.0 GB .* this computer has"):
        check_fits({"activations": 10**15}, torch.device("cpu"))


def test_a_batch_that_no_computer_holds_is_refused_before_it_is_made(settings: Make) -> None:
    huge = settings(optimiser_batch_size=4096, data_resolution=8192, data_workers=0)
    with pytest.raises(EasyRefError, match=r"needs about .* this computer has"):
        train(huge)


@pytest.fixture
def watched(tmp_path: Path, training_set) -> dict[str, object]:
    """Settings for a loss a step and validation pictures in the end."""
    few = tmp_path / "few.json"
    few.write_text(json.dumps(json.loads(training_set.records.read_text())[:1]))
    return {"optimiser_steps": 2, "output_validation": str(few), "output_log_every": 1}


def test_tensorboard_gets_losses_and_validation_pictures(
    settings: Make, watched: dict[str, object], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses = train(settings(output_trackers=["tensorboard"], **watched)).losses
    (folder,) = {p.parent for p in (tmp_path / "run" / "logs" / "easyref").glob("events*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    logged = {e.step: e.value for e in events.Scalars("loss")}
    assert logged == pytest.approx(losses, abs=1e-6)
    assert [e.step for e in events.Images("validation")] == [2]


def test_wandb_gets_losses_and_validation_pictures(
    settings: Make, watched: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    losses = train(settings(output_trackers=["wandb"], **watched)).losses
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    written = log.read_bytes()
    assert all(json.dumps(loss).encode() in written for loss in losses.values())
    (picture,) = tmp_path.glob("wandb/offline-run-*/files/media/images/validation_2_*.png")
    shown = tmp_path / "run" / "validation" / "0000002.png"
    with Image.open(picture) as kept, Image.open(shown) as original:
        assert kept.tobytes() == original.tobytes()


def test_processes_that_are_not_joined_are_refused(
    settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("easyref_core.training.processes.Accelerator", lambda **_: _Alone())
    with pytest.raises(EasyRefError, match="3 processes were started, but accelerate sees 1"):
        train(settings())


class _Alone:
    num_processes = 1
