"""Combine the reference tokens of several groups into one set.

`concatenate` lets attention choose between the groups; averages and sums are of the tokens
themselves; `avoid` makes one group the unconditional branch of another, so that guidance leads away
from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import EasyRefError
from ..untrusted import number, shown
from ..untrusted import text as checked_text
from .reference_tokens import ReferenceTokens, describe, join_prompts

CONCATENATE, AVERAGE, ADD, SUBTRACT, AVOID = METHODS = (
    "concatenate",
    "average",
    "add",
    "subtract",
    "avoid",
)
WEIGHING = (AVERAGE, ADD, SUBTRACT)
MAX_WEIGHT = 100.0  # tokens of more overflow in half precision


@dataclass(frozen=True)
class WeightedTokens:
    """One group's tokens.

    Attributes:
        weight: used by the methods in `WEIGHING`; -100 to 100.
        name: for messages.

    Raises:
        EasyRefError: no tokens, or a weight out of its range.
    """

    tokens: ReferenceTokens
    weight: float = 1.0
    name: str = "the tokens"

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, ReferenceTokens):
            raise EasyRefError(f"{self.name} is {shown(self.tokens)}; reference tokens are needed.")
        weight = number(self.weight, f"The weight of {self.name}", -MAX_WEIGHT, MAX_WEIGHT)
        object.__setattr__(self, "weight", weight)


def combine_tokens(parts: Sequence[WeightedTokens], method: str) -> ReferenceTokens:
    """Combine two or more groups into one set of tokens.

    `cond` is, of tokens t and weights w:

    - concatenate: all tokens, group after group; weights are not used
    - average: sum of w * t, divided by the sum of w
    - add: sum of w * t
    - subtract: w * t of the first less w * t of the others
    - avoid: the first's tokens; weights are not used

    `uncond` is usually the same black picture in every group, and then stays as it is. Where groups
    differ, it is concatenated or averaged like `cond`. `add` and `subtract` take the plain mean: a
    sum would count the black picture twice, a difference would cancel it. `avoid` takes the second
    group's `cond`.

    Raises:
        EasyRefError: fewer than two parts (`avoid`: other than two); other adapters, widths, token
            counts or batches (both named); weights that leave nothing to average; an unknown
            method.
    """
    _check(parts, method)
    batch = _common_batch(parts)
    conds = [part.tokens.cond.expand(batch, -1, -1) for part in parts]
    unconds = [part.tokens.uncond.expand(batch, -1, -1) for part in parts]
    weights = [part.weight for part in parts]
    if method == CONCATENATE:
        cond, uncond = torch.cat(conds, dim=1), torch.cat(unconds, dim=1)
    elif method == AVOID:
        cond, uncond = conds
    else:
        cond = _weighted_sum(conds, _factors(method, weights))
        factors = _factors(AVERAGE, weights if method == AVERAGE else [1.0] * len(parts))
        same = all(torch.equal(unconds[0], other) for other in unconds[1:])
        uncond = unconds[0] if same else _weighted_sum(unconds, factors)
    first = parts[0].tokens
    return ReferenceTokens(
        cond,
        uncond,
        first.adapter,
        first.adapter_name,
        join_prompts(part.tokens.prompt for part in parts),
        sum(part.tokens.num_references for part in parts),
        f"{method} of {len(parts)}",
    )


def read_weights(text: str, count: int | None = None) -> tuple[float, ...]:
    """Read weights such as "1, 0.5, -0.2".

    Args:
        count: how many there may be at most, if that is known.

    Returns:
        As many as were written.

    Raises:
        EasyRefError: something that is not a number from -100 to 100, or too many numbers.
    """
    weights = []
    text = checked_text(text, "weights")
    for piece in map(str.strip, text.split(",") if text.strip() else ()):
        try:
            weight = float(piece)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise EasyRefError(
                f"weights holds {shown(piece)}, which is no number. Write one number for each set "
                "of tokens, separated by commas, such as 1, 0.5, -0.2."
            )
        weights.append(number(weight, "A number of weights", -MAX_WEIGHT, MAX_WEIGHT))
    if count is not None and len(weights) > count:
        raise EasyRefError(
            f"weights holds {len(weights)} numbers ({text.strip()}), but tokens are connected up "
            f"to tokens_{count} only. Take out what belongs to no tokens."
        )
    return tuple(weights)


def _factors(method: str, weights: Sequence[float]) -> list[float]:
    """Of each group in a sum of all."""
    if method == AVERAGE:
        return [weight / sum(weights) for weight in weights]
    if method == SUBTRACT:
        return [weights[0], *(-weight for weight in weights[1:])]
    return list(weights)


def _weighted_sum(tensors: Sequence[torch.Tensor], factors: Sequence[float]) -> torch.Tensor:
    return torch.stack([t * f for t, f in zip(tensors, factors, strict=True)]).sum(dim=0)


def _check(parts: Sequence[WeightedTokens], method: str) -> None:
    if method not in METHODS:
        raise EasyRefError(
            f"There is no method {shown(method)} of combining tokens. Choose one of "
            f"{', '.join(METHODS)}."
        )
    for place, part in enumerate(parts, start=1):
        if not isinstance(part, WeightedTokens):
            raise EasyRefError(f"Part {place} is {shown(part)}; WeightedTokens are needed.")
    if len(parts) < 2:
        raise EasyRefError(
            f"There are {len(parts)} sets of reference tokens to combine; at least two are needed. "
            "Connect tokens_1 and tokens_2."
        )
    if method == AVOID and len(parts) > 2:
        raise EasyRefError(
            f"Method 'avoid' takes two sets of tokens, those to follow and those to avoid, but "
            f"{len(parts)} are connected ({', '.join(part.name for part in parts)}). Combine the "
            "ones to avoid into one first."
        )
    first = parts[0]
    for part in parts[1:]:
        ours, theirs = first.tokens, part.tokens
        if (ours.adapter, ours.width) != (theirs.adapter, theirs.width):
            raise EasyRefError(
                f"{first.name} were made by {describe(ours)}, but {part.name} by "
                f"{describe(theirs)}. Tokens of one adapter can be combined; encode the references "
                "again with the same one."
            )
        if method != CONCATENATE and ours.num_tokens != theirs.num_tokens:
            raise EasyRefError(
                f"{first.name} hold {ours.num_tokens} tokens and {part.name} {theirs.num_tokens}, "
                f"so method {method!r} cannot pair them. Choose 'concatenate', or encode both with "
                "the same aggregation."
            )
    if method == AVERAGE and math.isclose(sum(p.weight for p in parts), 0, abs_tol=1e-6):
        found = ", ".join(f"{part.weight:g}" for part in parts)
        raise EasyRefError(
            f"The weights ({found}) add up to 0, so there is nothing to average. Change one of "
            "them, or choose 'add' or 'subtract'."
        )


def _common_batch(parts: Sequence[WeightedTokens]) -> int:
    """Groups in the batch of all parts; a single group counts for every latent."""
    largest = max(parts, key=lambda part: part.tokens.batch)
    batch = largest.tokens.batch
    for part in parts:
        if part.tokens.batch not in (1, batch):
            raise EasyRefError(
                f"{part.name} hold {part.tokens.batch} groups and {largest.name} {batch}. Combine "
                "sets of as many groups, or one group with any number."
            )
    return batch
