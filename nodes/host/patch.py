"""Reference tokens in every cross-attention layer of a sampling run.

The patch is put together anew for each model call on a copy of the transformer options: whatever
stands on an attention slot is called first, then the references are added to its result. So it
composes with other packs in either order and leaves nothing behind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...easyref_core.adapter import TokenKeyValues
from ...easyref_core.attention import add_references
from ...easyref_core.errors import EasyRefError
from ...easyref_core.tokens import ReferenceTokens
from .key_values import KeyValueStore
from .layers import BlockKey
from .masks import Mask
from .run_info import KEY, Chunk, chunks_of_call, watch_runs, whole_latent

Slot = Callable[..., torch.Tensor]


@dataclass(frozen=True, eq=False)
class Application:
    """One Apply node's references on a model. Immutable; copies of the model share it.

    Attributes:
        tokens: of one group, or of one group a latent.
        key_values: what the adapter makes of them.
        blocks: layer name -> ComfyUI's attention slot.
        weight: how strongly the references act.
        start_percent, end_percent: part of the sampling in which they act.
        mask: where they act, None for everywhere.
    """

    tokens: ReferenceTokens
    key_values: KeyValueStore
    blocks: Mapping[str, BlockKey]
    weight: float
    start_percent: float = 0.0
    end_percent: float = 1.0
    mask: Mask | None = None

    def add_to(self, model: ModelPatcher) -> None:
        """Add the references to a cloned model."""
        watch_runs(model)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Application:
        return self

    def __call__(
        self,
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
        options = dict(transformer_options or {})
        model = executor.class_obj
        dtype = model.manual_cast_dtype or model.get_dtype()
        call = _Call(
            chunks=chunks_of_call(options),
            rows=x.shape[0],
            latent=(x.shape[-2], x.shape[-1]),
            whole=whole_latent(options, x),
            scale=self._scale(model, t, dtype),
            mask=self.mask,
            key_values=self.key_values.get(self.tokens, x.device, dtype),
        )
        replace = dict(options.get("patches_replace", {}))
        slots = dict(replace.get("attn2", {}))
        for layer, block in self.blocks.items():
            before = slots.get(block) or slots.get(block[:2])
            slots[block] = _ReferenceAttention(call, layer, before)
        replace["attn2"] = slots
        options["patches_replace"] = replace
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def _scale(self, model: Any, t: torch.Tensor, dtype: torch.dtype) -> float | torch.Tensor:
        """The weight, or where the window is not the whole run a tensor [B, 1, 1].

        Decided on the device: asking for the sigma's value would make the host wait every step.
        """
        if self.start_percent <= 0 and self.end_percent >= 1:
            return self.weight
        first, last = _window(model.model_sampling, self.start_percent, self.end_percent)
        inside = (t <= first) & (t >= last)
        return (inside * self.weight).to(dtype)[:, None, None]


@lru_cache(maxsize=32)
def _window(model_sampling: Any, start: float, end: float) -> tuple[float, float]:
    """First and last sigma of a part of the sampling; ComfyUI computes it on the host."""
    return model_sampling.percent_to_sigma(start), model_sampling.percent_to_sigma(end)


@dataclass(frozen=True, eq=False)
class _Call:
    """What all layers of one model call share."""

    chunks: Sequence[Chunk]
    rows: int
    latent: tuple[int, int]
    whole: tuple[int, int]
    scale: float | torch.Tensor
    mask: Mask | None
    key_values: TokenKeyValues

    def select(self, both: torch.Tensor) -> torch.Tensor:
        """[2 * groups, N, C], positive groups first -> one group a row [rows, N, C]."""
        groups, each = self.key_values.batch, self.rows // len(self.chunks)
        if groups not in (1, each):
            raise EasyRefError(
                f"The reference tokens hold {groups} groups, but the batch has {each} latents. "
                "Make the batch as large as the number of groups, or use one group for all."
            )
        parts = []
        for chunk in self.chunks:
            first = groups if chunk.negative else 0
            parts.append(both[first : first + groups].expand(each, -1, -1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def strength(self, height: int, width: int, like: torch.Tensor) -> float | torch.Tensor:
        """The scale with the mask at an attention resolution: a number, or [rows, 1 or T, 1]."""
        if self.mask is None:
            return self.scale
        each = self.rows // len(self.chunks)
        masks = [
            self.mask.at(height, width, self.whole, chunk.area, each, like) for chunk in self.chunks
        ]
        return torch.cat(masks) * self.scale


@dataclass(frozen=True, eq=False)
class _ReferenceAttention:
    """What stands on one attention slot during one model call."""

    call: _Call
    layer: str
    before: Slot | None

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        extra_options: Mapping[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """q [B, T, heads * head_dim] after projection; returns the same shape before to_out."""
        heads = extra_options["n_heads"]
        precision = extra_options.get("attn_precision")
        if self.before is not None:
            text = self.before(q, k, v, extra_options, *args, **kwargs)
        else:
            text = optimized_attention(
                q, k, v, heads, attn_precision=precision, transformer_options=extra_options
            )
        call = self.call
        uneven = call.rows % len(call.chunks) != 0
        if uneven or q.shape[0] != call.rows or text.shape != q.shape:
            _warn_once(q.shape[0], call.rows, len(call.chunks))
            return text
        key, value = (
            call.select(tensor).to(q.dtype) for tensor in call.key_values.layers[self.layer]
        )
        height, width = _resolution(extra_options, q.shape[1], call.latent)
        return add_references(
            text,
            q,
            key,
            value,
            call.strength(height, width, q),
            lambda q, k, v: optimized_attention(q, k, v, heads, attn_precision=precision),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> _ReferenceAttention:
        return self


def _resolution(
    options: Mapping[str, Any], positions: int, latent: tuple[int, int]
) -> tuple[int, int]:
    """(height, width) of an attention layer's positions."""
    shape = options.get("activations_shape")
    if shape is not None and shape[-2] * shape[-1] == positions:
        return shape[-2], shape[-1]
    height, width = latent
    while height * width > positions:
        height, width = (height + 1) // 2, (width + 1) // 2
    return (height, width) if height * width == positions else (1, positions)


@lru_cache(maxsize=8)
def _warn_once(found: int, rows: int, conditionings: int) -> None:
    logging.warning(
        "EasyRef: another node changed the batch (%d rows in attention, where the model was called "
        "with %d for %d conditionings), so references cannot be told apart there and are left out.",
        found,
        rows,
        conditionings,
    )
