"""A part's optimiser steps: `training.engine` with the demo's schedule, resumable.

The model that is left in the end is the averaged one (EMA).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from pydantic.dataclasses import dataclass
from torch import nn

from easyref_core.errors import EasyRefError
from easyref_core.training.checkpoints import Checkpoints
from easyref_core.training.engine import (
    Ema,
    StepOptions,
    TrainableModule,
    is_finite,
    run_optimiser,
)
from easyref_core.training.processes import make_accelerator, world_size
from easyref_core.training.progress import Losses
from easyref_core.training.recipe import STRICT, Count, Decay, Int, NonNegativeInt, Positive
from easyref_core.training.schedule import cosine

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
Loss = Callable[[int, torch.Generator], torch.Tensor]

_LOG_EVERY = 20
_SAVE_EVERY = 500


@dataclass(frozen=True, config=STRICT)
class Restart:
    """From `step`, counted from 0, the learning rate falls again, from a height of its own."""

    step: Count
    learning_rate: Positive


@dataclass(frozen=True, config=STRICT)
class Schedule:
    """Optimiser settings of a part.

    Attributes:
        steps: optimiser steps.
        batch: samples per step.
        learning_rate: after `warmup` steps; from there it falls as a cosine to a fiftieth.
        restarts: in the order of their steps.
        ema: decay of the averaged weights that are kept in the end.
        beta: AdamW's second decay; lower ones follow changing data faster.
    """

    steps: Count
    batch: Count
    learning_rate: Positive
    warmup: NonNegativeInt = 200
    ema: Decay = 0.998
    beta: Decay = 0.99
    seed: Int = 0
    restarts: tuple[Restart, ...] = ()

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        start, top = self.warmup, self.learning_rate
        for restart in self.restarts:
            if step < restart.step:
                return top * cosine((step - start) / (restart.step - start))
            start, top = restart.step, restart.learning_rate
        return top * cosine((step - start) / (self.steps - start))

    def decay(self, step: int) -> float:
        """The EMA decay of a step, counted from 0: lower at first, to forget the start."""
        return min(self.ema, (step + 1) / (step + 10))


class _LossModule(TrainableModule):
    """A module whose forward is its loss, so that processes exchange its gradients."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module = module
        self._loss = loss

    def checkpoint_name(self, name: str) -> str:
        """The parameter's name in the module."""
        return name.removeprefix("module.")

    def forward(self, step: int, generator: torch.Generator) -> torch.Tensor:
        return self._loss(step, generator)


def run_steps(
    module: nn.Module,
    loss: Loss,
    schedule: Schedule,
    folder: Path,
    device: torch.device,
    precision: str = "bf16",
) -> None:
    """Train the parameters of `module` that require gradients, and leave their averages in it.

    An interrupted run continues from its last checkpoint in `folder`. Under `torchrun` each process
    computes its share of every batch.

    Args:
        loss: (step, generator) -> loss, steps counted from 0. All its randomness comes from the
            generator, which the step, the schedule's seed and the process decide.
        folder: of `losses.jsonl` and the checkpoints.
        precision: "bf16", or "no" for float32.

    Raises:
        EasyRefError: a loss that is not a number; a checkpoint that is damaged, or was made with
            another schedule or module, or by another number of processes.
    """
    if device.type == "cuda" and device.index is not None:  # accelerate takes the current one
        torch.cuda.set_device(device)
    accelerator = make_accelerator(folder, precision, cpu=device.type == "cpu")
    rank = accelerator.process_index
    fresh_start = f"delete {folder} to train this part again from its start"
    checkpoints = Checkpoints(folder, schedule, 2, fresh_start, fresh_start, name="weights")
    checkpoint = checkpoints.newest(accelerator.num_processes)
    checkpoints.check(accelerator, checkpoint)
    model = _LossModule(module, loss)
    optimiser: Any = torch.optim.AdamW(
        model.trained_parameters().values(),
        lr=schedule.learning_rate,
        betas=(0.9, schedule.beta),
        weight_decay=0.01,
        fused=True,
    )
    ema = Ema(model)
    prepared, optimiser = accelerator.prepare(model, optimiser)
    first = 0
    if checkpoint is not None:
        first = checkpoint[0]
        checkpoints.restore(accelerator, prepared, optimiser, ema, checkpoint[1])
    if accelerator.is_main_process:
        checkpoints.clear(overwrite=checkpoint is None)
    losses = Losses(folder, first) if accelerator.is_main_process else None
    start = time.perf_counter()

    def step_loss(step: int) -> torch.Tensor:
        seed = schedule.seed * 1_000_003 + (step - 1) * 7_919 + rank * 104_729 + 1
        value = prepared(step - 1, torch.Generator().manual_seed(seed))
        if not is_finite(accelerator, value):
            raise EasyRefError(f"{folder.name}: the loss of step {step} is not a number.")
        return value

    def after_step(step: int, local_loss: torch.Tensor) -> None:
        last = step == schedule.steps
        if losses is not None and (step % _LOG_EVERY == 0 or last):
            value = float(local_loss)
            speed = (step - first) / (time.perf_counter() - start)
            losses.write(step, round(value, 6))
            line = f"{folder.name} {step}: loss {value:.4f}, {speed:.2f} steps/s"
            print(line, file=sys.stderr, flush=True)
        if step % _SAVE_EVERY == 0 or last:
            checkpoints.save(accelerator, prepared, optimiser, ema, step)

    options = StepOptions(
        schedule.steps,
        lambda step: schedule.rate(step - 1),
        max_grad_norm=1.0,
        ema_decay=lambda step: schedule.decay(step - 1),
    )
    run_optimiser(accelerator, prepared, optimiser, ema, options, first, step_loss, after_step)
    with torch.no_grad():
        for name, parameter in model.trained_parameters().items():
            parameter.copy_(ema.weights[name])
    module.eval()


def shared_map(
    function: Callable[[_Item], _Result], items: Sequence[_Item], device: torch.device
) -> list[_Result]:
    """`function` of each item; several processes on a CPU share the items."""
    if world_size() == 1 or device.type != "cpu":
        return [function(item) for item in items]
    with PartialState(cpu=True).split_between_processes(list(items)) as own:
        return gather_object([function(item) for item in own])


def leave_processes() -> None:
    """Under `torchrun`, end together: a process that is gone can take the others down."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
