"""Stages of the sampling: reference tokens act in one window of it, identity in another.

"Squeezing Capacity from Multimodal LLMs" (arXiv 2605.26111) samples with the MLLM's features alone
while t >= 0.95, with both while t >= 0.85, and with the VAE's alone below, t = 1 being pure noise.
Its model is FLUX.1-dev, whose t does not mean on SDXL what it means there, so two presets carry the
thresholds over: to the same signal-to-noise ratio, and to the same share of the steps. Two more
keep the tokens to the end, as EasyRef's carry details of the character too: `always`, and `late`
with identity in the second half, at half of its cost.

A place in the sampling is counted as ComfyUI counts percent: 0 is before the first step, 1 after
the last; a step of SDXL at timestep t is at 1 - t / 999.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from ..errors import EasyRefError
from ..untrusted import number, shown, text
from .curves import MAX_FACTOR, Points

_IDENTITY_FROM, _TOKENS_UNTIL = 0.95, 0.85  # the paper's tau1 and tau2
_FLUX_MU = 1.15  # FLUX's shift of its schedule at 1024x1024
_TIMESTEPS, _FIRST_BETA, _LAST_BETA = 1000, 0.00085, 0.012  # SDXL's noise schedule
_HINT = "0 is the start of the sampling and 1 its end."


@dataclass(frozen=True)
class Window:
    """A weight within a part of the sampling, and 0 outside.

    Attributes:
        start, end: places 0..1. With a start of 0 it acts from the very first step on, with an end
            of 1 to the very last.
        weight: within, -10..10.
        fade: length 0..1 of the linear ramps whose middle is at `start` and at `end`; there is none
            at the start and the end of the sampling. Of two windows of one weight that meet at a
            place, the sum stays this weight there. 0 for none.

    Raises:
        EasyRefError: no numbers, out of their range, or a start after the end.
    """

    start: float = 0.0
    end: float = 1.0
    weight: float = 1.0
    fade: float = 0.0

    def __post_init__(self) -> None:
        limits = {"weight": (-MAX_FACTOR, MAX_FACTOR, "")}
        for name in ("start", "end", "weight", "fade"):
            low, high, hint = limits.get(name, (0, 1, _HINT if name != "fade" else ""))
            value = number(getattr(self, name), f"The {name} of a window", low, high, hint)
            object.__setattr__(self, name, value)
        check_order("The window's start", self.start, "its end", self.end)

    @property
    def is_zero(self) -> bool:
        """Whether it acts nowhere: the window is empty or its weight is 0."""
        return self.start == self.end or self.weight == 0

    @property
    def points(self) -> Points:
        """The weight as straight lines between points, at places that rise from 0 to 1.

        What `WeightCurve` takes; not for a window without `fade`, which has no slopes.
        """
        bends = {*_ends_of_ramp(self.start, self.fade), *_ends_of_ramp(self.end, self.fade)}
        return tuple((p, self.at(p)) for p in sorted({0.0, 1.0, *(b for b in bends if 0 < b < 1)}))

    def at(self, place: float) -> float:
        """The weight at a place; both boundaries belong to the window."""
        if self.is_zero:
            return 0.0
        if self.fade == 0:
            return self.weight if self.start <= place <= self.end else 0.0
        begun = _ramp(place, self.start, self.fade) if self.start > 0 else 1.0
        ended = _ramp(place, self.end, self.fade) if self.end < 1 else 0.0
        # The window averaged over the length of a ramp, so it holds for shorter windows too.
        return self.weight * (begun - ended)


@dataclass(frozen=True)
class Stages:
    """When reference tokens act, and when identity does."""

    tokens: Window
    identity: Window


def check_order(start_name: str, start: float, end_name: str, end: float) -> None:
    """Raise EasyRefError where a window starts after its end."""
    if start > end:
        raise EasyRefError(
            f"{start_name} ({start:g}) is after {end_name} ({end:g}), so nothing would ever act. "
            "Swap them, or set the weight to 0."
        )


def parse_stages(written: str) -> Stages | None:
    """Read stages written as a preset's name or as two windows, "0-0.36/0.14-1": tokens, identity.

    Returns:
        None for an empty text: tokens and identity act during the whole sampling.

    Raises:
        EasyRefError: it is neither, or a window is not in order.
    """
    written = text(written, "stages").strip()
    if not written:
        return None
    if written in PRESETS:
        return PRESETS[written]
    windows = written.split("/")
    if len(windows) != 2:
        raise _unreadable(written)
    return Stages(*(_parse_window(window, written) for window in windows))


def _parse_window(window: str, written: str) -> Window:
    start, _, end = window.partition("-")
    try:
        places = float(start), float(end)
    except ValueError:
        raise _unreadable(written) from None
    return Window(*places)


def _unreadable(written: str) -> EasyRefError:
    return EasyRefError(
        f"stages: {shown(written)} cannot be read. Write {', '.join(PRESETS)}, or the windows of "
        "the tokens and of the identity as parts of the sampling, such as 0-0.36/0.14-1."
    )


def _ends_of_ramp(middle: float, length: float) -> tuple[float, float]:
    return middle - length / 2, middle + length / 2


def _ramp(place: float, middle: float, length: float) -> float:
    """From 0 to 1 around `middle`; 0 and 1 to the bit outside."""
    first, last = _ends_of_ramp(middle, length)
    if place <= first:
        return 0.0
    return 1.0 if place >= last else (place - first) / (last - first)


def _at_same_noise(t: float) -> float:
    """SDXL's place with the signal-to-noise ratio of a flow model's t, which mixes noise and
    picture as t to 1 - t."""
    depth = math.log(t / (1 - t))
    levels = _log_sigmas()
    after = bisect_left(levels, depth)
    if after in (0, len(levels)):  # beyond the schedule
        return 0.0 if after else 1.0
    low, high = levels[after - 1], levels[after]
    return 1 - (after - 1 + (depth - low) / (high - low)) / (_TIMESTEPS - 1)


@cache
def _log_sigmas() -> tuple[float, ...]:
    """log sigma of SDXL's timesteps, rising; sigma is noise to picture."""
    first, last = math.sqrt(_FIRST_BETA), math.sqrt(_LAST_BETA)
    found, kept = [], 1.0
    for timestep in range(_TIMESTEPS):
        kept *= 1 - (first + (last - first) * timestep / (_TIMESTEPS - 1)) ** 2
        found.append(0.5 * math.log((1 - kept) / kept))
    return tuple(found)


def _at_same_step(t: float) -> float:
    """The share of FLUX's steps that is done at t: t = e^mu / (e^mu + done / (1 - done))."""
    ratio = math.exp(_FLUX_MU) * (1 - t) / t
    return ratio / (1 + ratio)


def _preset(place_of: Callable[[float], float]) -> Stages:
    """The paper's stages at these places, in whole percent."""
    tokens_until, identity_from = (round(place_of(t), 2) for t in (_TOKENS_UNTIL, _IDENTITY_FROM))
    return Stages(Window(end=tokens_until), Window(start=identity_from))


PRESETS: Mapping[str, Stages] = {
    "always": Stages(Window(), Window()),
    "late": Stages(Window(), Window(start=0.5)),
    "noise": _preset(_at_same_noise),
    "steps": _preset(_at_same_step),
}
