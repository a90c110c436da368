"""The adapter and identity in diffusers' attention layers, whatever attention processor these have.

Pipelines and users replace processors at will (PAG, IP-Adapter, slicing, xFormers), so nothing is
kept there. A layer with an adapter or identity is an `EasyRefAttention`, which gives its processor
a `LayerCall` in its own place: LoRA beside the projections, reference tokens beside the text, the
references' features beside the sample's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
)
from torch import nn

from ..adapter.attention import add_references, sdpa
from ..adapter.identity import add_identity
from ..adapter.parts import LORA
from ..errors import EasyRefError
from .adapter_layer import CHILD, AdapterLayer
from .features import CallFeatures, Recording, RowFeatures

IDENTITY = "identity"  # in cross_attention_kwargs

_PAG = (PAGIdentitySelfAttnProcessor2_0, PAGCFGIdentitySelfAttnProcessor2_0)
_QKV = ("to_q", "to_k", "to_v")


class EasyRefAttention(Attention):
    """diffusers' attention layer with an `AdapterLayer`, identity, or both; a layer becomes one by
    its class."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """[B, T, width] -> [B, T, width].

        Args:
            encoder_hidden_states: [B, T + N, W]; with an IP-Adapter, a pair of these and its own.
            options: `identity`, a `CallFeatures` or a `Recording`, is not for the processor.

        Raises:
            EasyRefError: an attention mask; encoder states of another length than announced; an
                attention processor that leaves out what the adapter or identity changes.
        """
        layer: AdapterLayer | None = self._modules.get(CHILD)
        identity = _identity(options.pop(IDENTITY, None))
        recording = identity if isinstance(identity, Recording) else None
        features = identity.of(self) if isinstance(identity, CallFeatures) else ()
        if layer is None and not features and recording is None:
            return Attention.forward(
                self, hidden_states, encoder_hidden_states, attention_mask, **options
            )
        if attention_mask is not None:
            raise EasyRefError(
                "An attention mask was given to a UNet with EasyRef, whose text states are never "
                "masked. Call the UNet without encoder_attention_mask."
            )
        context, references = encoder_hidden_states, None
        if recording is not None and isinstance(context, tuple):
            context = context[0]  # an IP-Adapter is left out, like the reference tokens
        if layer is not None and layer.is_cross_attention and isinstance(context, tuple):
            text, references = layer.attachment.split(context[0])
            context = (text, *context[1:])
        elif layer is not None and layer.is_cross_attention and context is not None:
            context, references = layer.attachment.split(context)
        if recording is not None or layer is None or not layer.adds_references:
            references = None
        call = LayerCall(self, layer, references, features, recording)
        out = Attention.forward(call, hidden_states, context, **options)
        call.finish(hidden_states)
        return out


class LayerCall:
    """An attention layer as its processor sees it during one call.

    Args:
        references: reference tokens [B, N, W]; None for none.
        features: of the references, to which rows of the call attend.
        recording: of a reference pass.
    """

    def __init__(
        self,
        attn: EasyRefAttention,
        layer: AdapterLayer | None,
        references: torch.Tensor | None,
        features: Sequence[RowFeatures] = (),
        recording: Recording | None = None,
    ) -> None:
        self._attn = attn
        self._layer = layer
        self._references = references
        self._features = features
        self._recording = recording
        self._projected: dict[str, torch.Tensor] = {}
        self._used: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)

    @property
    def processor(self) -> Callable[..., torch.Tensor]:
        processor = self._attn.processor
        if torch.is_grad_enabled() and type(processor) is AttnProcessor2_0:
            return _TrainingProcessor()
        if self._recording is not None and _divides_rows_or_text(processor):
            return AttnProcessor2_0()
        return processor

    @property
    def to_q(self) -> _Projection:
        return _Projection(self, self._attn.to_q, "to_q")

    @property
    def to_k(self) -> _Projection:
        return _Projection(self, self._attn.to_k, "to_k")

    @property
    def to_v(self) -> _Projection:
        return _Projection(self, self._attn.to_v, "to_v")

    @property
    def to_qkv(self) -> _Projection:
        return _Projection(self, self._attn.to_qkv, *_QKV)

    @property
    def to_kv(self) -> _Projection:
        return _Projection(self, self._attn.to_kv, "to_k", "to_v")

    @property
    def to_out(self) -> list[Any]:
        first, *others = self._attn.to_out
        return [_Projection(self, first, "to_out"), *others]

    def project(self, linear: nn.Module, parts: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
        """A projection with its LoRA; several parts are one fused projection."""
        if parts == ("to_out",):
            x = self._with_references(self._with_identity(x))
        self._used.update(parts)
        outs = []
        for part, out in zip(parts, linear(x).chunk(len(parts), dim=-1), strict=True):
            lora = None if self._layer is None else self._layer.lora(part)
            outs.append(out if lora is None else out + lora(x))
        if parts != ("to_out",):
            self._projected.update(zip(parts, outs, strict=True))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)

    def finish(self, hidden_states: torch.Tensor) -> None:
        """Record the layer in a reference pass.

        Raises:
            EasyRefError: the processor did not use all that the adapter or identity changes.
        """
        layer, recording = self._layer, self._recording
        wanted = [p for p in LORA if layer is not None and layer.lora(p) is not None]
        recorded = recording is not None and recording.wants(self._attn)
        if self._features or recorded:
            wanted += _QKV
        if self._references is not None or self._features:
            wanted.append("to_out")
        missing = [part for part in wanted if part not in self._used]
        if missing:
            raise self._unfit(f"does not use {', '.join(dict.fromkeys(missing))} of the layer")
        if recorded:
            key, value = self._projected["to_k"], self._projected["to_v"]
            if not key.shape[:2] == value.shape[:2] == hidden_states.shape[:2]:
                raise self._unfit("does not compute one result from one query")
            recording.record(self._attn, layer, hidden_states, key, value)

    def _with_references(self, text: torch.Tensor) -> torch.Tensor:
        if self._references is None:
            return text
        query = self._projected.get("to_q")
        if query is None or query.shape != text.shape or "to_out" in self._used:
            raise self._unfit("does not compute one result from one query")
        return add_references(
            text,
            query,
            self._layer.to_k_ip(self._references),
            self._layer.to_v_ip(self._references),
            self._layer.attachment.scale,
            self._attend,
        )

    def _with_identity(self, own: torch.Tensor) -> torch.Tensor:
        if not self._features:
            return own
        perturbed = type(self._attn.processor) in _PAG
        if perturbed and "to_out" in self._used:
            return own  # of the perturbed rows, which attend to nothing
        query, key, value = (self._projected.get(part) for part in _QKV)
        if query is None or query.shape != own.shape or "to_out" in self._used:
            raise self._unfit("does not compute one result from one query")
        rows = [features.within(len(query)) for features in self._features]
        if not perturbed and any(f is not g for f, g in zip(rows, self._features, strict=True)):
            raise self._unfit("does not compute one result from one query")
        shares = [features.share(self._layer) for features in rows if features is not None]
        return add_identity(own, query, key, value, shares, self._attend)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sdpa(q, k, v, self._attn.heads)

    def _unfit(self, what: str) -> EasyRefError:
        name = getattr(self._layer, "name", "a self-attention layer")
        if self._features or self._recording is not None:
            return EasyRefError(
                f"The attention processor {type(self._attn.processor).__name__} of {name} {what}, "
                "so identity would be missing there. Use another processor, or leave out identity."
            )
        return EasyRefError(
            f"The attention processor {type(self._attn.processor).__name__} of {name} {what}, so "
            "the adapter would be missing there. Use another processor, or detach the adapter."
        )


def _identity(given: Any) -> CallFeatures | Recording | None:
    if given is None or isinstance(given, (CallFeatures, Recording)):
        return given
    raise EasyRefError(
        "cross_attention_kwargs holds an identity that this UNet does not read, because identity "
        "is not attached to it. Call attach_identity(unet) first, and pass an IdentityRun."
    )


def _divides_rows_or_text(processor: Any) -> bool:
    """Whether a processor is made for other rows or encoder states than a reference pass has."""
    return isinstance(processor, _PAG) or type(processor).__name__.startswith("IPAdapter")


class _Projection:
    """A layer's projection as its processor sees it."""

    def __init__(self, call: LayerCall, linear: nn.Module, *parts: str) -> None:
        self._call = call
        self._linear = linear
        self._parts = parts

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._call.project(self._linear, self._parts, x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._linear, name)


class _TrainingProcessor:
    """diffusers' default processor with the kernels that are fastest in training."""

    def __call__(
        self,
        attn: LayerCall,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        project, dropout = attn.to_out
        return dropout(project(sdpa(query, key, value, attn.heads)))
