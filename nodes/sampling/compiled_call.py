"""Model calls with references on a compiled model.

The last wrapper of a call: it sees what all others put into the transformer options.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP, get_all_wrappers

from ..host.compiled import UNET, CannotCompile, compiled_as, is_compiled, uncompiled
from ..host.unet_layers import BlockKey
from .layer import ReferenceAttention
from .layer_operator import Layers, call_with_references, layer_name, running
from .run import patches_of

ACT = "easyref_references_act"
"""Transformer option of a model call in which references act."""


def run_compiled(
    executor: Callable[..., torch.Tensor],
    x: torch.Tensor,
    t: torch.Tensor,
    c_concat: Any = None,
    c_crossattn: Any = None,
    control: Any = None,
    transformer_options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """ComfyUI's APPLY_MODEL wrapper. x [B, C, H, W] latents, t [B] sigmas."""
    options, model = transformer_options or {}, executor.class_obj
    given = (x, t, c_concat, c_crossattn, control, options)
    if ACT not in options or not is_compiled(model, options):
        return executor(*given, **kwargs)
    try:
        # All slots of all Apply nodes, whether they act or not, so that one trace serves all calls.
        patches = patches_of({"transformer_options": options})
        blocks = sorted({block for patch in patches for block in patch.blocks.values()})
        layers = _layers(options, blocks)
        unet, compiled = compiled_as(model, options, call_with_references)
        call = _call_of(executor, _CompiledUnet(unet, compiled, blocks))
        with running(layers):
            return call(*given, **kwargs)
    except CannotCompile as reason:
        said = str(reason)
    with uncompiled(said):
        return executor(*given, **kwargs)


class _CompiledUnet:
    """Stands for the UNet in one model call, with the operator on these slots."""

    def __init__(
        self, unet: Any, compiled: Callable[..., torch.Tensor], blocks: Sequence[BlockKey]
    ) -> None:
        self._unet = unet
        self._call = partial(
            compiled, unet, tuple(layer_name(block) for block in blocks), tuple(blocks)
        )

    def __call__(
        self, *args: Any, transformer_options: dict[str, Any], **kwargs: Any
    ) -> torch.Tensor:
        return self._call(args, kwargs, transformer_options=transformer_options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)


def _call_of(executor: Any, unet: _CompiledUnet) -> Callable[..., torch.Tensor]:
    """ComfyUI's method behind all wrappers, with another UNet. It is put on a copy of the model,
    which other threads use as well."""
    method, model = executor.original, executor.class_obj
    if executor.idx + 1 != len(executor.wrappers) or getattr(method, "__self__", None) is not model:
        raise CannotCompile("another node calls the model without ComfyUI's own sampling")
    copied = copy.copy(model)
    others = {name: module for name, module in model._modules.items() if name != UNET}
    vars(copied).update({"_modules": others, UNET: unet})
    return partial(method.__func__, copied)


def _layers(options: Mapping[str, Any], blocks: Sequence[BlockKey]) -> Layers:
    """What acts on each of these slots.

    Raises:
        CannotCompile: other nodes changed what the UNet does; a trace would keep their patches.
    """
    replaced = {kind: slots for kind, slots in options.get("patches_replace", {}).items() if slots}
    slots = replaced.pop("attn2", {})
    if (
        replaced
        or not set(slots) <= set(blocks)
        or options.get("patches")
        or "optimized_attention_override" in options
        or get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
    ):
        raise CannotCompile("another node patches it as well")
    return {layer_name(block): _chain(slots.get(block)) for block in blocks}


def _chain(slot: Any) -> Sequence[ReferenceAttention]:
    """The Apply nodes on a slot, in order."""
    found = []
    while isinstance(slot, ReferenceAttention):
        found.append(slot)
        slot = slot.before
    if slot is not None:
        raise CannotCompile("another node patches it as well")
    return found[::-1]
