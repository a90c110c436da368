"""The references' features as attention layers of a UNet record them and attend to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..adapter.identity import IdentityShare
from .adapter_layer import AdapterLayer


@dataclass(frozen=True, eq=False)
class LayerFeatures:
    """What a self-attention layer made of references, [R, S, C] each.

    Attributes:
        key, value: the layer's own projections, its LoRA included.
        hidden: the layer's inputs, where the identity LoRA is trained and still has to be added;
            None where it has been, or there is none.
    """

    key: torch.Tensor
    value: torch.Tensor
    hidden: torch.Tensor | None = None

    @staticmethod
    def joined(parts: Sequence[LayerFeatures], dim: int) -> LayerFeatures:
        """Several, side by side along the rows (0) or the positions (1)."""
        if len(parts) == 1:
            return parts[0]

        def joined(name: str) -> torch.Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            return None if tensors[0] is None else torch.cat(tensors, dim=dim)

        return LayerFeatures(joined("key"), joined("value"), joined("hidden"))

    def with_lora(self, layer: AdapterLayer | None) -> LayerFeatures:
        """With the identity LoRA of the layer added, where it has not been."""
        if self.hidden is None or layer is None:
            return self
        key, value = layer.identity_lora("to_k"), layer.identity_lora("to_v")
        return LayerFeatures(self.key + key(self.hidden), self.value + value(self.hidden))

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> LayerFeatures:
        """With each tensor changed."""
        hidden = None if self.hidden is None else change(self.hidden)
        return LayerFeatures(change(self.key), change(self.value), hidden)


@dataclass(frozen=True, eq=False)
class RowFeatures:
    """What some rows of a UNet call attend to in one layer, beside their own positions.

    Attributes:
        rows: of the UNet call.
        weight: a number, or [R, 1, 1] for each of the R rows.
        features: of the R rows, or of one row for all of them.
    """

    rows: slice
    weight: float | torch.Tensor
    features: LayerFeatures

    def within(self, count: int) -> RowFeatures | None:
        """For the first `count` rows of the call alone: itself, fewer rows, or None for no row."""
        if self.rows.stop <= count:
            return self
        left = count - self.rows.start
        if left <= 0:
            return None
        features, weight = self.features, self.weight
        if len(features.key) > 1:
            features = features.each(lambda x: x[:left])
        if isinstance(weight, torch.Tensor):
            weight = weight[:left]
        return replace(self, rows=slice(self.rows.start, count), weight=weight, features=features)

    def share(self, layer: AdapterLayer | None) -> IdentityShare:
        """As the layer's attention takes it."""
        features = self.features.with_lora(layer)
        return IdentityShare(features.key, features.value, self.weight, self.rows)


@dataclass(eq=False)
class Recording:
    """A reference pass: the layers whose features are wanted, and what they were.

    Attributes:
        trains: the identity LoRA gets gradients, so it is added later.
    """

    wanted: frozenset[nn.Module]
    trains: bool
    layers: dict[nn.Module, LayerFeatures] = field(default_factory=dict)

    def wants(self, attn: nn.Module) -> bool:
        return attn in self.wanted

    def record(
        self,
        attn: nn.Module,
        layer: AdapterLayer | None,
        hidden: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> None:
        has_lora = layer is not None and layer.identity_lora("to_k") is not None
        found = LayerFeatures(key, value, hidden if has_lora else None)
        self.layers[attn] = found if self.trains else found.with_lora(layer)


@dataclass(frozen=True, eq=False)
class CallFeatures:
    """The references' features for the rows of one UNet call.

    Attributes:
        rows: runs of rows; `layers` has features for each.
        weights: of each run: a number, or [R, 1, 1].
        factors: of each layer, by which its weight is multiplied.
    """

    rows: tuple[slice, ...]
    weights: tuple[float | torch.Tensor, ...]
    layers: Mapping[nn.Module, tuple[LayerFeatures, ...]]
    factors: Mapping[nn.Module, float]

    def of(self, attn: nn.Module) -> list[RowFeatures]:
        """What a layer attends to; empty for one that does not attend to the references."""
        if attn not in self.layers:
            return []
        factor = self.factors[attn]
        each = zip(self.rows, self.weights, self.layers[attn], strict=True)
        return [RowFeatures(rows, weight * factor, features) for rows, weight, features in each]
