"""One EasyRef Apply node on a model.

Attention is patched on a copy of the transformer options of each model call, so nothing remains on
the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...easyref_core.adapter.checkpoint import AdapterCheckpoint
from ...easyref_core.adapter.key_values import check_tokens
from ...easyref_core.errors import EasyRefError
from ...easyref_core.tokens.reference_tokens import ReferenceTokens, describe
from ..host.key_value_cache import KeyValueStore
from ..host.unet_layers import BlockKey, group_of
from .batch_rows import divide_rows
from .compiled_call import ACT, run_compiled
from .conditionings import COND_BATCH, CondRows, CondTokens, cond_rows
from .layer import add_to_layers
from .model_call import Assignment, ModelCall, effects_on_rows
from .run import COMPILED_KEY, KEY, patches_of, watch_runs
from .weights import Effect, Weight, is_zero, largest_batch


@dataclass(frozen=True, eq=False)
class ReferencePatch:
    """One Apply node on a model. Immutable; copies of the model share it.

    Attributes:
        checkpoint: the adapter.
        key_values: cached keys and values of tokens.
        blocks: layer name -> ComfyUI's attention slot.
        weights: of everything that the node adds.
        tokens: its own, for conditionings that carry none; of one group, or of one a latent.
        regions: added to them; they hold the node's weights already.
        normalise: scales that overlap are divided down to a sum of 1.
    """

    checkpoint: AdapterCheckpoint
    key_values: KeyValueStore
    blocks: Mapping[str, BlockKey]
    weights: tuple[Weight, ...]
    tokens: ReferenceTokens | None = None
    regions: tuple[Effect, ...] = ()
    normalise: bool = False

    def add_to(self, model: ModelPatcher) -> None:
        """Add the references to a cloned model."""
        watch_runs(model)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self)
        if not model.get_wrappers(WrappersMP.APPLY_MODEL, COMPILED_KEY):
            model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, COMPILED_KEY, run_compiled)

    def __deepcopy__(self, memo: dict[int, Any]) -> ReferencePatch:
        return self

    @property
    def batch(self) -> int:
        """How many latents it has tokens or weights of their own for; 1 for the same for all."""
        own = self.tokens.batch if self.tokens is not None else 1
        return max(own, largest_batch(self.weights), *(region.batch for region in self.regions))

    def check_run(self, carried: Sequence[Effect], patches: Sequence[ReferencePatch]) -> None:
        """Refuse, before the first step, what this node and the run's conditionings cannot do.

        Raises:
            EasyRefError: tokens of an adapter that no Apply node of the model has, layer weights
                for layers that the model lacks, or nothing to apply at all.
        """
        adapters = {patch.checkpoint.identity: patch.checkpoint for patch in patches}
        for effect in carried:
            if not any(found.made(effect.tokens.adapter) for found in adapters.values()):
                names = ", ".join(found.name for found in adapters.values())
                raise EasyRefError(
                    f"A conditioning carries reference tokens made by {describe(effect.tokens)}, "
                    f"but the model went through EasyRef Apply with {names} "
                    "only. Add an EasyRef Apply with that adapter, or encode the references again."
                )
        own = [e for e in carried if self.checkpoint.made(e.tokens.adapter)]
        groups = {group_of(block) for block in self.blocks.values()}
        for effect in own:
            check_tokens(self.checkpoint, effect.tokens)
            for weight in effect.weights:
                weight.check_layers(groups, "the model")
        if not (self.tokens or self.regions or own or is_zero(self.weights)):
            raise EasyRefError(
                f"EasyRef Apply with {self.checkpoint.name} has neither tokens nor regions, and "
                "no conditioning of this sampling carries tokens of this adapter. Connect tokens "
                "or regions, or put EasyRef Set Conditioning after the prompt."
            )

    def tokens_of_run(
        self, carried: Sequence[Effect], patches: Sequence[ReferencePatch]
    ) -> list[ReferenceTokens]:
        """What may act in a run with these conditionings: its own tokens, its regions', and those
        that the conditionings carry for its adapter."""
        rows = [CondRows(negative=False)]
        rows += [CondRows(negative=False, tokens=(CondTokens(effect),)) for effect in carried]
        assignments = itertools.chain.from_iterable(self._assign(rows, patches))
        return list(dict.fromkeys(effect.tokens for effect, _ in filter(None, assignments)))

    def _serving(self, patches: Sequence[ReferencePatch]) -> list[ReferencePatch]:
        """Patches of the same adapter that may act. Tokens of conditionings are added by the last
        one, as its LoRA strength counts too."""
        identity = self.checkpoint.identity
        same = [p for p in patches if p.checkpoint.identity == identity and not is_zero(p.weights)]
        return same or [self]

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
        call = self._plan(executor.class_obj, x, t, c_crossattn, options)
        if call is not None:
            add_to_layers(options, self.blocks, call)
            options[ACT] = True
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def _plan(
        self,
        model: Any,
        x: torch.Tensor,
        t: torch.Tensor,
        text: torch.Tensor | None,
        options: Mapping[str, Any],
    ) -> ModelCall | None:
        """What is added in a model call, None for nothing."""
        conditionings = cond_rows(options)
        assignments = self._assign(conditionings, patches_of({"transformer_options": options}))
        if not any(any(assigned) for assigned in assignments):
            return None
        areas = [rows.area for rows in conditionings]
        rows = divide_rows(x, text, areas, options, options.get(COND_BATCH))
        if rows is None:
            return None
        dtype = model.manual_cast_dtype or model.get_dtype()
        effects = effects_on_rows(
            assignments,
            rows,
            lambda effect: effect.at_sigmas(model.model_sampling, t, dtype),
            lambda effect: self.key_values.get(effect.tokens, x.device, dtype),
        )
        return ModelCall(rows, effects, self.normalise) if effects else None

    def _assign(
        self, conditionings: Sequence[CondRows], patches: Sequence[ReferencePatch]
    ) -> list[list[Assignment]]:
        """What acts on each conditioning's rows: its own tokens or the node's, then each region."""
        if is_zero(self.weights):
            return []
        serving = self._serving(patches)
        serves = serving[-1] is self
        needs_fallback = serves and all(patch.tokens is None for patch in serving)
        own = Effect(self.tokens, self.weights) if self.tokens is not None else None

        @cache  # one effect for all rows that carry it
        def within_node(effect: Effect) -> Effect:
            return effect.within(self.weights)

        def assign(rows: CondRows) -> Assignment:
            for given in rows.tokens:
                if self.checkpoint.made(given.adapter) and (needs_fallback or not given.fallback):
                    effect = within_node(given.effect)
                    acts = serves and not effect.is_noop
                    return (effect, given.unconditional) if acts else None
            return (own, rows.negative) if own is not None else None

        regions = [region for region in self.regions if not region.is_noop]
        return [
            [assign(rows) for rows in conditionings],
            *([(region, rows.negative) for rows in conditionings] for region in regions),
        ]
