"""A sampling run with identity: references as latents, one reference pass for each step.

    OUTER_SAMPLE      references are encoded for the run's size; an IdentityRun for each node
    PREPARE_SAMPLING  ComfyUI is told of the memory that features and reference pass take
    PREDICT_NOISE     a step: where a node's weight is not 0, an IdentityStep for its model calls

A step is one evaluation of the model by the sampler, with all its model calls: areas, windows of
frames, guidance that calls the model again. All of it lives in the run's own model options.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, get_wrappers_with_key

from ...easyref_core.adapter.identity import IdentityLora, reference_noise, relative_error
from ..host.progress import show_text
from ..host.reference_latents import CELL
from .batch_rows import BatchSlice
from .conditionings import RUN, Run
from .identity_pass import Features, NoisyReference, ReferenceText, reference_features
from .run import IDENTITY_KEY, OUTER_SAMPLE, watch_runs, with_option

if TYPE_CHECKING:
    from .conditionings import Entry
    from .identity import IdentityPatch

# In the transformer options of a run and of a step.
RUNS = "easyref_identity_runs"
STEPS = "easyref_identity_steps"


# Samplers that evaluate the noise level where a step ends, and again where the next one begins.
_REPEATING = ("sample_heun", "sample_exp_heun_2_x0", "sample_exp_heun_2_x0_sde")


@dataclass(frozen=True, eq=False)
class _Held:
    """Features of the step with this number, and its noise level where it was asked for."""

    number: int
    sigma: float | None
    features: Features


class IdentityRun:
    """One node's references in one run.

    Args:
        references: in the UNet's scale, on the CPU.
        repeats: the sampler ends a step at the noise level with which the next one begins, so that
            one pass serves both. Seeing that takes a wait for the device; these samplers wait too.

    Attributes:
        steps: at which the references acted.
        passes: reference passes, each over all references.
        errors: for each pass that replaces features which served several steps, their relative
            error; on the features' device.
    """

    def __init__(
        self, patch: IdentityPatch, references: Sequence[NoisyReference], repeats: bool = False
    ) -> None:
        self.patch = patch
        self.repeats = repeats
        self.steps = 0
        self.passes = 0
        self.errors: list[torch.Tensor] = []
        self._references: dict[torch.device, Sequence[NoisyReference]] = {}
        self._lora: dict[torch.device, Mapping[str, IdentityLora]] = {}
        self._held: dict[torch.device, _Held] = {}
        self._on_cpu = references

    def features(
        self, step: IdentityStep, model: Any, sigma: torch.Tensor, options: Mapping[str, Any]
    ) -> Features:
        """Of a step on the device of a model call, which has a thread of its own if there are
        several devices.

        Args:
            sigma: [1] of the call.
            options: its transformer options.
        """
        device, reuse = sigma.device, self.patch.reuse_steps
        held = self._held.get(device)
        old = None if held is None else held.features
        if held is not None and (step.number - held.number < reuse or step.is_at(held.sigma)):
            return held.features
        if reuse == 1:
            self._held.pop(device, None)  # two sets of features never need memory at once
            old = None
        if device not in self._references:
            self._references[device] = [reference.to(device) for reference in self._on_cpu]
        blocks = self.patch.acting_blocks
        references = self._references[device]
        new = reference_features(model, references, sigma, step.text, options, blocks)
        self.passes += 1
        if old is not None:
            self.errors.append(relative_error((new[block], old[block]) for block in new))
        self._held[device] = _Held(step.number, step.sigma, new)
        return new

    def lora(self, like: torch.Tensor) -> Mapping[str, IdentityLora]:
        """The node's LoRA on a device, as long as the run lasts.

        Args:
            like: a tensor with the device and dtype.
        """
        if like.device not in self._lora:
            given = self.patch.lora.items()
            self._lora[like.device] = {layer: weights.to(like) for layer, weights in given}
        return self._lora[like.device]

    def rest(self) -> None:
        """Give the features' memory back, at a step without references."""
        self._held.clear()

    def report(self) -> str | None:
        """What reusing features cost in exactness, None where none were reused."""
        if not self.errors:
            return None
        errors = torch.stack([error.float().cpu() for error in self.errors])
        return (
            f"{self.passes} reference passes for {self.steps} calls of the model; relative error "
            f"of reused features {float(errors.mean()):.1%}, at most {float(errors.max()):.1%}"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> IdentityRun:
        return self  # nodes that copy a run's options at every step would copy all it holds


@dataclass(frozen=True, eq=False)
class IdentityStep:
    """One node's references at one step.

    Attributes:
        number: of the step among those at which they act, from 1.
        scale: the node's weight at this noise level.
        text: with which the references are read.
        sigma: the noise level, None where it is not asked for.
    """

    run: IdentityRun
    number: int
    scale: float
    text: ReferenceText
    sigma: float | None = None

    def is_at(self, sigma: float | None) -> bool:
        """Whether the references look as at that noise level; then the prompt is the same too. Some
        samplers come to it by another formula, which rounds."""
        known = self.sigma is not None and sigma is not None
        return known and math.isclose(self.sigma, sigma, rel_tol=1e-5)

    def __deepcopy__(self, memo: dict[int, Any]) -> IdentityStep:
        return self


def watch_identity(model: ModelPatcher) -> None:
    """Add the wrappers of runs to a cloned model, once."""
    watch_runs(model)
    if not model.get_wrappers(WrappersMP.OUTER_SAMPLE, IDENTITY_KEY):
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, IDENTITY_KEY, _outer_sample)
        model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, IDENTITY_KEY, _prepare_sampling)
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, IDENTITY_KEY, _predict_noise)


def _outer_sample(
    executor: Callable[..., Any], noise: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """OUTER_SAMPLE, called once a run."""
    guider = executor.class_obj
    patches: Sequence[IdentityPatch] = get_wrappers_with_key(
        WrappersMP.APPLY_MODEL, IDENTITY_KEY, guider.model_options, is_model_options=True
    )
    acting = [patch for patch in dict.fromkeys(patches) if not patch.is_noop]
    _check_batch(acting, guider.model_options, noise.shape[0])
    given = dict(zip(OUTER_SAMPLE, (noise, *args), strict=False)) | kwargs
    function = getattr(given.get("sampler"), "sampler_function", None)
    repeats = getattr(function, "__name__", "") in _REPEATING
    runs = {patch: _start(patch, guider.model_patcher, noise, repeats) for patch in acting}
    # The guider's options are this run's own copy; the patcher's are never touched.
    guider.model_options = with_option(guider.model_options, RUNS, runs)
    result = executor(noise, *args, **kwargs)
    for run in runs.values():
        text = run.report()
        if text is not None:
            logging.info("EasyRef Identity: %s", text)
            show_text(text, run.patch.node)
    return result


def _check_batch(
    patches: Sequence[IdentityPatch], model_options: Mapping[str, Any], count: int
) -> None:
    """Refuse masks of another number than the run's latents, before anything is computed."""
    run: Run = model_options.get("transformer_options", {}).get(RUN, Run())
    batch = BatchSlice(count, origins=run.origins)
    for patch in patches:
        for weight in patch.weights:
            weight.check_batch(batch)


def _start(
    patch: IdentityPatch, model: ModelPatcher, noise: torch.Tensor, repeats: bool
) -> IdentityRun:
    """Encode the references, before ComfyUI loads the model of the run."""
    # As the model will read latents; a node may have chosen another format, which is not set yet.
    latent_format = model.get_model_object("latent_format")
    area = math.prod(noise.shape[-2:]) * CELL**2
    latents = patch.references.get(area, latent_format.latent_channels)
    references = [
        NoisyReference(
            latent_format.process_in(latent[None])[0], reference_noise(latent.shape, 0, number)
        )
        for number, latent in enumerate(latents)
    ]
    return IdentityRun(patch, references, repeats)


def _prepare_sampling(
    executor: Callable[..., Any],
    model: ModelPatcher,
    noise_shape: Sequence[int],
    conds: Any,
    model_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """PREPARE_SAMPLING: ComfyUI loads so much of the model that latents of this shape fit; it is
    given wider ones, by what features and the layers' longer keys and values take."""
    base = model.model
    batch, *rest, width = noise_shape
    handler = (model_options or {}).get("context_handler")
    if handler is not None and handler.dim == 0:  # a model call has the frames of a window
        batch = min(batch, handler.context_length)
    needed = sum(
        run.patch.working_bytes(base, [batch, *rest, width])
        for run in _runs(model_options).values()
    )
    if needed:
        column = base.memory_required([batch, *rest, 1])
        noise_shape = [*noise_shape[:-1], width + math.ceil(needed / column)]
    return executor(model, noise_shape, conds, model_options=model_options, **kwargs)


def _predict_noise(
    executor: Callable[..., torch.Tensor],
    x: torch.Tensor,
    timestep: torch.Tensor,
    model_options: Mapping[str, Any] | None = None,
    seed: Any = None,
) -> torch.Tensor:
    """PREDICT_NOISE, called once a step. x [B, C, H, W], timestep [B] sigmas."""
    guider, steps = executor.class_obj, {}
    for run in _runs(guider.model_options).values():
        scale = run.patch.scale(guider.inner_model.model_sampling, timestep)
        text = _text(guider.conds, timestep) if scale != 0 else None
        if text is None:
            run.rest()
            continue
        run.steps += 1
        sigma = float(timestep[0]) if run.repeats else None
        steps[run.patch] = IdentityStep(run, run.steps, scale, text, sigma)
    return executor(x, timestep, with_option(model_options, STEPS, steps), seed)


def _runs(model_options: Mapping[str, Any] | None) -> Mapping[IdentityPatch, IdentityRun]:
    return (model_options or {}).get("transformer_options", {}).get(RUNS, {})


def _text(conds: Mapping[str, Sequence[Entry]], timestep: torch.Tensor) -> ReferenceText | None:
    """The first prompt that acts at a step, of those that are not negative; None if there is none.

    Args:
        conds: a guider's conditionings by name, as the model reads them.
    """
    for name, entries in conds.items():
        for entry in entries or () if "negative" not in name else ():
            given = entry.get("model_conds", {})
            if "c_crossattn" in given and _acts(entry, timestep):
                pooled = given.get("y")
                return ReferenceText(
                    given["c_crossattn"].cond[:1], None if pooled is None else pooled.cond[:1]
                )
    return None


def _acts(entry: Entry, timestep: torch.Tensor) -> bool:
    """Whether a prompt with a range of steps acts now; ComfyUI compares, and waits, likewise."""
    start, end = entry.get("timestep_start"), entry.get("timestep_end")
    if start is None and end is None:
        return True
    sigma = float(timestep[0])
    return (start is None or sigma <= start) and (end is None or sigma >= end)
