"""A batch of trials to images; what fails for a reason of its own is marked."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from ...errors import EasyRefError
from ..groups import GroupPicture
from ..trials import Trial
from . import Generated
from .failures import why
from .pipeline import GenerationPipeline


@dataclass(frozen=True, eq=False)
class TextStates:
    """What the UNet attends to: [B, T, W] each, and further arguments of the pipeline."""

    text: torch.Tensor
    negative: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a method knows of a trial before it is sampled.

    Attributes:
        condition: tokens, image embeddings or a LoRA's file.
        kind: only trials of one kind are sampled together.
        seconds: by stage.
    """

    condition: Any = None
    kind: Hashable = None
    seconds: dict[str, float] = field(default_factory=dict)


Steer = Callable[[Sequence[Any], TextStates], TextStates]
"""Adds the conditions of a batch to its text states."""


def opened(references: Sequence[GroupPicture]) -> Iterator[Image.Image]:
    """The pictures of references, one after the other.

    Raises:
        EasyRefError: there is none, or one cannot be read.
    """
    if not references:
        raise EasyRefError("There is no reference picture.")
    for picture in references:
        yield picture.source.open()


def generate_batch(
    base: GenerationPipeline,
    trials: Sequence[Trial],
    prepare: Callable[[Trial], Prepared],
    steer: Steer,
    begin: Callable[[Any], None] = lambda condition: None,
) -> list[Generated]:
    """Generate trials of one variant.

    Args:
        prepare: raises EasyRefError for what concerns this trial alone.
        begin: called with a condition before trials of its kind are sampled; not timed, like the
            loading of other models.

    Returns:
        One for each trial, in order.
    """
    _ = base.pipe  # what cannot be loaded concerns all trials
    results: dict[int, Generated] = {}
    kinds: dict[Hashable, list[int]] = {}
    prepared: dict[int, Prepared] = {}
    for number, trial in enumerate(trials):
        try:
            prepared[number] = prepare(trial)
            kinds.setdefault(prepared[number].kind, []).append(number)
        except Exception as error:
            results[number] = Generated(
                None, error=why(error, base.device, "prepare its references")
            )
    for numbers in kinds.values():
        conditions = [prepared[n].condition for n in numbers]
        images = _sample(base, [trials[n] for n in numbers], conditions, steer, begin)
        for number, image in zip(numbers, images, strict=True):
            seconds = prepared[number].seconds | image.seconds
            results[number] = Generated(image.image, seconds, image.error)
    return [results[number] for number in range(len(trials))]


def _sample(
    base: GenerationPipeline,
    trials: Sequence[Trial],
    conditions: Sequence[Any],
    steer: Steer,
    begin: Callable[[Any], None],
) -> list[Generated]:
    """Sample a batch; one that does not fit into memory image by image."""
    try:
        begin(conditions[0])
        start = time.perf_counter()
        latents = _latents(base, trials, conditions, steer)
        base.wait()
        sampled = time.perf_counter()
        images = [_decoded(base, row) for row in latents.split(1)]  # which ends on the CPU
        times = {"sample": sampled - start, "decode": time.perf_counter() - sampled}
        seconds = {stage: spent / len(trials) for stage, spent in times.items()}
        return [Generated(i.image, seconds, i.error) for i in images]
    except Exception as error:
        reason = why(error, base.device, "sample the image")
    base.free_cache()  # not before the error is gone, which holds tensors
    if len(trials) == 1:
        return [Generated(None, error=reason)]
    pairs = zip(trials, conditions, strict=True)
    return [_sample(base, [trial], [condition], steer, begin)[0] for trial, condition in pairs]


@torch.no_grad()
def _latents(
    base: GenerationPipeline, trials: Sequence[Trial], conditions: Sequence[Any], steer: Steer
) -> torch.Tensor:
    """[B, 4, h, w], unscaled by the VAE; each row's noise depends on its trial's seed alone."""
    pipe, settings, variant = base.pipe, base.settings, trials[0].variant
    text, negative, pooled, negative_pooled = pipe.encode_prompt(
        [trial.prompt for trial in trials],
        device=base.device,
        negative_prompt=[settings.negative] * len(trials),
    )
    states = steer(conditions, TextStates(text, negative))
    return pipe(
        prompt_embeds=states.text,
        negative_prompt_embeds=states.negative,
        pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=negative_pooled,
        height=settings.size,
        width=settings.size,
        num_inference_steps=variant.steps,
        guidance_scale=variant.guidance,
        latents=_noise(base, [trial.seed for trial in trials]).to(states.text),
        output_type="latent",
        **states.options,
    ).images


def _noise(base: GenerationPipeline, seeds: Sequence[int]) -> torch.Tensor:
    """[B, 4, h, w], as diffusers draws it; in float32 on the CPU, so that all dtypes and devices
    get the same."""
    side = base.settings.size // base.pipe.vae_scale_factor
    shape = (1, base.pipe.unet.config.in_channels, side, side)
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(rows)


@torch.no_grad()
def _decoded(base: GenerationPipeline, latents: torch.Tensor) -> Generated:
    """The image of latents [1, 4, h, w]; an error instead of a black one."""
    if not torch.isfinite(latents).all():
        return Generated(None, error=_not_numbers("latents", base))
    vae = base.pipe.vae
    latents = latents.to(vae.dtype) / vae.config.scaling_factor
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        like = {"device": latents.device, "dtype": latents.dtype}
        mean, std = (torch.tensor(n, **like).view(1, -1, 1, 1) for n in (mean, std))
        latents = latents * std + mean
    pixels = vae.decode(latents, return_dict=False)[0]
    if not torch.isfinite(pixels).all():
        return Generated(None, error=_not_numbers("pixels", base))
    return Generated(base.pipe.image_processor.postprocess(pixels, output_type="pil")[0])


def _not_numbers(what: str, base: GenerationPipeline) -> str:
    return (
        f"The image's {what} hold values that are not numbers (NaN or infinite) in "
        f"{base.settings.dtype}. Choose bfloat16 or float32; if it is float32, a weight file is "
        "damaged or a weight far too high."
    )
