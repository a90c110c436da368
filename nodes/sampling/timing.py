"""How strongly references act at a noise level, computed on the device.

Asking for a sigma's value would make the host wait for the device every step.
"""

from __future__ import annotations

import copy
import math
from functools import lru_cache
from typing import Any

import torch

from ...easyref_core.adapter.curves import WeightCurve
from .parts import Settings

# Knots at whole timesteps of the usual 1000, between which ComfyUI interpolates in log sigma too.
_KNOTS = 999


def rate(
    settings: Settings, model_sampling: Any, t: torch.Tensor, dtype: torch.dtype
) -> float | torch.Tensor:
    """The weight with window and curves: a number if it is the same for all, else [rows, 1, 1].

    Args:
        t: [rows] sigmas.
    """
    weight = settings.weight
    factors: list[torch.Tensor] = []
    start, end = settings.window
    if start > 0 or end < 1:
        first, last = _window(model_sampling, start, end)
        factors.append((t <= first) & (t >= last))
    for curve in settings.curves:
        if curve.constant is not None:
            weight *= curve.constant
        else:
            factors.append(over_sampling(curve, model_sampling, t))
    if not factors:
        return weight
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor
    return (product * weight).to(dtype)[:, None, None]


def over_sampling(curve: WeightCurve, model_sampling: Any, t: torch.Tensor) -> torch.Tensor:
    """A curve's factors [rows] at the sigmas t [rows]."""
    knots, factors = _table(curve, model_sampling, t.device)
    place = -t.float().clamp(min=1e-20).log()
    right = torch.searchsorted(knots, place).clamp(1, knots.shape[0] - 1)
    low, high = knots[right - 1], knots[right]
    share = ((place - low) / (high - low)).clamp(0, 1)
    return torch.lerp(factors[right - 1], factors[right], share)


@lru_cache(maxsize=32)
def _window(model_sampling: Any, start: float, end: float) -> tuple[float, float]:
    """First and last sigma of a part of the sampling."""
    schedule = _on_host(model_sampling)
    return schedule.percent_to_sigma(start), schedule.percent_to_sigma(end)


@lru_cache(maxsize=8)
def _on_host(model_sampling: Any) -> Any:
    """A copy with its tables on the CPU: each value asked of those on a device would be waited for,
    and a curve asks for a thousand."""
    copied = copy.deepcopy(model_sampling)
    return copied.to("cpu") if isinstance(copied, torch.nn.Module) else copied


@lru_cache(maxsize=32)
def _table(
    curve: WeightCurve, model_sampling: Any, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(-log sigma, factor) at every whole timestep and at the curve's own points, rising.

    `percent_to_sigma` is inverted by its values, since what is linear in percent differs: the
    timestep of discrete schedules, log sigma of EDM, the unshifted sigma of flow models.
    """
    own = ((place, _depth(model_sampling, place)) for place, _ in curve.points)
    knots: list[float] = []
    factors: list[float] = []
    for place, depth in sorted((*_grid(model_sampling), *own)):
        # A distilled model's schedule has steps; within one, the sigma cannot tell the place.
        if not knots or depth - knots[-1] > 1e-6:
            knots.append(depth)
            factors.append(curve.at(place))
    with torch.inference_mode(False):  # ordinary tensors, which a model in training can use too
        return torch.tensor(knots, device=device), torch.tensor(factors, device=device)


@lru_cache(maxsize=8)
def _grid(model_sampling: Any) -> tuple[tuple[float, float], ...]:
    return tuple((k / _KNOTS, _depth(model_sampling, k / _KNOTS)) for k in range(_KNOTS + 1))


def _depth(model_sampling: Any, place: float) -> float:
    """-log sigma; the ends stand for ComfyUI's "before all" and "after all", so just inside."""
    sigma = _on_host(model_sampling).percent_to_sigma(min(max(place, 1e-9), 1 - 1e-9))
    return -math.log(max(float(sigma), 1e-20))
