"""Times of a function, and rows of the table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Row:
    """One line of the table of shares.

    Attributes:
        share: what is held against the bar.
        spread: half of the distance between its lowest and highest value.
        bar: None for a peer's.
        multiplications: the same share, counted: what no cache can save; None where the measure
            has no such limit.
        bytes: likewise, of weights, keys and values that have to be read.
        below: the lowest share of the peers', which this one must be below; None without peers.
    """

    measure: str
    share: float
    spread: float
    bar: float | None
    multiplications: float | None = None
    below: float | None = None
    bytes: float | None = None

    @property
    def met(self) -> bool:
        within = self.bar is None or self.share <= self.bar
        return within and (self.below is None or self.share < self.below)


@dataclass(frozen=True)
class Amount:
    """One line of the table of what is no share.

    Attributes:
        unit: "" for a ratio.
        spread: half of the distance between its lowest and highest value.
        bar: None where it only shows what another is made of.
    """

    measure: str
    value: float
    unit: str
    bar: float | None = None
    spread: float = 0.0

    @property
    def met(self) -> bool:
        return self.bar is None or self.value <= self.bar


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """On a CPU those of the process, on a GPU those on the wall."""
    import torch

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
    bar: float | None,
    multiplications: float | None = None,
    bytes_: float | None = None,
) -> Row:
    """The share that `times` are of `whole`, run by run."""
    shares = [part / of for part, of in zip(times, whole, strict=True)]
    middle = statistics.median(shares)
    return Row(measure, middle, spread(shares), bar, multiplications, bytes=bytes_)


def amount(measure: str, values: Sequence[float], unit: str, bar: float | None = None) -> Amount:
    """The median of what was found."""
    return Amount(measure, statistics.median(values), unit, bar, spread(values))


def spread(values: Sequence[float]) -> float:
    """Half of the distance between the lowest and the highest value."""
    return (max(values) - min(values)) / 2
