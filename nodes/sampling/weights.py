"""How strongly references act: an effect is tokens and weights, and the weights multiply.

Each kind of weight is one class, here or in a file of its own like `masks.Mask`. It overrides the
methods for what it depends on (layer, noise level, position); nothing else knows of it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ...easyref_core.adapter.curves import WeightCurve
from ...easyref_core.adapter.layer_weights import LayerWeights, check_groups
from ...easyref_core.tokens.reference_tokens import ReferenceTokens
from .batch_rows import BatchSlice, LayerGrid

Scale = float | torch.Tensor

# Whole timesteps of the usual 1000, between which ComfyUI interpolates in log sigma too.
_LAST_KNOT = 999


@dataclass(frozen=True, eq=False)
class PositionWeights:
    """Weights at the positions of an attention layer.

    Attributes:
        values: [1 or latents, P, 1].
        positions: [P] of the layer's positions, None for all; at the others nothing is added. Only
            one kind of weight, the mask, may leave positions out.
    """

    values: torch.Tensor
    positions: torch.Tensor | None = None

    def times(self, other: PositionWeights) -> PositionWeights:
        if self.positions is None:
            return PositionWeights(self._at(other.positions) * other.values, other.positions)
        return PositionWeights(self.values * other._at(self.positions), self.positions)

    def _at(self, positions: torch.Tensor | None) -> torch.Tensor:
        return self.values if positions is None else self.values.index_select(1, positions)


class Weight:
    """A factor of the scale with which reference tokens are added. Immutable.

    Attributes:
        by_position: whether it implements `at_positions`.
    """

    by_position = False

    @property
    def is_zero(self) -> bool:
        """Whether nothing is added anywhere, at any step."""
        return False

    def times(self, other: Any) -> Weight | None:
        """Itself merged with an enclosing weight of its kind; None to keep both."""
        return None

    def check_layers(self, groups: Collection[str], model: str) -> None:
        """Raise EasyRefError unless a model with these groups of layers can take it."""

    @property
    def batch(self) -> int:
        """How many latents it has a factor of their own for; 1 for the same for all."""
        return 1

    def check_batch(self, batch: BatchSlice) -> None:
        """Raise EasyRefError unless it has a factor for each latent."""

    def at_layers(self, group: str) -> float:
        """The factor in a group of layers."""
        return 1.0

    def at_sigmas(self, model_sampling: Any, sigmas: torch.Tensor) -> Scale:
        """The factor of each row at its noise level: a number for all, or [rows]. Computed on the
        device: reading a sigma's value would make the host wait at every step.

        Args:
            model_sampling: ComfyUI's noise schedule of the model.
            sigmas: [rows].
        """
        return 1.0

    def at_positions(
        self, grid: LayerGrid, batch: BatchSlice, like: torch.Tensor
    ) -> PositionWeights:
        """The factor of each position of a layer, with the device and dtype of `like`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(Weight):
    """The same everywhere and at every step."""

    value: float

    @property
    def is_zero(self) -> bool:
        return self.value == 0

    def times(self, other: Constant) -> Constant:
        return Constant(self.value * other.value)

    def at_sigmas(self, model_sampling: Any, sigmas: torch.Tensor) -> float:
        return self.value


@dataclass(frozen=True)
class ByLayer(Weight):
    """A factor for each group of layers."""

    factors: LayerWeights

    @property
    def is_zero(self) -> bool:
        return not any(self.factors.factors)

    def times(self, other: ByLayer) -> ByLayer:
        return ByLayer(self.factors.times(other.factors))

    def check_layers(self, groups: Collection[str], model: str) -> None:
        check_groups(self.factors, groups, model)

    def at_layers(self, group: str) -> float:
        return self.factors.of(group)


@dataclass(frozen=True)
class SamplingRange(Weight):
    """1 within a part of the sampling, from 0 (start) to 1 (end), and 0 outside."""

    start: float
    end: float

    def at_sigmas(self, model_sampling: Any, sigmas: torch.Tensor) -> Scale:
        if self.start <= 0 and self.end >= 1:
            return 1.0
        first, last = _sigma_range(model_sampling, self.start, self.end)
        return (sigmas <= first) & (sigmas >= last)


@dataclass(frozen=True)
class Curve(WeightCurve, Weight):
    """A factor that changes over the sampling."""

    def at_sigmas(self, model_sampling: Any, sigmas: torch.Tensor) -> Scale:
        if self.constant is not None:
            return self.constant
        knots, factors = _curve_table(self, model_sampling, sigmas.device)
        depth = -sigmas.float().clamp(min=1e-20).log()
        right = torch.searchsorted(knots, depth).clamp(1, knots.shape[0] - 1)
        low, high = knots[right - 1], knots[right]
        share = ((depth - low) / (high - low)).clamp(0, 1)
        return torch.lerp(factors[right - 1], factors[right], share)


class Weighted:
    """What acts with weights, which multiply."""

    weights: tuple[Weight, ...]

    @property
    def is_noop(self) -> bool:
        """Whether it can be skipped."""
        return is_zero(self.weights)

    @property
    def by_position(self) -> bool:
        return any(weight.by_position for weight in self.weights)

    def at_layers(self, group: str) -> float:
        """The factor in a group of layers."""
        return math.prod(weight.at_layers(group) for weight in self.weights)

    def at_sigmas(self, model_sampling: Any, sigmas: torch.Tensor, dtype: torch.dtype) -> Scale:
        """The factor of each row at its noise level: a number for all, or [rows, 1, 1]."""
        number, product = 1.0, None
        for weight in self.weights:
            factor = weight.at_sigmas(model_sampling, sigmas)
            if not isinstance(factor, torch.Tensor):
                number *= factor
            else:
                product = factor if product is None else product * factor
        return number if product is None else (product * number).to(dtype)[:, None, None]

    def at_positions(
        self, grid: LayerGrid, batch: BatchSlice, like: torch.Tensor
    ) -> PositionWeights | None:
        """The factor of each position of a layer, None for 1 everywhere."""
        found = None
        for weight in self.weights:
            if weight.by_position:
                own = weight.at_positions(grid, batch, like)
                found = own if found is None else found.times(own)
        return found


@dataclass(frozen=True, eq=False)
class Effect(Weighted):
    """Reference tokens and the weights with which they act: the tokens of an Apply node, of a
    region or of a prompt."""

    tokens: ReferenceTokens
    weights: tuple[Weight, ...]

    @property
    def batch(self) -> int:
        """How many latents it holds tokens or weights of their own for; 1 for the same for all."""
        return max(self.tokens.batch, largest_batch(self.weights))

    def within(self, outer: Sequence[Weight]) -> Effect:
        """Combined with enclosing weights: those of one kind merge, all others multiply.

        Raises:
            EasyRefError: masks for batches of different size.
        """
        own, others = list(self.weights), []
        for weight in outer:
            for index, inner in enumerate(own):
                merged = inner.times(weight) if type(inner) is type(weight) else None
                if merged is not None:
                    own[index] = merged
                    break
            else:
                others.append(weight)
        return Effect(self.tokens, (*others, *own))

    def __deepcopy__(self, memo: dict[int, Any]) -> Effect:
        return self


def largest_batch(weights: Sequence[Weight]) -> int:
    """See `Weight.batch`."""
    return max((weight.batch for weight in weights), default=1)


def is_zero(weights: Sequence[Weight]) -> bool:
    """Whether nothing is added anywhere, at any step."""
    return any(weight.is_zero for weight in weights)


@lru_cache(maxsize=32)
def _sigma_range(model_sampling: Any, start: float, end: float) -> tuple[float, float]:
    """First and last sigma of a part of the sampling."""
    schedule = _on_cpu(model_sampling)
    return schedule.percent_to_sigma(start), schedule.percent_to_sigma(end)


@lru_cache(maxsize=8)
def _on_cpu(model_sampling: Any) -> Any:
    """A copy with its tables on the CPU: reading a value from a device waits for it, and a curve
    reads a thousand."""
    copied = copy.deepcopy(model_sampling)
    return copied.to("cpu") if isinstance(copied, torch.nn.Module) else copied


@lru_cache(maxsize=32)
def _curve_table(
    curve: WeightCurve, model_sampling: Any, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(-log sigma, factor) at every whole timestep and at the curve's own points, rising.

    `percent_to_sigma` is inverted by its values, since what is linear in percent differs: the
    timestep of discrete schedules, log sigma of EDM, the unshifted sigma of flow models.
    """
    own = ((place, _depth(model_sampling, place)) for place, _ in curve.points)
    knots: list[float] = []
    factors: list[float] = []
    for place, depth in sorted((*_timestep_depths(model_sampling), *own)):
        # A distilled model's schedule has steps; within one, the sigma cannot tell the place.
        if not knots or depth - knots[-1] > 1e-6:
            knots.append(depth)
            factors.append(curve.at(place))
    with torch.inference_mode(False):  # ordinary tensors, which a model in training can use too
        return torch.tensor(knots, device=device), torch.tensor(factors, device=device)


@lru_cache(maxsize=8)
def _timestep_depths(model_sampling: Any) -> tuple[tuple[float, float], ...]:
    places = (knot / _LAST_KNOT for knot in range(_LAST_KNOT + 1))
    return tuple((place, _depth(model_sampling, place)) for place in places)


def _depth(model_sampling: Any, place: float) -> float:
    """-log sigma; the ends mean "before all" and "after all" to ComfyUI, so just inside them."""
    sigma = _on_cpu(model_sampling).percent_to_sigma(min(max(place, 1e-9), 1 - 1e-9))
    return -math.log(max(float(sigma), 1e-20))
