"""How the learning rate goes over a run, and how much a noise level's loss counts."""

from __future__ import annotations

import math

import torch

from .config import OptimiserSettings

_LAST = 0.02  # of the full rate is what a cosine ends with


def learning_rate(settings: OptimiserSettings, step: int) -> float:
    """The learning rate of a step, counted from 1: a straight warm-up, then constant or falling as
    a cosine until the last step."""
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    if settings.learning_rate_schedule == "constant":
        return settings.learning_rate
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * cosine(done)


def cosine(done: float) -> float:
    """The share of the full learning rate that is left; falls from 1 to a fiftieth.

    Args:
        done: 0 at the start, 1 at the end.
    """
    return _LAST + (1 - _LAST) / 2 * (1 + math.cos(math.pi * done))


def spread_timesteps(count: int, levels: int, generator: torch.Generator) -> torch.Tensor:
    """Timesteps [levels] of 0 .. count - 1: one by chance, the others at even distances from it."""
    first = torch.randint(0, count, (), generator=generator)
    return (first + torch.arange(levels) * count // levels) % count


def loss_weights(
    levels: torch.Tensor, timesteps: torch.Tensor, weighting: str, snr_gamma: float
) -> torch.Tensor:
    """What each sample's squared error on the noise is multiplied with, [B].

    Little noise is hard to tell from the picture, much noise is easy to see: an unweighted loss is
    mostly about the former, though what a picture shows is decided in the latter.

    Args:
        levels: cumulative products of the noise schedule's alphas, [T].
        timesteps: [B].
        weighting: "none", "min_snr" (arXiv 2303.09556) or "debiased" (arXiv 2310.08442).
        snr_gamma: of min_snr.
    """
    level = levels[timesteps.to(levels.device)].float()
    ratio = level / (1 - level)
    if weighting == "min_snr":
        return ratio.clamp(max=snr_gamma) / ratio
    if weighting == "debiased":
        return ratio.rsqrt()
    return torch.ones_like(ratio)
