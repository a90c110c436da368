"""Reference tokens in every cross-attention layer of a sampling run.

The patch is put together anew for each model call on a copy of the transformer options: whatever
stands on an attention slot is called first, then the references are added to its result. So it
composes with other packs in either order and leaves nothing behind.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, get_wrappers_with_key

from ...easyref_core.adapter.attention import add_shares
from ...easyref_core.adapter.checkpoint import AdapterCheckpoint
from ...easyref_core.adapter.key_values import TokenKeyValues, check_tokens
from ...easyref_core.adapter.layer_weights import check_groups
from ...easyref_core.errors import EasyRefError
from ...easyref_core.tokens.tokens import ReferenceTokens, describe
from ..host.attention import reference_attention
from ..host.compiled import is_compiled, uncompiled
from ..host.key_value_cache import KeyValueStore
from ..host.unet_layers import BlockKey, group_of
from .carried import CarriedTokens
from .frames import frames_of_call
from .model_call import Lane, ModelCall, Scale, shares_of_lane
from .parts import Part, Settings
from .run_info import (
    KEY,
    Chunk,
    chunks_of_call,
    rows_of_each,
    watch_runs,
    whole_latent,
)
from .tiles import is_tile, repetitions
from .timing import rate

Slot = Callable[..., torch.Tensor]


@dataclass(frozen=True, eq=False)
class Application:
    """One Apply node on a model. Immutable; copies of the model share it.

    Attributes:
        checkpoint: the adapter.
        key_values: what the adapter makes of tokens.
        blocks: layer name -> ComfyUI's attention slot.
        settings: of everything that the node adds.
        tokens: its own, for conditionings that carry none; of one group, or of one a latent.
        regions: tokens that act beside them; their settings hold the node's already.
        normalise: weights that overlap are scaled down to a sum of 1.
    """

    checkpoint: AdapterCheckpoint
    key_values: KeyValueStore
    blocks: Mapping[str, BlockKey]
    settings: Settings
    tokens: ReferenceTokens | None = None
    regions: tuple[Part, ...] = ()
    normalise: bool = False

    def add_to(self, model: ModelPatcher) -> None:
        """Add the references to a cloned model."""
        watch_runs(model)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Application:
        return self

    def check_run(
        self, carried: Sequence[CarriedTokens], applications: Sequence[Application]
    ) -> None:
        """Refuse, before the first step, what this node and the run's conditionings cannot do.

        Raises:
            EasyRefError: tokens of an adapter that no Apply node of the model has, layer weights
                for layers that the model lacks, or nothing to apply at all.
        """
        adapters = {one.checkpoint.identity: one.checkpoint.name for one in applications}
        own = [one for one in carried if one.tokens.adapter == self.checkpoint.identity]
        for one in carried:
            if one.tokens.adapter not in adapters:
                raise EasyRefError(
                    f"A conditioning carries reference tokens made by {describe(one.tokens)}, but "
                    f"the model went through EasyRef Apply with {', '.join(adapters.values())} "
                    "only. Add an EasyRef Apply with that adapter, or encode the references again."
                )
        groups = {group_of(block) for block in self.blocks.values()}
        for one in own:
            check_tokens(self.checkpoint, one.tokens)
            check_groups(one.layer_weights, groups, "the model")
        if self.settings.weight != 0 and self.tokens is None and not self.regions and not own:
            raise EasyRefError(
                f"EasyRef Apply with {self.checkpoint.name} has neither tokens nor regions, and "
                "no conditioning of this sampling carries tokens of this adapter. Connect tokens "
                "or regions, or put EasyRef Set Conditioning behind the prompt."
            )

    def tokens_of_run(
        self, carried: Sequence[CarriedTokens], applications: Sequence[Application]
    ) -> list[ReferenceTokens]:
        """What may act in a run with these conditionings: its own tokens, its regions', and those
        that the conditionings carry for its adapter."""
        if self.settings.never:
            return []
        found = [] if self.tokens is None else [self.tokens]
        found += [part.tokens for part in self.regions if not part.settings.never]
        if self._with_same_adapter(applications)[-1:] == [self]:
            found += [
                one.tokens
                for one in carried
                if one.tokens.adapter == self.checkpoint.identity
                and one.weight != 0
                and any(one.layer_weights.factors)
            ]
        return list(dict.fromkeys(found))

    def _with_same_adapter(self, applications: Sequence[Application]) -> list[Application]:
        """Those that may act, this one among them."""
        return [
            one
            for one in applications
            if one.checkpoint.identity == self.checkpoint.identity and not one.settings.never
        ]

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
        chunks = chunks_of_call(options)
        lanes = [lane for lane in self._lanes(chunks, options) if any(lane)]
        if lanes:
            chunks, lanes = _as_called(chunks, lanes, x, c_crossattn, options)
        compiled = False
        if lanes:
            model = executor.class_obj
            self._take_slots(options, self._call(model, lanes, chunks, x, t, options))
            compiled = is_compiled(model, options)
        with uncompiled() if compiled else nullcontext():
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def _lanes(self, chunks: Sequence[Chunk], options: Mapping[str, Any]) -> list[Lane]:
        """What acts on each chunk: first the tokens of node or conditioning, then each region."""
        if self.settings.never:
            return []
        applications = get_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY, options)
        same = self._with_same_adapter(applications) or [self]
        # As with the LoRA, the last of several Apply nodes with one adapter counts.
        serves = same[-1] is self
        lends = serves and all(one.tokens is None for one in same)
        own = Part(self.tokens, self.settings) if self.tokens is not None else None
        made: dict[int, Part] = {}

        def carried_part(carried: CarriedTokens) -> Part | None:
            if id(carried) not in made:
                inner = Settings(carried.weight, layer_weights=carried.layer_weights)
                made[id(carried)] = Part(carried.tokens, inner).within(self.settings)
            part = made[id(carried)]
            return None if part.settings.never else part

        def of_chunk(chunk: Chunk) -> tuple[Part | None, bool]:
            for use in chunk.uses:
                if use.carried.tokens.adapter == self.checkpoint.identity:
                    return carried_part(use.carried) if serves else None, use.unconditional
            if own is None and lends:
                for carried in chunk.lent:
                    if carried.tokens.adapter == self.checkpoint.identity:
                        return carried_part(carried), True
            return own, chunk.negative

        first = [(part, half) if part else None for part, half in map(of_chunk, chunks)]
        return [first] + [
            [(region, chunk.negative) for chunk in chunks]
            for region in self.regions
            if not region.settings.never
        ]

    def _call(
        self,
        model: Any,
        lanes: Sequence[Lane],
        chunks: Sequence[Chunk],
        x: torch.Tensor,
        t: torch.Tensor,
        options: Mapping[str, Any],
    ) -> ModelCall:
        dtype = model.manual_cast_dtype or model.get_dtype()
        frames = frames_of_call(options, x.shape[0] // len(chunks))

        def rate_of(settings: Settings) -> Scale:
            return rate(settings, model.model_sampling, t, dtype)

        def key_values_of(part: Part) -> TokenKeyValues:
            return self.key_values.get(part.tokens, x.device, dtype)

        shares = [
            share
            for lane in lanes
            for share in shares_of_lane(lane, chunks, frames, rate_of, key_values_of)
        ]
        latent, whole = (x.shape[-2], x.shape[-1]), whole_latent(options, x)
        return ModelCall(shares, x.shape[0], len(chunks), latent, whole, self.normalise)

    def _take_slots(self, options: dict[str, Any], call: ModelCall) -> None:
        replace = dict(options.get("patches_replace", {}))
        slots = dict(replace.get("attn2", {}))
        for layer, block in self.blocks.items():
            group = group_of(block)
            if call.acts_on(group):
                before = slots.get(block) or slots.get(block[:2])
                slots[block] = _ReferenceAttention(call, layer, group, before)
        replace["attn2"] = slots
        options["patches_replace"] = replace


@dataclass(frozen=True, eq=False)
class _ReferenceAttention:
    """What stands on one attention slot during one model call."""

    call: ModelCall
    layer: str
    group: str
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
        if q.shape[0] != call.rows or text.shape != q.shape:
            _warn_once(q.shape[0], call.rows, call.conditionings)
            return text
        height, width = _resolution(extra_options, q.shape[1], call.latent)
        return add_shares(
            text,
            q,
            call.at(self.layer, self.group, height, width, q),
            lambda q, k, v: reference_attention(q, k, v, heads, precision),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> _ReferenceAttention:
        return self


def _as_called(
    chunks: list[Chunk],
    lanes: list[Lane],
    x: torch.Tensor,
    text: torch.Tensor | None,
    options: Mapping[str, Any],
) -> tuple[list[Chunk], list[Lane]]:
    """Chunks and lanes of the rows that the model is really called with.

    Lanes that nothing acts in are left out; a mask has no place on tiles.
    """
    each = rows_of_each(options)
    times = repetitions(x.shape[0], len(chunks), each, text)
    if not times:
        _warn_once(x.shape[0], len(chunks) * (each or [1])[0], len(chunks))
        return chunks, []
    latent, whole = (x.shape[-2], x.shape[-1]), whole_latent(options, x)
    if is_tile(latent, whole, chunks):
        unmasked = [
            [one if one and one[0].settings.mask is None else None for one in lane]
            for lane in lanes
        ]
        if unmasked != lanes:
            _warn_of_tiles(whole)
        lanes = [lane for lane in unmasked if any(lane)]
    return chunks * times, [lane * times for lane in lanes]


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
        "EasyRef: another node changed the batch (%d rows, where %d are expected for %d "
        "conditionings), so references cannot be told apart there and are left out.",
        found,
        rows,
        conditionings,
    )


@lru_cache(maxsize=1)
def _warn_of_tiles(whole: tuple[int, int]) -> None:
    logging.warning(
        "EasyRef: another node samples the picture (%d x %d latent cells) in tiles without saying "
        "which tile is where, so references with a mask cannot be placed and are left out.",
        *whole,
    )
