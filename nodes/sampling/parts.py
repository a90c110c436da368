"""Reference tokens with everything that says how strongly, where and when they act."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...easyref_core.adapter.curves import WeightCurve
from ...easyref_core.adapter.layer_weights import LayerWeights
from ...easyref_core.errors import EasyRefError
from ...easyref_core.tokens.tokens import ReferenceTokens, describe
from .masks import Mask

MAX_REGIONS = 16


@dataclass(frozen=True, eq=False)
class Settings:
    """How strongly, where and when references act.

    Attributes:
        weight: how strongly.
        mask: where, None for everywhere.
        layer_weights: factors of the weight by group of layers.
        curves: factors of the weight by noise level.
        window: (start, end) part of the sampling, 0 to 1.
    """

    weight: float = 1.0
    mask: Mask | None = None
    layer_weights: LayerWeights = field(default_factory=LayerWeights)
    curves: tuple[WeightCurve, ...] = ()
    window: tuple[float, float] = (0.0, 1.0)

    @property
    def never(self) -> bool:
        """They act nowhere, and shall cost nothing."""
        nowhere = self.mask is not None and self.mask.empty
        return self.weight == 0 or nowhere or not any(self.layer_weights.factors)

    def within(self, outer: Settings) -> Settings:
        """These settings inside others: both count.

        Raises:
            EasyRefError: masks for batches of different size.
        """
        mask = self.mask or outer.mask
        if self.mask is not None and outer.mask is not None:
            mask = self.mask.times(outer.mask)
        return Settings(
            self.weight * outer.weight,
            mask,
            self.layer_weights.times(outer.layer_weights),
            (*outer.curves, *self.curves),
            (max(self.window[0], outer.window[0]), min(self.window[1], outer.window[1])),
        )


@dataclass(frozen=True, eq=False)
class Part:
    """Reference tokens and how they act: a region, or what an Apply node holds itself."""

    tokens: ReferenceTokens
    settings: Settings

    def within(self, outer: Settings) -> Part:
        return Part(self.tokens, self.settings.within(outer))

    def __deepcopy__(self, memo: dict[int, Any]) -> Part:
        return self


def add_region(previous: tuple[Part, ...], region: Part) -> tuple[Part, ...]:
    """A list of regions with one more.

    Raises:
        EasyRefError: too many, or tokens of another adapter.
    """
    regions = (*previous, region)
    check_regions(regions)
    return regions


def check_regions(regions: tuple[Part, ...]) -> None:
    """Raise EasyRefError unless one Apply node can take these regions."""
    if not regions:
        raise EasyRefError(
            "The list of regions is empty. Connect EasyRef Region, or disconnect regions."
        )
    if len(regions) > MAX_REGIONS:
        raise EasyRefError(
            f"There are {len(regions)} regions; one EasyRef Apply takes up to {MAX_REGIONS}. Give "
            "the others to a second EasyRef Apply."
        )
    first = regions[0].tokens
    for number, region in enumerate(regions[1:], 2):
        if region.tokens.adapter != first.adapter:
            raise EasyRefError(
                f"Region {number} has tokens of {describe(region.tokens)}, region 1 of "
                f"{describe(first)}. The regions of one EasyRef Apply need one adapter; give each "
                "adapter an EasyRef Apply of its own."
            )
