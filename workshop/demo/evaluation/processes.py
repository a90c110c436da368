"""The check's tasks shared among processes: on a CPU they are quicker side by side than one by one.

Small models keep one core busy; more threads of one process mostly wait for each other.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ..models import DemoModels
from .check import CheckOptions, Conditions, run_task, tasks
from .groups import DrawnSplit
from .judge import Judge, load_judge

_MOST = 4  # each holds the models


@dataclass(frozen=True)
class SharedCheck:
    """What each process needs to know; it loads the models itself.

    Attributes:
        models: the set's folder.
        judge: the judge's file.
        report: told what is being made, in the process that makes it.
    """

    models: Path
    judge: Path
    split: DrawnSplit
    options: CheckOptions
    report: Callable[[str], None]

    def run(self, processes: int) -> Conditions:
        """All tasks on the CPU, see `check.run_check`.

        Raises:
            EasyRefError: a part of the models that cannot be loaded.
        """
        context = multiprocessing.get_context("spawn")
        threads = max(1, (os.cpu_count() or 1) // processes)
        with ProcessPoolExecutor(processes, context, torch.set_num_threads, (threads,)) as pool:
            parts: Sequence[Conditions] = list(pool.map(self.measured, tasks(self.options)))
        return {name: scores for part in parts for name, scores in part.items()}

    def measured(self, task: str) -> Conditions:
        models, judge = _loaded(self.models, self.judge)
        return run_task(task, models, judge, self.split, self.options, self.report)


@cache
def _loaded(models: Path, judge: Path) -> tuple[DemoModels, Judge]:
    """Once a process, not once a task."""
    return DemoModels(models), load_judge(judge)


def processes_for(device: torch.device) -> int:
    """How many are worth it; one on an accelerator, which they would have to share."""
    return min(os.cpu_count() or 1, _MOST) if device.type == "cpu" else 1
