"""A fixed number of optimiser steps, resumable, with an averaged model at the end."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from easyref_core.errors import EasyRefError
from easyref_core.files import write_atomically
from easyref_core.training.processes import started
from easyref_core.training.schedule import cosine

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")

_LOG_EVERY = 20
_SAVE_EVERY = 500


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        steps: optimiser steps.
        batch: samples a step.
        learning_rate: after `warmup` steps; from there it falls as a cosine to a fiftieth.
        restart: from this step, counted from 0, the rate falls anew from its top; 0 for never.
        ema: decay of the averaged weights that are kept in the end.
        beta: AdamW's second decay; lower ones follow changing data faster.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 200
    ema: float = 0.998
    beta: float = 0.99
    seed: int = 0
    restart: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        start, end = self.warmup, self.restart or self.steps
        if step >= end:
            start, end = end, self.steps
        return self.learning_rate * cosine((step - start) / (end - start))


def run_steps(
    module: nn.Module,
    loss: Callable[[int, torch.Generator], torch.Tensor],
    schedule: Schedule,
    folder: Path,
    device: torch.device,
) -> None:
    """Train what of `module` requires gradients, and leave the averaged weights in it.

    A run that was interrupted goes on from its last state in `folder`. Under `torchrun` each
    process takes its share of every batch.

    Args:
        loss: (step, generator) -> loss; all its chance comes from the generator, which the step,
            the schedule's seed and the process decide.
        folder: of `losses.jsonl` and the state.

    Raises:
        EasyRefError: a loss that is not a number; a state that is damaged, or was made with
            another schedule or module, or by another number of processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank, processes = _processes(device)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(
        trained.values(),
        lr=schedule.learning_rate,
        betas=(0.9, schedule.beta),
        weight_decay=0.01,
        fused=True,
    )
    average = {n: p.detach().clone() for n, p in trained.items()}
    first = _restore(folder / "state.pt", module, optimiser, average, schedule, processes)
    start = time.perf_counter()
    for step in range(first, schedule.steps):
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate(step)
        seed = schedule.seed * 1_000_003 + step * 7_919 + rank * 104_729 + 1
        generator = torch.Generator().manual_seed(seed)
        with torch.autocast(device.type, torch.bfloat16):
            value = loss(step, generator)
        value.backward()
        if processes > 1:
            _share_gradients(trained.values(), processes)
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        # The average forgets its start quickly.
        decay = min(schedule.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(trained.values()), 1 - decay)
        done = step + 1
        if not math.isfinite(value.detach()):
            raise EasyRefError(f"{folder.name}: the loss of step {done} is not a number.")
        if rank == 0 and (done % _LOG_EVERY == 0 or done == schedule.steps):
            speed = (done - first) / (time.perf_counter() - start)
            _log(folder, done, float(value.detach()), speed)
        if rank == 0 and (done % _SAVE_EVERY == 0 or done == schedule.steps):
            _save(folder / "state.pt", done, module, optimiser, average, schedule, processes)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(average[name])
    module.eval()


def in_shares(
    make: Callable[[_Item], _Made], items: Sequence[_Item], device: torch.device
) -> list[_Made]:
    """What `make` makes of each item; several processes on a CPU share the items."""
    rank, processes = _processes(device) if device.type == "cpu" else (0, 1)
    made = [make(item) for item in items[rank::processes]]
    if processes == 1:
        return made
    shares: list[Any] = [None] * processes
    distributed.all_gather_object(shares, made)
    return [shares[n % processes][n // processes] for n in range(len(items))]


def leave_processes() -> None:
    """Under `torchrun`: end together, as a process that is gone can take the others down."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def _log(folder: Path, step: int, loss: float, speed: float) -> None:
    with (folder / "losses.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "loss": round(loss, 6)}) + "\n")
    line = f"{folder.name} {step}: loss {loss:.4f}, {speed:.2f} steps/s"
    print(line, file=sys.stderr, flush=True)


def _processes(device: torch.device) -> tuple[int, int]:
    """(this process's number, how many there are)"""
    processes = started()
    if processes > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return int(os.environ.get("RANK", "0")), processes


def _share_gradients(parameters: Iterable[nn.Parameter], processes: int) -> None:
    """Every process goes on with the mean of all."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= processes
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _save(
    path: Path,
    step: int,
    module: nn.Module,
    optimiser: Any,
    average: Any,
    schedule: Schedule,
    processes: int,
) -> None:
    state = {
        "step": step,
        "processes": processes,
        "schedule": asdict(schedule),
        "weights": {n: p for n, p in module.named_parameters() if p.requires_grad},
        "optimiser": optimiser.state_dict(),
        "average": average,
    }
    write_atomically(path, lambda partial: torch.save(state, partial))


def _restore(
    path: Path,
    module: nn.Module,
    optimiser: Any,
    average: dict[str, torch.Tensor],
    schedule: Schedule,
    processes: int,
) -> int:
    """How many steps the state there has behind it; 0 where there is none."""
    if not path.is_file():
        return 0
    anew = f"Delete {path.parent} to train this part anew."
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        made, weights, makers = state["schedule"], state["weights"], state["processes"]
    except Exception as error:  # what a damaged file leads to is anybody's guess
        raise EasyRefError(f"{path} cannot be read ({error}). {anew}") from error
    if makers != processes:
        raise EasyRefError(
            f"{path} was made by processes: {makers}, and now there are {processes}, which would "
            f"see other samples. Start as many as before, or: {anew}"
        )
    now = asdict(schedule)
    changed = [
        f"{name}: {made.get(name)} -> {now[name]}" for name in now if made.get(name) != now[name]
    ]
    if changed:
        raise EasyRefError(
            f"{path} was made with another recipe ({'; '.join(changed)}). Restore it to go on, or: "
            f"{anew}"
        )
    if {n: w.shape for n, w in weights.items()} != {n: w.shape for n, w in average.items()}:
        raise EasyRefError(f"{path} was made for another model than is trained now. {anew}")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
                average[name].copy_(state["average"][name])
    optimiser.load_state_dict(state["optimiser"])
    return state["step"]
