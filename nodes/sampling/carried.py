"""Reference tokens that a conditioning carries, and which rows of a model call they are for.

ComfyUI copies a conditioning, with all its settings, to the end of the opposite list to give an
area its counterpart, and puts a text of that list into the copy. Such a copy speaks for the
conditioning whose text it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...easyref_core.adapter.layer_weights import LayerWeights
from ...easyref_core.tokens.reference_tokens import ReferenceTokens

CARRIED = "easyref_tokens"  # in a conditioning's settings

Entry = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class CarriedTokens:
    """What EasyRef Set Conditioning put on a conditioning. Immutable."""

    tokens: ReferenceTokens
    weight: float = 1.0
    layer_weights: LayerWeights = field(default_factory=LayerWeights)

    def __deepcopy__(self, memo: dict[int, Any]) -> CarriedTokens:
        return self


@dataclass(frozen=True)
class Use:
    """Carried tokens for some rows.

    Attributes:
        unconditional: the rows get the unconditional half.
    """

    carried: CarriedTokens
    unconditional: bool


def carry(conditioning: Sequence[Sequence[Any]], carried: CarriedTokens) -> list[list[Any]]:
    """A conditioning whose every entry carries the tokens.

    Those of the same adapter that it carried before are replaced, others stay.
    """
    result = []
    for states, settings, *more in conditioning:
        kept = (c for c in carried_by(settings) if c.tokens.adapter != carried.tokens.adapter)
        result.append([states, {**settings, CARRIED: (*kept, carried)}, *more])
    return result


def carried_by(entry: Entry) -> tuple[CarriedTokens, ...]:
    """What a conditioning's settings carry, at most one of each adapter."""
    return entry.get(CARRIED, ())


def uses_of(
    entry: Entry, in_negative: bool, roles: Mapping[Any, bool], entries: Iterable[Entry]
) -> tuple[Use, ...]:
    """What the rows of one entry of a list use instead of an Apply node's own tokens.

    Args:
        in_negative: the list is negative.
        roles: uuid -> whether the conditioning stood in a negative list at the start.
        entries: the whole list.
    """
    if roles.get(entry.get("uuid"), in_negative) == in_negative:
        # In a negative list too these are the conditional tokens: references to be avoided.
        return tuple(Use(carried, False) for carried in carried_by(entry))
    uses = {c.tokens.adapter: Use(c, False) for c in _speaker(entry, in_negative, roles, entries)}
    if in_negative:
        for carried in carried_by(entry):
            uses.setdefault(carried.tokens.adapter, Use(carried, True))
    return tuple(uses.values())


def _speaker(
    copied: Entry, in_negative: bool, roles: Mapping[Any, bool], entries: Iterable[Entry]
) -> tuple[CarriedTokens, ...]:
    """What is carried by the conditioning of the list whose text a copied entry has."""
    text = copied.get("model_conds", {}).get("c_crossattn")
    for entry in entries:
        own = roles.get(entry.get("uuid"), in_negative) == in_negative
        if own and text is not None and entry.get("model_conds", {}).get("c_crossattn") is text:
            return carried_by(entry)
    return ()


def lent_to_negative(
    conditionings: Mapping[str, Sequence[Entry]], negative: Mapping[str, bool]
) -> tuple[CarriedTokens, ...]:
    """The first tokens of each adapter that a positive conditioning of a run carries.

    Their unconditional half serves the negative side where no Apply node has tokens of its own.
    """
    lent: dict[str, CarriedTokens] = {}
    for name, entries in conditionings.items():
        if not negative[name]:
            for entry in entries:
                for carried in carried_by(entry):
                    lent.setdefault(carried.tokens.adapter, carried)
    return tuple(lent.values())
