"""The training engine: optimiser steps on accelerate, for `easyref train` and for pretraining.

Where each loss comes from is the caller's. A step's learning rate and EMA decay are functions of
its number, so they need no state in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class TrainableModule(nn.Module):
    """A module that says under which names its weights are saved."""

    def checkpoint_name(self, name: str) -> str:
        """Name in checkpoints of the parameter `name`."""
        return name

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Checkpoint name -> parameter that requires gradients."""
        named = self.named_parameters()
        return {self.checkpoint_name(name): p for name, p in named if p.requires_grad}

    def checkpoint_state(
        self,
        state: Mapping[str, torch.Tensor] | None = None,
        replaced: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Weights to save, by checkpoint name, on the CPU; here those that are trained.

        Args:
            state: this module's whole state dict, where processes share its weights out.
            replaced: checkpoint name -> weight to save instead of the module's own, such as EMA
                weights.
        """
        weights = self.trained_parameters() | dict(replaced or {})
        return {name: w.detach().cpu().contiguous() for name, w in weights.items()}


class Ema:
    """Exponential moving averages of a module's trained parameters, by checkpoint name.

    Args:
        model: on its device; its parameters must be the ones that the optimiser updates.
    """

    def __init__(self, model: TrainableModule) -> None:
        self._parameters = [*model.trained_parameters().values()]
        self.weights = {
            name: p.detach().float().clone() for name, p in model.trained_parameters().items()
        }

    def update(self, decay: float) -> None:
        """Move every average by 1 - decay of the way towards its parameter."""
        get_ema_multi_avg_fn(decay)([*self.weights.values()], self._parameters, 0)

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from saved averages."""
        for name, average in self.weights.items():
            average.copy_(state[name].reshape(average.shape))


@dataclass(frozen=True)
class StepOptions:
    """How a run optimises.

    Attributes:
        steps: optimiser steps of the whole run.
        learning_rate: learning rate of a step; steps are counted from 1.
        accumulation: batches per optimiser step.
        max_grad_norm: None leaves gradients as they are.
        ema_decay: EMA decay of a step.
    """

    steps: int
    learning_rate: Callable[[int], float]
    accumulation: int = 1
    max_grad_norm: float | None = None
    ema_decay: Callable[[int], float] = lambda step: 0.0


def run_optimiser(
    accelerator: Accelerator,
    model: nn.Module,
    optimiser: Any,
    ema: Ema | None,
    options: StepOptions,
    first: int,
    loss: Callable[[int], torch.Tensor],
    on_step: Callable[[int, torch.Tensor], None],
) -> None:
    """Take the steps after step `first`.

    Args:
        model, optimiser: as `accelerator.prepare` returned them.
        loss: called `accumulation` times per step with the step's number; returns a scalar that
            went through `model`'s forward.
        on_step: called after each step with its number and this process's mean loss.
    """
    for step in range(first + 1, options.steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = options.learning_rate(step)
        total = torch.zeros((), device=accelerator.device)
        for _ in range(options.accumulation):
            with accelerator.accumulate(model):
                value = loss(step)
                accelerator.backward(value)
                if options.max_grad_norm is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
                optimiser.step()
                optimiser.zero_grad()
            total += value.detach()
        if ema is not None:
            ema.update(options.ema_decay(step))
        on_step(step, total / options.accumulation)


def is_finite(accelerator: Accelerator, loss: torch.Tensor) -> bool:
    """Whether every process's loss is a number. A collective call: all must stop together, or the
    others would wait forever."""
    return not accelerator.gather((~torch.isfinite(loss.detach()))[None]).any()
