"""The adapter in diffusers' attention layers, whatever attention processor these have.

Pipelines and users replace processors at will (PAG, IP-Adapter, slicing, xFormers), so the adapter
keeps nothing there. A layer with an adapter is an `EasyRefAttention`, which gives its processor a
`LayerCall` in its own place: LoRA beside the projections, reference tokens beside the text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn

from ..adapter.attention import add_references, sdpa
from ..adapter.checkpoint import AdapterCheckpoint
from ..adapter.parts import LORA
from ..errors import EasyRefError

CHILD = "easyref"  # an attention layer's module for the adapter's weights


@dataclass(eq=False)
class Attachment:
    """State shared by all layers of one UNet that have an adapter.

    Attributes:
        checkpoint: the adapter; None for an untrained one.
        references: number of reference tokens, the last rows of the encoder states.
        text: number of rows before them; None for any.
        scale: weight of the reference tokens.
        merged: the LoRA, or part of it, is merged into the UNet's own weights.
    """

    checkpoint: AdapterCheckpoint | None = None
    references: int = 0
    text: int | None = None
    scale: float = 1.0
    merged: bool = False

    def split(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encoder states [B, T + N, W] -> text [B, T, W] and reference tokens [B, N, W] or None.

        Raises:
            EasyRefError: not the encoder states that `append_tokens` or `set_tokens` announced.
        """
        if not self.references:
            return states, None
        rows = states.shape[1]
        text = rows - self.references
        if text < 1 or self.text not in (None, text):
            wanted = "text states" if self.text is None else f"{self.text} text states"
            raise EasyRefError(
                f"The encoder states have {rows} rows; {wanted} followed by {self.references} "
                "reference tokens are needed. Pass what append_tokens returned, or call "
                "set_tokens(unet, None) for a prompt without references."
            )
        return states[:, :text], states[:, text:]


class LowRank(nn.Module):
    """up(down(x)), no alpha; starts as zero."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        nn.init.normal_(self.down.weight, std=1 / rank)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))


class AdapterLayer(nn.Module):
    """The adapter's weights for one attention layer, whose child `easyref` it is.

    Args:
        name: of the attention layer, for messages.
        widths: of the queries, and of the input of keys and values.
        rank: of the LoRA; 0 for none.
        is_cross_attention: there are reference tokens behind the text.
        adds_references: whether they are attended to; left out else.
    """

    def __init__(
        self,
        name: str,
        widths: tuple[int, int],
        rank: int,
        is_cross_attention: bool,
        attachment: Attachment,
        adds_references: bool = True,
    ) -> None:
        super().__init__()
        self.name = name
        self.is_cross_attention = is_cross_attention
        self.adds_references = adds_references and is_cross_attention
        self.attachment = attachment
        width, context_width = widths
        if rank:
            self.to_q_lora = LowRank(width, width, rank)
            self.to_k_lora = LowRank(context_width, width, rank)
            self.to_v_lora = LowRank(context_width, width, rank)
            self.to_out_lora = LowRank(width, width, rank)
        if self.adds_references:
            self.to_k_ip = nn.Linear(context_width, width, bias=False)
            self.to_v_ip = nn.Linear(context_width, width, bias=False)

    def lora(self, part: str) -> LowRank | None:
        """The LoRA of "to_q", ...; None without one, or where it has been merged."""
        return getattr(self, f"{part}_lora", None)


class EasyRefAttention(Attention):
    """diffusers' attention layer with an `AdapterLayer`; a layer becomes one by its class."""

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

        Raises:
            EasyRefError: an attention mask; encoder states of another length than announced; an
                attention processor that leaves out what the adapter changes.
        """
        layer = self._modules.get(CHILD)
        if layer is None:  # taken off, while a hook around this function was not
            return Attention.forward(
                self, hidden_states, encoder_hidden_states, attention_mask, **options
            )
        if attention_mask is not None:
            raise EasyRefError(
                "An attention mask was given to a UNet with EasyRef, whose text states are never "
                "masked. Call the UNet without encoder_attention_mask."
            )
        context, references = encoder_hidden_states, None
        if layer.is_cross_attention and isinstance(context, tuple):
            text, references = layer.attachment.split(context[0])
            context = (text, *context[1:])
        elif layer.is_cross_attention and context is not None:
            context, references = layer.attachment.split(context)
        call = LayerCall(self, layer, references if layer.adds_references else None)
        out = Attention.forward(call, hidden_states, context, **options)
        call.check()
        return out


class LayerCall:
    """An attention layer as its processor sees it during one call."""

    def __init__(
        self, attn: EasyRefAttention, layer: AdapterLayer, references: torch.Tensor | None
    ) -> None:
        self._attn = attn
        self._layer = layer
        self._references = references
        self._query: torch.Tensor | None = None
        self._used: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)

    @property
    def processor(self) -> Callable[..., torch.Tensor]:
        processor = self._attn.processor
        if torch.is_grad_enabled() and type(processor) is AttnProcessor2_0:
            return _TrainingProcessor()
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
        return _Projection(self, self._attn.to_qkv, "to_q", "to_k", "to_v")

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
            x = self._with_references(x)
        self._used.update(parts)
        outs = []
        for part, out in zip(parts, linear(x).chunk(len(parts), dim=-1), strict=True):
            lora = self._layer.lora(part)
            outs.append(out if lora is None else out + lora(x))
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
        if "to_q" in parts:
            self._query = out
        return out

    def check(self) -> None:
        """Raise EasyRefError unless the processor used all that the adapter changes."""
        wanted = [part for part in LORA if self._layer.lora(part) is not None]
        if self._references is not None:
            wanted.append("to_out")
        missing = [part for part in wanted if part not in self._used]
        if missing:
            raise self._unfit(f"does not use {', '.join(dict.fromkeys(missing))} of the layer")

    def _with_references(self, text: torch.Tensor) -> torch.Tensor:
        if self._references is None:
            return text
        query = self._query
        if query is None or query.shape != text.shape or "to_out" in self._used:
            raise self._unfit("does not compute one result from one query")
        heads = self._attn.heads
        return add_references(
            text,
            query,
            self._layer.to_k_ip(self._references),
            self._layer.to_v_ip(self._references),
            self._layer.attachment.scale,
            lambda q, k, v: sdpa(q, k, v, heads),
        )

    def _unfit(self, what: str) -> EasyRefError:
        return EasyRefError(
            f"The attention processor {type(self._attn.processor).__name__} of {self._layer.name} "
            f"{what}, so the adapter would be missing there. Use another processor, or detach the "
            "adapter."
        )


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
