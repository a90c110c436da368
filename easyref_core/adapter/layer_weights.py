"""Weights for SDXL's groups of cross-attention layers, with named profiles.

The profiles follow published work on SDXL: InstantStyle (arXiv 2404.02733) adds a
reference in one block for style (up_blocks.0.attentions.1) and in one more for layout
(down_blocks.2.attentions.1); B-LoRA (arXiv 2403.14572) finds content in up_blocks.0.attentions.0
and style and colour in up_blocks.0.attentions.1. That the last, finest layers decide appearance
and not shape is an observation of P+ (arXiv 2303.09522), there on Stable Diffusion 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import EasyRefError
from ..untrusted import number, shown

# The field's names, which are ComfyUI's blocks. diffusers' modules, in the same order:
# down_blocks.1.attentions.0 and 1, down_blocks.2.attentions.0 and 1, mid_block.attentions.0,
# up_blocks.0.attentions.0 to 2, up_blocks.1.attentions.0 to 2.
GROUPS = (
    "input_4",
    "input_5",
    "input_7",
    "input_8",
    "middle",
    "output_0",
    "output_1",
    "output_2",
    "output_3",
    "output_4",
    "output_5",
)


@dataclass(frozen=True, init=False)
class LayerWeights:
    """A factor of the weight for each group of layers: 1 by default, 0 leaves the group out.

    Attributes:
        factors: in the order of `GROUPS`.

    Raises:
        EasyRefError: an unknown group, or a weight that is no number.
    """

    factors: tuple[float, ...]

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        weights = {} if weights is None else weights
        if not isinstance(weights, Mapping):
            raise EasyRefError(
                f"The layer weights are {shown(weights)}; a weight for each group is needed, such "
                "as {'middle': 0.5}."
            )
        for group in weights:
            if group not in GROUPS:
                raise EasyRefError(
                    f"There is no group of layers called {shown(group)}. SDXL has "
                    f"{', '.join(GROUPS)}."
                )
        factors = (number(weights.get(g, 1.0), f"The layer weight of {g}") for g in GROUPS)
        object.__setattr__(self, "factors", tuple(factors))

    def of(self, group: str) -> float:
        """The factor of a group; 1 for a group that SDXL does not have."""
        return self.factors[GROUPS.index(group)] if group in GROUPS else 1.0

    def times(self, other: LayerWeights) -> LayerWeights:
        """Product with others, group by group."""
        both = (a * b for a, b in zip(self.factors, other.factors, strict=True))
        return LayerWeights(dict(zip(GROUPS, both, strict=True)))

    def text(self) -> str:
        """One line for each group."""
        lines = zip(GROUPS, self.factors, strict=True)
        return "\n".join(f"{group}: {round(factor, 4):g}" for group, factor in lines)


def _only(**weights: float) -> LayerWeights:
    return LayerWeights({**dict.fromkeys(GROUPS, 0.0), **weights})


PROFILES: Mapping[str, LayerWeights] = {
    "all": LayerWeights(),
    "style": _only(output_1=1.0),
    "composition": _only(input_8=1.0),
    "style and composition": _only(input_8=1.0, output_1=1.0),
    "fine detail": _only(output_3=1.0, output_4=1.0, output_5=1.0),
}


def check_groups(weights: LayerWeights, present: Iterable[str], model: str) -> None:
    """Raise EasyRefError where a weight is for layers that the model does not have."""
    groups = sorted(set(present))
    missing = [g for g in GROUPS if weights.of(g) != 1 and g not in groups]
    if missing:
        raise EasyRefError(
            f"The layer weights change {', '.join(missing)}, but {model} has no such layers; it "
            f"has {', '.join(groups)}. Set these weights to 1, or connect an SDXL model."
        )
