"""Reference tokens that conditionings carry, and which rows of a model call they are for.

Conditionings are told apart by their uuid. To give an area its counterpart, ComfyUI copies a
conditioning, with all its settings and its uuid, to the end of the opposite list, and puts a text
of that list into the copy. Such a copy stands for the conditioning whose text it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...easyref_core.adapter.key_values import TokenKeyValues
from .batch_rows import Area, Size
from .weights import Effect

# In a conditioning's settings, and in the transformer options of a run.
CARRIED = "easyref_tokens"
RUN = "easyref_run"
COND_BATCH = "easyref_cond_batch"

Entry = Mapping[str, Any]
"""One conditioning's settings."""


@dataclass(frozen=True)
class CondTokens:
    """Tokens that a conditioning brings to rows, in place of an Apply node's own.

    Attributes:
        unconditional: the rows get the unconditional half.
        fallback: only where no Apply node has tokens of its own.
    """

    effect: Effect
    unconditional: bool = False
    fallback: bool = False

    @property
    def adapter(self) -> str:
        return self.effect.tokens.adapter


@dataclass(frozen=True)
class CondRows:
    """The rows of one conditioning in a model call.

    Attributes:
        negative: they get the unconditional half of an Apply node's tokens.
        area: None for the whole latent.
        tokens: at most one of each adapter, then fallbacks.
    """

    negative: bool
    area: Area | None = None
    tokens: tuple[CondTokens, ...] = ()


@dataclass(frozen=True)
class Run:
    """What is known at the start of a run.

    Attributes:
        negative: uuid of a conditioning -> whether it is negative.
        fallback: tokens for the negative side, from positive conditionings.
        key_values: held as long as the run lasts.
        origins: see `BatchSlice`.
    """

    negative: Mapping[Any, bool] = field(default_factory=dict)
    fallback: tuple[CondTokens, ...] = ()
    key_values: tuple[TokenKeyValues, ...] = ()
    origins: tuple[int, ...] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        return self  # nodes that copy a run's options at every step would copy all it holds


@dataclass(frozen=True)
class CondBatch:
    """What ComfyUI's `calc_cond_batch` was called with.

    Attributes:
        negative: whether each of its lists is.
        rows: (list number, uuid) -> that conditioning's rows.
        fallback: see `Run`.
        latent: size of the whole latent.
        latents: number of latents in the batch.
        origins: see `BatchSlice`.
    """

    negative: tuple[bool, ...]
    rows: Mapping[tuple[int, Any], CondRows]
    fallback: tuple[CondTokens, ...]
    latent: Size
    latents: int
    origins: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls, run: Run, conds: Sequence[Sequence[Entry] | None], latents: torch.Tensor
    ) -> CondBatch:
        """The lists of a call in their order, with areas resolved.

        Args:
            latents: [B, C, H, W].
        """
        negative = tuple(_is_negative(number, conds[number], run) for number in range(len(conds)))
        rows = {
            (number, entry["uuid"]): CondRows(
                negative[number],
                tuple(entry["area"]) if "area" in entry else None,
                _tokens_for(entry, negative[number], run, entries or ()),
            )
            for number, entries in enumerate(conds)
            for entry in entries or ()
            if "uuid" in entry
        }
        size = (latents.shape[-2], latents.shape[-1])
        return cls(negative, rows, run.fallback, size, latents.shape[0], run.origins)

    def rows_of(self, number: int, identity: Any) -> CondRows:
        """The rows of one of a list's conditionings, which another node may have added."""
        negative = self.negative[number]
        return self.rows.get((number, identity)) or CondRows(
            negative, tokens=self.fallback if negative else ()
        )


def carry(conditioning: Sequence[Sequence[Any]], effect: Effect) -> list[list[Any]]:
    """A conditioning whose every entry carries the tokens.

    Those of the same adapter that it carried before are replaced, others stay.
    """
    result = []
    for states, settings, *more in conditioning:
        others = (e for e in carried_by(settings) if e.tokens.adapter != effect.tokens.adapter)
        result.append([states, {**settings, CARRIED: (*others, effect)}, *more])
    return result


def carried_by(entry: Entry) -> tuple[Effect, ...]:
    """What a conditioning's settings carry, at most one of each adapter."""
    return entry.get(CARRIED, ())


def carried_by_all(lists: Iterable[Sequence[Entry] | None]) -> Iterator[Effect]:
    for entries in lists:
        for entry in entries or ():
            yield from carried_by(entry)


def start_run(
    conds: Mapping[str, Sequence[Entry]],
    key_values: tuple[TokenKeyValues, ...] = (),
    origins: tuple[int, ...] | None = None,
) -> Run:
    """What a run begins with.

    Args:
        conds: a guider's conditionings by name ("positive", "negative", "middle", ...).
        key_values, origins: see `Run`.
    """
    negative = {
        entry["uuid"]: "negative" in name
        for name, entries in conds.items()
        for entry in entries
        if "uuid" in entry
    }
    fallback: dict[str, CondTokens] = {}
    for effect in carried_by_all(e for name, e in conds.items() if "negative" not in name):
        fallback.setdefault(effect.tokens.adapter, CondTokens(effect, True, fallback=True))
    return Run(negative, tuple(fallback.values()), key_values, origins)


def cond_rows(transformer_options: Mapping[str, Any]) -> list[CondRows]:
    """The rows of each conditioning of a model call, in order.

    A caller that went around ComfyUI's sampling gets the usual convention: list 0 is positive.
    """
    numbers: Sequence[int] = transformer_options.get("cond_or_uncond") or [0]
    uuids: Sequence[Any] = transformer_options.get("uuids") or ()
    if len(uuids) != len(numbers):  # another node split the call and passed the lists only
        uuids = [None] * len(numbers)
    batch: CondBatch | None = transformer_options.get(COND_BATCH)
    return [
        batch.rows_of(number, identity)
        if batch is not None and number < len(batch.negative)
        else CondRows(number != 0)
        for number, identity in zip(numbers, uuids, strict=True)
    ]


def _is_negative(number: int, entries: Sequence[Entry] | None, run: Run) -> bool:
    """Of a list: what its first known conditioning was at the start, as copies stand at the end."""
    known = (run.negative[e["uuid"]] for e in entries or () if e.get("uuid") in run.negative)
    return next(known, number != 0)


def _tokens_for(
    entry: Entry, in_negative: bool, run: Run, entries: Sequence[Entry]
) -> tuple[CondTokens, ...]:
    """What the rows of one entry of a list use instead of an Apply node's own tokens."""
    fallback = run.fallback if in_negative else ()
    if _belongs(entry, in_negative, run):
        # In a negative list too these are the conditional tokens: references to be avoided.
        return (*(CondTokens(effect) for effect in carried_by(entry)), *fallback)
    original = _with_same_text(entry, in_negative, run, entries)
    tokens = {effect.tokens.adapter: CondTokens(effect) for effect in carried_by(original)}
    if in_negative:
        for effect in carried_by(entry):
            tokens.setdefault(effect.tokens.adapter, CondTokens(effect, unconditional=True))
    return (*tokens.values(), *fallback)


def _belongs(entry: Entry, in_negative: bool, run: Run) -> bool:
    """Whether an entry was in its list from the start and is no copy from the opposite one."""
    return run.negative.get(entry.get("uuid"), in_negative) == in_negative


def _with_same_text(copied: Entry, in_negative: bool, run: Run, entries: Sequence[Entry]) -> Entry:
    """The conditioning of the list whose text a copied entry has; empty if there is none."""
    text = copied.get("model_conds", {}).get("c_crossattn")
    for entry in entries:
        same = entry.get("model_conds", {}).get("c_crossattn") is text
        if text is not None and same and _belongs(entry, in_negative, run):
            return entry
    return {}
