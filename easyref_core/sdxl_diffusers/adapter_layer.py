"""The adapter's weights for a diffusers attention layer, and what all layers of a UNet share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..adapter.checkpoint import AdapterCheckpoint
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
        identity_rank: of the identity LoRA; 0 for none.
    """

    def __init__(
        self,
        name: str,
        widths: tuple[int, int],
        rank: int,
        is_cross_attention: bool,
        attachment: Attachment,
        adds_references: bool = True,
        identity_rank: int = 0,
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
        if identity_rank:
            self.to_k_identity_lora = LowRank(context_width, width, identity_rank)
            self.to_v_identity_lora = LowRank(context_width, width, identity_rank)
        if self.adds_references:
            self.to_k_ip = nn.Linear(context_width, width, bias=False)
            self.to_v_ip = nn.Linear(context_width, width, bias=False)

    def lora(self, part: str) -> LowRank | None:
        """The LoRA of "to_q", ...; None without one, or where it has been merged."""
        return getattr(self, f"{part}_lora", None)

    def identity_lora(self, part: str) -> LowRank | None:
        """The identity LoRA of "to_k" or "to_v"; None without one."""
        return getattr(self, f"{part}_identity_lora", None)
