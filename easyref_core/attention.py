"""Decoupled cross-attention, the one piece of maths every host's patch uses.

out = softmax(q k_text) v_text + scale * softmax(q k_ref) v_ref, before `to_out`: two separate
softmaxes over one shared query. Source: IP-Adapter (arXiv 2308.06721, section 3.2.2), as EasyRef
uses it (arXiv 2412.09618, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def add_references(
    text: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | torch.Tensor,
    attend: Attend,
) -> torch.Tensor:
    """Add what the query finds in the reference tokens to what it found in the text.

    Args:
        text: [B, T, heads * head_dim], the text's attention output.
        query: [B, T, heads * head_dim].
        key, value: [B, N, heads * head_dim] of the reference tokens.
        scale: a number, or a tensor that broadcasts to [B, T, 1].
        attend: the host's own attention of (query, key, value) in these shapes.
    """
    return text + attend(query, key, value) * scale


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """Multi-head attention over [B, T, heads * head_dim] tensors with PyTorch's own kernel."""

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, heads, T, head_dim]

    out = F.scaled_dot_product_attention(split(query), split(key), split(value))
    return out.transpose(1, 2).flatten(2)
