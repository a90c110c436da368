"""Identity on a diffusers pipeline: the UNet's self-attention also attends to the references.

A run goes to the pipeline as `cross_attention_kwargs={"identity": run}`, so that the UNet keeps
nothing of it. Before each call inside the window, the UNet reads the references' latents, noised
to the same level, in a pass of its own (`reference_pass.py`), and its self-attention layers
attend to what they got there (`adapter/identity.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ..adapter.layer_weights import LayerWeights
from ..adapter.stages import Window
from ..errors import EasyRefError
from ..untrusted import kind_of
from .adapter_layer import CHILD
from .identity_latents import IdentityLatents
from .identity_run import IdentityRun
from .layers import IDENTITY
from .reference_pass import UNetCall
from .unet_layers import attentions, check_layers, identity_hook, make_easyref, make_plain

_SIGNATURE = inspect.signature(UNet2DConditionModel.forward)


def attach_identity(unet: UNet2DConditionModel) -> None:
    """Let a UNet read references for runs with an `IdentityRun`; other calls stay as they are. With
    an adapter or without, before or after it.

    Raises:
        EasyRefError: its layers are not diffusers' own. Nothing is changed then.
    """
    if identity_hook(unet) is not None:
        return
    check_layers(attentions(unet), "attach_identity")
    for attn in attentions(unet).values():
        make_easyref(attn)
    unet.register_forward_pre_hook(_before_call, with_kwargs=True)


def detach_identity(unet: UNet2DConditionModel) -> None:
    """Undo `attach_identity`.

    Raises:
        EasyRefError: identity is not attached.
    """
    number = identity_hook(unet)
    if number is None:
        raise EasyRefError("Identity is not attached to this UNet. Call attach_identity first.")
    del unet._forward_pre_hooks[number]
    unet._forward_pre_hooks_with_kwargs.pop(number, None)
    for attn in attentions(unet).values():
        if CHILD not in attn._modules:
            make_plain(attn)


def identity_run(
    pipe: Any,
    references: IdentityLatents | Sequence[IdentityLatents],
    weight: float = 1.0,
    start: float = 0.0,
    end: float = 1.0,
    fade: float = 0.0,
    reuse_steps: int = 1,
    layer_weights: LayerWeights | None = None,
) -> IdentityRun:
    """A run of a pipeline; pass it once, as `cross_attention_kwargs={"identity": run}`. Under
    guidance the references act on the conditional rows alone.

    Args:
        references: of `encode_identity`; one group for all prompts, or one for each.
        weight, start, end, fade: see `Window`; parts of the sampling are counted by noise level, as
            ComfyUI counts them, so 0.5 is timestep 500.
        reuse_steps: how many steps a reference pass serves.
        layer_weights: factors of the weight; all layers by default.

    Raises:
        EasyRefError: identity is not attached to the UNet; the scheduler's noise is not SDXL's; a
            value out of its range; layers that the UNet does not have.
    """
    if identity_hook(pipe.unet) is None:
        raise EasyRefError(
            "Identity is not attached to this UNet. Call attach_identity(pipe.unet)."
        )
    run = IdentityRun(
        references,
        _alphas(pipe.scheduler),
        Window(start, end, weight, fade),
        reuse_steps,
        LayerWeights() if layer_weights is None else layer_weights,
        lambda rows: _conditional(pipe, rows),
    )
    run.layers(pipe.unet)
    return run


def _before_call(unet: UNet2DConditionModel, args: tuple, options: dict) -> tuple | None:
    """Hook before each call of the UNet: with a run, the pass of its references comes first."""
    kwargs = options.get("cross_attention_kwargs") or {}
    run = kwargs.get(IDENTITY)
    if run is None:
        return None
    if not isinstance(run, IdentityRun):
        raise EasyRefError(
            f"cross_attention_kwargs holds an identity that is {kind_of(run)}; what identity_run "
            "returns is needed."
        )
    given = _SIGNATURE.bind(unet, *args, **options).arguments
    call = UNetCall(
        given["sample"],
        torch.as_tensor(given["timestep"], device=given["sample"].device),
        given["encoder_hidden_states"],
        given.get("added_cond_kwargs") or {},
        given.get("timestep_cond"),
        kwargs.get("scale"),
    )
    features = run.features(unet, call)
    rest = {name: value for name, value in kwargs.items() if name != IDENTITY}
    if features is not None:
        rest[IDENTITY] = features
    return args, {**options, "cross_attention_kwargs": rest or None}


_before_call.reads_identity = True  # type: ignore[attr-defined]  # see `identity_hook`


def _alphas(scheduler: Any) -> torch.Tensor:
    """The scheduler's alphas_cumprod, [T]; raise EasyRefError where its noise is another."""
    alphas = getattr(scheduler, "alphas_cumprod", None)
    settings = getattr(scheduler, "config", {})
    continuous = settings.get("timestep_type") == "continuous"
    if alphas is None or continuous or settings.get("use_flow_sigmas"):
        raise EasyRefError(
            f"The scheduler {type(scheduler).__name__} does not count SDXL's timesteps, so the "
            "references cannot get the noise of a step. Use one of SDXL's own, such as "
            "EulerDiscreteScheduler or DPMSolverMultistepScheduler with usual settings."
        )
    return alphas


def _conditional(pipe: Any, rows: int) -> list[slice]:
    """The conditional rows of a pipeline's call, [negative, conditional, perturbed]."""
    guided = int(pipe.do_classifier_free_guidance)
    parts = 1 + guided + bool(getattr(pipe, "do_perturbed_attention_guidance", False))
    if rows % parts:
        raise EasyRefError(
            f"The UNet was called with {rows} rows, which are not {parts} of each prompt: "
            f"{type(pipe).__name__} has a guidance that identity does not know."
        )
    length = rows // parts
    return [slice(part * length, (part + 1) * length) for part in range(guided, parts)]
