"""Learning rates, timesteps and loss weights.

Learning rates are functions of the step's number: there is no scheduler state to save, and every
step's rate is exact after resuming. diffusers' and transformers' schedulers start their warm-up at
0 and do not reach the cosine's end at the last step.
"""

from __future__ import annotations

import math

import torch

from .config import OptimiserSettings

_FINAL = 0.02  # of the full learning rate, at the end of a cosine


def learning_rate(settings: OptimiserSettings, step: int) -> float:
    """The learning rate of a step, counted from 1: linear warm-up, then constant, or a cosine that
    ends with the last step."""
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    if settings.learning_rate_schedule == "constant":
        return settings.learning_rate
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * cosine(progress)


def cosine(progress: float) -> float:
    """Factor of the learning rate: 1 at progress 0, falling to a fiftieth at progress 1."""
    return _FINAL + (1 - _FINAL) / 2 * (1 + math.cos(math.pi * progress))


def spread_timesteps(count: int, levels: int, generator: torch.Generator) -> torch.Tensor:
    """[levels] timesteps in 0 .. count - 1: a random one, and others at even distances from it."""
    first = torch.randint(0, count, (), generator=generator)
    return (first + torch.arange(levels) * count // levels) % count


def loss_weights(
    alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, weighting: str, snr_gamma: float
) -> torch.Tensor:
    """Factor of each sample's loss, [B].

    Noise is hard to predict where there is little of it: an unweighted loss is mostly about weak
    noise, though strong noise decides what an image shows.

    Args:
        alphas_cumprod: of the noise schedule, [T].
        timesteps: [B].
        weighting: "none", "min_snr" (arXiv 2303.09556) or "debiased" (arXiv 2310.08442).
        snr_gamma: of min_snr.
    """
    alphas = alphas_cumprod[timesteps.to(alphas_cumprod.device)].float()
    snr = alphas / (1 - alphas)
    if weighting == "min_snr":
        return snr.clamp(max=snr_gamma) / snr
    if weighting == "debiased":
        return snr.rsqrt()
    return torch.ones_like(snr)
