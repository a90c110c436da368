"""Attention processors for diffusers: EasyRef's, and one that gives a ControlNet the text alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapter.attention import add_references, sdpa
from ..adapter.checkpoint import AdapterCheckpoint
from ..errors import EasyRefError


@dataclass(eq=False)
class Attachment:
    """State shared by all EasyRef processors of one UNet.

    Attributes:
        before: the processors that they replace, by diffusers' name.
        checkpoint: the adapter; None for an untrained one.
        references: number of reference tokens, the last rows of the encoder states.
        text: number of rows before them; None for any.
        scale: weight of the reference tokens.
        merged: the LoRA, or part of it, is merged into the UNet's own weights.
    """

    before: Mapping[str, Any]
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


class EasyRefProcessor(nn.Module):
    """Attention processor: LoRA where `rank` > 0, reference tokens in cross-attention.

    Args:
        width: of the queries.
        context_width: of the input of keys and values (the text's width, or `width`).
        rank: of the LoRA; 0 for none.
    """

    def __init__(
        self,
        width: int,
        context_width: int,
        rank: int,
        is_cross_attention: bool,
        attachment: Attachment,
    ) -> None:
        super().__init__()
        self.is_cross_attention = is_cross_attention
        self.attachment = attachment
        if rank:
            self.to_q_lora = LowRank(width, width, rank)
            self.to_k_lora = LowRank(context_width, width, rank)
            self.to_v_lora = LowRank(context_width, width, rank)
            self.to_out_lora = LowRank(width, width, rank)
        if is_cross_attention:
            self.to_k_ip = nn.Linear(context_width, width, bias=False)
            self.to_v_ip = nn.Linear(context_width, width, bias=False)

    def forward(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, T, width] -> [B, T, width], as diffusers calls it.

        Raises:
            EasyRefError: an attention mask, or encoder states of another length than announced.
        """
        if attention_mask is not None:
            raise EasyRefError(
                "An attention mask was given to a UNet with EasyRef, whose text states are never "
                "masked. Call the UNet without encoder_attention_mask."
            )
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        references = None
        if self.is_cross_attention:
            context, references = self.attachment.split(context)
        query = self._project(attn.to_q, "to_q", hidden_states)
        key = self._project(attn.to_k, "to_k", context)
        value = self._project(attn.to_v, "to_v", context)
        out = sdpa(query, key, value, attn.heads)
        if references is not None:
            out = add_references(
                out,
                query,
                self.to_k_ip(references),
                self.to_v_ip(references),
                self.attachment.scale,
                lambda q, k, v: sdpa(q, k, v, attn.heads),
            )
        out = self._project(attn.to_out[0], "to_out", out)
        return attn.to_out[1](out)  # dropout

    def lora(self, part: str) -> LowRank | None:
        """The LoRA of "to_q", ...; None without one, or where it has been merged."""
        return getattr(self, f"{part}_lora", None)

    def _project(self, linear: nn.Module, part: str, x: torch.Tensor) -> torch.Tensor:
        lora = self.lora(part)
        return linear(x) if lora is None else linear(x) + lora(x)


class TextOnlyProcessor:
    """For a ControlNet that gets the UNet's encoder states: ignores the reference tokens."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        context = hidden_states
        if encoder_hidden_states is not None:
            context, _ = self.attachment.split(encoder_hidden_states)
        out = sdpa(attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context), attn.heads)
        return attn.to_out[1](attn.to_out[0](out))
