"""One EasyRef Identity node on a model.

Attention is patched on a copy of the transformer options of each model call, so nothing remains on
the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...easyref_core.adapter.identity import IdentityLora
from ..host.compiled import is_compiled, uncompiled
from ..host.reference_latents import CELL, ReferenceLatents
from ..host.unet_layers import BlockKey, SelfAttentionLayer, group_of
from .batch_rows import Area, CallRows, divide_rows
from .conditionings import COND_BATCH, cond_rows
from .identity_layer import IdentityCall, RowsOfIdentity, add_to_layers
from .identity_run import STEPS, IdentityStep, watch_identity
from .model_call import warn_of_tiles
from .run import IDENTITY_KEY
from .weights import Weight, Weighted, largest_batch


@dataclass(frozen=True, eq=False)
class IdentityPatch(Weighted):
    """One Identity node on a model. Immutable; copies of the model share it.

    Attributes:
        references: pictures, and their latents.
        layers: diffusers' name -> self-attention layer of the model.
        weights: of what the references add.
        reuse_steps: how many steps the features of one reference pass serve, 1 or more.
        lora: diffusers' name -> what is added to keys and values of the references.
        node: its id in the graph, None outside a graph.
    """

    references: ReferenceLatents
    layers: Mapping[str, SelfAttentionLayer]
    weights: tuple[Weight, ...]
    reuse_steps: int = 1
    lora: Mapping[str, IdentityLora] = field(default_factory=dict)
    node: str | None = None

    def add_to(self, model: ModelPatcher) -> None:
        """Add the references to a cloned model."""
        watch_identity(model)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, IDENTITY_KEY, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> IdentityPatch:
        return self

    @property
    def batch(self) -> int:
        """How many latents it has weights of their own for; 1 for the same for all."""
        return largest_batch(self.weights)

    @cached_property
    def acting_blocks(self) -> frozenset[BlockKey]:
        """Slots of the layers whose weight is not 0."""
        blocks = (layer.block for layer in self.layers.values())
        return frozenset(block for block in blocks if self.at_layers(group_of(block)) != 0)

    def scale(self, model_sampling: Any, sigmas: torch.Tensor) -> float:
        """The weight at a step.

        Where it changes over the sampling, this waits for the device, once a step: whether there
        is a reference pass has to be known here.

        Args:
            model_sampling: ComfyUI's noise schedule of the model.
            sigmas: [B], of which the first counts.
        """
        return float(self.at_sigmas(model_sampling, sigmas[:1], torch.float32))

    def working_bytes(self, model: Any, shape: Sequence[int]) -> int:
        """Memory of a run beside what the model takes without references.

        Args:
            model: ComfyUI's `BaseModel`.
            shape: of the run's latents, [B, C, H, W].
        """
        config, itemsize = model.model_config.unet_config, _dtype(model).itemsize
        cells = shape[-2] * shape[-1]
        sizes = self.references.sizes(cells * CELL**2)
        reference_cells = sum(width * height for width, height in sizes) // CELL**2
        acting = [layer for layer in self.layers.values() if layer.block in self.acting_blocks]
        features, largest = 0, 0
        for layer in acting:
            shrunk = 4 ** _level(config, layer.width)
            features += reference_cells // shrunk * layer.width
            # Keys and values of the references, and beside the layer's own, for every latent.
            joint = 2 * (reference_cells + shape[0] * (cells + reference_cells)) // shrunk
            largest = max(largest, joint * layer.width)
        held = features * (1 if self.reuse_steps == 1 else 2)  # old ones are compared with new
        return (held + largest) * itemsize + self._lora_bytes(itemsize)

    def _lora_bytes(self, itemsize: int) -> int:
        tensors = (vars(weights).values() for weights in self.lora.values())
        return sum(tensor.numel() for layer in tensors for tensor in layer) * itemsize

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
        model = executor.class_obj
        if STEPS not in options and not self.is_noop:
            _warn_of_sampler()
        step: IdentityStep | None = options.get(STEPS, {}).get(self)
        rows = self._rows(x, c_crossattn, options) if step is not None else None
        acts_on = self._acts_on(rows, options) if rows is not None else []
        compiled = bool(acts_on) and is_compiled(model, options)
        with uncompiled("EasyRef Identity acts") if compiled else nullcontext():
            if acts_on:
                add_to_layers(options, self._call(model, step, rows, acts_on, t, options))
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def _rows(
        self, x: torch.Tensor, text: torch.Tensor | None, options: Mapping[str, Any]
    ) -> CallRows | None:
        areas = [rows.area for rows in cond_rows(options)]
        return divide_rows(x, text, areas, options, options.get(COND_BATCH))

    def _acts_on(self, call: CallRows, options: Mapping[str, Any]) -> list[RowsOfIdentity]:
        """The conditional rows of a call, neighbours with the same weights together.

        Raises:
            EasyRefError: masks for a batch of another size.
        """
        conditionings = cond_rows(options) * call.tiles
        if self.by_position and call.is_tile:  # nothing says where in the picture it is
            warn_of_tiles(call.latent)
            return []

        def same_weights(number: int) -> tuple[Area | None] | None:
            if conditionings[number].negative:
                return None
            return (call.areas[number] if self.by_position else None,)

        found, count = [], call.batch.count
        for same, group in groupby(range(len(conditionings)), same_weights):
            if same is not None:
                numbers = list(group)
                rows = slice(numbers[0] * count, (numbers[-1] + 1) * count)
                found.append(RowsOfIdentity(rows, len(numbers), call.batch, same[0]))
        if found:
            for weight in self.weights:
                weight.check_batch(call.batch)
        return found

    def _call(
        self,
        model: Any,
        step: IdentityStep,
        rows: CallRows,
        acts_on: Sequence[RowsOfIdentity],
        t: torch.Tensor,
        options: Mapping[str, Any],
    ) -> IdentityCall:
        features = step.run.features(step, model, t[:1], options)
        like = torch.empty(0, device=t.device, dtype=_dtype(model))
        return IdentityCall(
            self,
            step.scale,
            rows,
            acts_on,
            model.diffusion_model,
            self.layers,
            features,
            step.run.lora(like),
        )


@lru_cache(maxsize=1)
def _warn_of_sampler() -> None:
    logging.warning(
        "EasyRef Identity: another node calls the model without ComfyUI's own sampling, so the "
        "references cannot be read there and are left out."
    )


def _dtype(model: Any) -> torch.dtype:
    """In which ComfyUI's `BaseModel` computes."""
    return model.manual_cast_dtype or model.get_dtype()


def _level(config: Mapping[str, Any], width: int) -> int:
    """How often the positions of a layer of this width are halved, at least."""
    multiples = list(config.get("channel_mult") or [1])
    multiple = width // config.get("model_channels", width)
    return multiples.index(multiple) if multiple in multiples else 0
