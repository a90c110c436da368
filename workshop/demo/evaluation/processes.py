"""The conditions shared among processes: on a CPU that is faster than one after the other.

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
from .classifier import Classifier, load_classifier
from .conditions import CheckOptions, Conditions, run_task, tasks
from .groups import DrawnSplit

_MAX_PROCESSES = 4  # each holds the models


@dataclass(frozen=True)
class SharedCheck:
    """What each process needs; it loads the models itself.

    Attributes:
        models: the set's folder.
        judge: the classifier's file.
        report: called with progress messages, in the process that samples.
    """

    models: Path
    judge: Path
    split: DrawnSplit
    options: CheckOptions
    report: Callable[[str], None]

    def run(self, processes: int) -> Conditions:
        """All tasks on the CPU, see `conditions.run_check`.

        Raises:
            EasyRefError: a part of the models that cannot be loaded.
        """
        context = multiprocessing.get_context("spawn")
        threads = max(1, (os.cpu_count() or 1) // processes)
        with ProcessPoolExecutor(processes, context, torch.set_num_threads, (threads,)) as pool:
            parts: Sequence[Conditions] = list(pool.map(self.run_one, tasks(self.options)))
        return {name: scores for part in parts for name, scores in part.items()}

    def run_one(self, task: str) -> Conditions:
        models, judge = _loaded(self.models, self.judge)
        return run_task(task, models, judge, self.split, self.options, self.report)


@cache
def _loaded(models: Path, judge: Path) -> tuple[DemoModels, Classifier]:
    """Once per process, not once per task."""
    return DemoModels(models), load_classifier(judge)


def processes_for(device: torch.device) -> int:
    """How many processes to use; one on an accelerator, which they would have to share."""
    return min(os.cpu_count() or 1, _MAX_PROCESSES) if device.type == "cpu" else 1
