"""Times of a function, and rows of the table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        share: what is held against the bar.
        spread: half of the distance between its lowest and highest value.
        multiplications: the same share, counted: what no cache can save; None where the measure
            has no such limit.
    """

    measure: str
    share: float
    spread: float
    bar: float
    multiplications: float | None = None

    @property
    def met(self) -> bool:
        return self.share <= self.bar


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """On a CPU those of the process, on a GPU those on the wall."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    function()
    if device.type != "cpu":
        torch.cuda.synchronize(device)
    return clock() - start


def row(
    measure: str,
    times: list[float],
    whole: list[float],
    bar: float,
    multiplications: float | None = None,
) -> Row:
    """The share that `times` are of `whole`, run by run."""
    shares = [part / of for part, of in zip(times, whole, strict=True)]
    spread = (max(shares) - min(shares)) / 2
    return Row(measure, statistics.median(shares), spread, bar, multiplications)
