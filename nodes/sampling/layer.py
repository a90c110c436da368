"""One cross-attention layer: the query, cached keys and values, scale and mask, added to the text.

Whatever stands on ComfyUI's attention slot is called first, then the references are added to its
result, so this composes with other packs in either order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention

from ...easyref_core.adapter.attention import ReferenceShare, add_shares
from ..host.attention import reference_attention
from ..host.unet_layers import BlockKey, group_of
from .batch_rows import Size, warn_of_rows
from .model_call import EffectOnRows, ModelCall, Scale

Slot = Callable[..., torch.Tensor]

Addend = tuple[EffectOnRows, Scale, torch.Tensor | None]
"""An effect with its scale, a number or [rows, P, 1, 1], at the layer's positions [P], None for all
of them."""


def add_to_layers(options: dict[str, Any], blocks: Mapping[str, BlockKey], call: ModelCall) -> None:
    """Put a model call's references on the attention slots.

    Args:
        options: the call's own copy of the transformer options; changed.
        blocks: layer name -> ComfyUI's attention slot.
    """
    scales = LayerScales(call)
    replace = dict(options.get("patches_replace", {}))
    slots = dict(replace.get("attn2", {}))
    for layer, block in blocks.items():
        group = group_of(block)
        if any(effect.effect.at_layers(group) != 0 for effect in call.effects):
            before = slots.get(block) or slots.get(block[:2])
            slots[block] = ReferenceAttention(scales, layer, group, before)
    replace["attn2"] = slots
    options["patches_replace"] = replace


class LayerScales:
    """Scale and positions of each effect, shared by the layers of one size with the same weights.

    Belongs to one model call, which runs its layers one after the other.
    """

    def __init__(self, call: ModelCall) -> None:
        self.call = call
        self._computed: dict[tuple[tuple[float, ...], Size, torch.dtype], list[Addend]] = {}

    def shares(
        self, layer: str, group: str, size: Size, query: torch.Tensor
    ) -> list[ReferenceShare]:
        """What to add in a layer.

        Args:
            query: [rows, height * width, C]
        """
        factors = tuple(effect.effect.at_layers(group) for effect in self.call.effects)
        key = (factors, size, query.dtype)
        if key not in self._computed:
            self._computed[key] = [
                (effect, scale[..., None] if isinstance(scale, torch.Tensor) else scale, positions)
                for effect, scale, positions in self._compute(group, size, query)
            ]
        result = []
        for effect, scale, positions in self._computed[key]:
            keys, values = (
                _as(query.dtype, effect.of_rows(both)) for both in effect.key_values.layers[layer]
            )
            rows = None if effect.rows == slice(0, self.call.rows.total) else effect.rows
            result.append(ReferenceShare(keys, values, scale, rows, positions))
        return result

    def _compute(self, group: str, size: Size, query: torch.Tensor) -> list[Addend]:
        """With scales [rows, P, 1]."""
        scales = [
            (effect, *scale)
            for effect in self.call.effects
            if (scale := effect.at_layer(group, size, self.call.rows.latent, query)) is not None
        ]
        if not self.call.normalise:
            return scales
        total = query.new_zeros(self.call.rows.total, query.shape[1], 1)
        for effect, scale, positions in scales:
            own = total[effect.rows]
            if positions is None:
                own += abs(scale)
            else:
                shape = (own.shape[0], positions.shape[0], 1)
                own.index_add_(1, positions, abs(scale).to(own.dtype).expand(shape))
        total.clamp_(min=1)
        return [
            (effect, scale / _at(total[effect.rows], positions), positions)
            for effect, scale, positions in scales
        ]


def _as(dtype: torch.dtype, tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _at(total: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    return total if positions is None else total.index_select(1, positions)


class ReferenceAttention:
    """What stands on one attention slot during one model call.

    Attributes:
        before: what stood there.
    """

    def __init__(self, scales: LayerScales, layer: str, group: str, before: Slot | None) -> None:
        self._scales = scales
        self._layer = layer
        self._group = group
        self.before = before

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
        if self.before is not None:
            text = self.before(q, k, v, extra_options, *args, **kwargs)
        else:
            text = attend_to_text(q, k, v, extra_options)
        return self.add(text, q, extra_options)

    def add(
        self, text: torch.Tensor, query: torch.Tensor, extra_options: Mapping[str, Any]
    ) -> torch.Tensor:
        """Add the references; `text` itself where nothing acts.

        Args:
            text, query: [B, T, heads * head_dim]; neither is changed.
        """
        precision = extra_options.get("attn_precision")
        rows = self._scales.call.rows
        if query.shape[0] != rows.total or text.shape != query.shape:
            warn_of_rows(query.shape[0], rows.total, len(rows.areas))
            return text
        size = layer_size(extra_options, query.shape[1], rows.size)
        return add_shares(
            text,
            query,
            self._scales.shares(self._layer, self._group, size, query),
            extra_options["n_heads"],
            lambda q, k, v: reference_attention(q, k, v, precision),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> ReferenceAttention:
        return self


def attend_to_text(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: Mapping[str, Any]
) -> torch.Tensor:
    """What the layer computes without patches."""
    return optimized_attention(
        q,
        k,
        v,
        extra_options["n_heads"],
        attn_precision=extra_options.get("attn_precision"),
        transformer_options=extra_options,
    )


def layer_size(options: Mapping[str, Any], positions: int, latent: Size) -> Size:
    """Height and width of an attention layer's positions."""
    shape = options.get("activations_shape")
    if shape is not None and shape[-2] * shape[-1] == positions:
        return shape[-2], shape[-1]
    height, width = latent
    while height * width > positions:
        height, width = (height + 1) // 2, (width + 1) // 2
    return (height, width) if height * width == positions else (1, positions)
