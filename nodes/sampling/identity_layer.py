"""One self-attention layer: the references' keys and values beside its own.

Whatever stands on ComfyUI's attention slot is called first. What the references add to plain
attention is then added to its result, so this composes with other packs in either order.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import nn

from ...easyref_core.adapter.identity import IdentityLora, IdentityShare, add_identity
from ..host.unet_layers import SelfAttentionLayer, group_of
from .batch_rows import Area, BatchSlice, CallRows, LayerGrid, Size, warn_of_rows
from .identity_pass import Features
from .layer import Slot, layer_size
from .model_call import Scale, scale_at_layer
from .weights import Weighted


@dataclass(frozen=True, eq=False)
class RowsOfIdentity:
    """Neighbouring rows of a model call on which the references act.

    Attributes:
        conditionings: how many there are, each with `batch`'s latents.
        area: of the rows, where the weights depend on it.
    """

    rows: slice
    conditionings: int
    batch: BatchSlice
    area: Area | None


@dataclass(frozen=True, eq=False)
class IdentityCall:
    """What the references of one node add in one model call, which runs its layers one by one.

    Attributes:
        weighted: the node's weights.
        scale: their factor at this noise level.
        unet: whose layers project the features.
        layers: diffusers' name -> the layer.
        lora: diffusers' name -> what is added to keys and values, on the call's device.
    """

    weighted: Weighted
    scale: float
    rows: CallRows
    acts_on: Sequence[RowsOfIdentity]
    unet: nn.Module
    layers: Mapping[str, SelfAttentionLayer]
    features: Features
    lora: Mapping[str, IdentityLora]
    _scales: dict[Any, list[tuple[RowsOfIdentity, Scale, torch.Tensor | None]]] = field(
        default_factory=dict
    )

    def shares(self, layer: str, size: Size, query: torch.Tensor) -> list[IdentityShare]:
        """What to add in a layer.

        Args:
            size: of the layer's positions.
            query: [rows, height * width, C].
        """
        found = self.layers[layer]
        scales = self._scales_at(group_of(found.block), size, query)
        if not scales:
            return []
        features = self.features[found.block]  # [1, S, C]
        attention = self.unet.get_submodule(found.module)
        key, value = attention.to_k(features), attention.to_v(features)
        lora = self.lora.get(layer)
        if lora is not None:
            key, value = key + lora.key(features), value + lora.value(features)
        everything = slice(0, self.rows.total)
        return [
            IdentityShare(key, value, scale, None if on.rows == everything else on.rows, positions)
            for on, scale, positions in scales
        ]

    def _scales_at(
        self, group: str, size: Size, like: torch.Tensor
    ) -> list[tuple[RowsOfIdentity, Scale, torch.Tensor | None]]:
        """Scale and positions of each of the rows; computed once for the layers of one size."""
        key = (group, size, like.dtype)
        if key not in self._scales:
            at_layer = (
                (
                    on,
                    scale_at_layer(
                        self.weighted,
                        self.scale,
                        group,
                        LayerGrid(size, self.rows.latent, on.area),
                        on.batch,
                        on.conditionings,
                        like,
                    ),
                )
                for on in self.acts_on
            )
            self._scales[key] = [(on, *found) for on, found in at_layer if found is not None]
        return self._scales[key]


def add_to_layers(options: dict[str, Any], call: IdentityCall) -> None:
    """Put a model call's references on the attention slots.

    Args:
        options: the call's own copy of the transformer options; changed.
    """
    replace = dict(options.get("patches_replace", {}))
    slots = dict(replace.get("attn1", {}))
    for name, layer in call.layers.items():
        if layer.block in call.features:
            before = slots.get(layer.block) or slots.get(layer.block[:2])
            slots[layer.block] = IdentityAttention.over(before, call, name)
    replace["attn1"] = slots
    options["patches_replace"] = replace


class IdentityAttention:
    """What stands on one attention slot during one model call.

    Args:
        calls: of each node, with the layer's name.
        before: what stood there, None for plain attention.
    """

    def __init__(self, calls: Sequence[tuple[IdentityCall, str]], before: Slot | None) -> None:
        self._calls = calls
        self._before = before

    @classmethod
    def over(cls, before: Slot | None, call: IdentityCall, layer: str) -> IdentityAttention:
        """On top of what stands there; several nodes' references share one own attention."""
        if isinstance(before, IdentityAttention):
            return cls([*before._calls, (call, layer)], before._before)
        return cls([(call, layer)], before)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        extra_options: Mapping[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """q, k, v [B, T, heads * head_dim] after projection; returns q's shape before to_out."""
        heads = extra_options["n_heads"]
        precision = extra_options.get("attn_precision")

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return optimized_attention(
                q, k, v, heads, attn_precision=precision, transformer_options=extra_options
            )

        if self._before is None:
            before = own = attend(q, k, v)
        else:
            before, own = self._before(q, k, v, extra_options, *args, **kwargs), None
        shares = self._shares(q, k, before, extra_options)
        if not shares:
            return before
        if own is not None:
            return add_identity(own, q, k, v, shares, attend)
        # Only what the references change: guidance that replaces attention, such as perturbed
        # attention, has to stay replaced.
        own = attend(q, k, v)
        return before + (add_identity(own, q, k, v, shares, attend) - own)

    def _shares(
        self, q: torch.Tensor, k: torch.Tensor, out: torch.Tensor, options: Mapping[str, Any]
    ) -> list[IdentityShare]:
        shares = []
        for call, layer in self._calls:
            rows = call.rows
            if not q.shape[0] == k.shape[0] == rows.total or out.shape != q.shape:
                warn_of_rows(q.shape[0], rows.total, len(rows.areas))
            elif call.weighted.by_position and not _are_whole(q.shape[1], options):
                _warn_of_positions()
            else:
                shares += call.shares(layer, layer_size(options, q.shape[1], rows.size), q)
        return shares

    def __deepcopy__(self, memo: dict[int, Any]) -> IdentityAttention:
        return self


def _are_whole(positions: int, options: Mapping[str, Any]) -> bool:
    """Whether a layer's queries are all of its positions; keys may be more or fewer."""
    shape = options.get("activations_shape")
    return shape is None or shape[-2] * shape[-1] == positions


@lru_cache(maxsize=1)
def _warn_of_positions() -> None:
    logging.warning(
        "EasyRef: another node merges positions of self-attention (Token Merging), so identity "
        "with a mask cannot be placed and is left out in those layers."
    )
