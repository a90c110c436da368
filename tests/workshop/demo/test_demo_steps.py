"""Optimiser steps of the pretraining: resuming, several processes, the learning rate."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from easyref_core.errors import EasyRefError
from easyref_core.training.state_file import read_state, write_state
from workshop.demo.pretraining.steps import Restart, Schedule, run_steps
from workshop.demo.train import RECIPES

CPU = torch.device("cpu")


def test_interrupted_steps_resume_with_equal_results(tmp_path: Path) -> None:
    def trained(folder: Path, stop_at: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 1)

        def loss(step: int, generator: torch.Generator) -> torch.Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            inputs = torch.randn(4, 3, generator=generator)
            return (module(inputs).float() - inputs.sum(-1, keepdim=True)).square().mean()

        schedule = Schedule(1200, 4, 1e-2, warmup=10)
        run_steps(module, loss, schedule, folder, CPU)
        return module.weight.detach().clone()

    whole = trained(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", 700)
    assert torch.equal(trained(tmp_path / "parts", None), whole)
    assert (whole - 1).abs().max() < 0.05


def test_a_checkpoint_of_another_recipe_or_model_is_refused(tmp_path: Path) -> None:
    def train(schedule: Schedule, inputs: int = 3) -> None:
        module = torch.nn.Linear(inputs, 1, bias=False)
        run_steps(module, lambda *_: module.weight.sum(), schedule, tmp_path / "part", CPU)

    schedule = Schedule(2, 4, 1e-2, warmup=1)
    train(schedule)
    with pytest.raises(EasyRefError, match=r"other settings: batch: 4 -> 8; steps: 2 -> 3"):
        train(replace(schedule, steps=3, batch=8))
    with pytest.raises(EasyRefError, match="does not fit: weight is missing or of another size"):
        train(schedule, inputs=5)
    (tmp_path / "part" / "checkpoint-2" / "optimiser.pt").write_bytes(b"half")
    with pytest.raises(EasyRefError, match=r"optimiser\.pt differs .*delete .*part to train this"):
        train(schedule)


def test_a_checkpoint_of_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 1)
    run_steps(module, lambda *_: module.weight.sum(), Schedule(2, 4, 1e-2, 1), tmp_path, CPU)
    checkpoint = tmp_path / "checkpoint-2"
    write_state(checkpoint, read_state(checkpoint) | {"processes": 2})
    with pytest.raises(EasyRefError, match="processes: 2 -> 1"):
        run_steps(module, lambda *_: module.weight.sum(), Schedule(2, 4, 1e-2, 1), tmp_path, CPU)


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path) -> None:
    module = torch.nn.Linear(1, 1)
    with pytest.raises(EasyRefError, match="not a number"):
        run_steps(
            module, lambda *_: module.weight.sum() * float("nan"), Schedule(20, 1, 1e-3),
            tmp_path, CPU,
        )  # fmt: skip


def test_the_learning_rate_rises_and_falls() -> None:
    schedule = Schedule(1000, 1, 1.0, warmup=100)
    assert schedule.rate(0) == pytest.approx(0.01)
    assert schedule.rate(100) == pytest.approx(1.0)
    assert schedule.rate(550) == pytest.approx(0.51, abs=0.01)
    assert schedule.rate(999) < 0.03


def test_after_a_restart_the_learning_rate_falls_again() -> None:
    restarts = (Restart(600, 1.0), Restart(1000, 0.5))
    once, twice = Schedule(600, 1, 1.0, 100), Schedule(1200, 1, 1.0, 100, restarts=restarts)
    # The first fall is that of a run that ends there.
    assert [twice.rate(step) for step in range(600)] == [once.rate(step) for step in range(600)]
    assert twice.rate(600) == pytest.approx(1.0)
    assert twice.rate(800) == pytest.approx(0.51)
    assert twice.rate(999) < 0.03
    assert twice.rate(1000) == pytest.approx(0.5)
    assert twice.rate(1199) < 0.02


_TWO_PROCESSES = """
import sys
from pathlib import Path

import torch
from workshop.demo.pretraining.steps import (
    Schedule,
    shared_map,
    leave_processes,
    run_steps,
)
from torch import distributed

torch.manual_seed(0)
module = torch.nn.Linear(3, 1)
rank = []


def loss(step, generator):
    inputs = torch.randn(4, 3, generator=generator)
    rank.append(inputs)
    return (module(inputs).float() - inputs.sum(-1, keepdim=True)).square().mean()


folder = Path(sys.argv[1])
run_steps(module, loss, Schedule(20, 4, 1e-2, warmup=1), folder, torch.device("cpu"))
number = distributed.get_rank()
called = []
results = shared_map(lambda n: called.append(n) or n * n, range(7), torch.device("cpu"))
assert results == [n * n for n in range(7)] and called == [[0, 1, 2, 3], [4, 5, 6]][number]
torch.save((module.weight.detach(), torch.cat(rank)), folder / f"{number}.pt")
leave_processes()
"""


def test_two_processes_share_the_work_and_end_with_equal_weights(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_TWO_PROCESSES, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc_per_node", "2", str(script), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(RECIPES.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        launch, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    (first, samples), (second, others) = (torch.load(tmp_path / f"{n}.pt") for n in (0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(samples, others)
    assert len((tmp_path / "losses.jsonl").read_text().splitlines()) == 1
