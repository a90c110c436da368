"""Which kernel computes attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """softmax(query key^T / sqrt(head_dim) + mask) value.

    PyTorch's own kernel; in training on a CPU plain matrix products, which take less than half
    its time forth and back.

    Args:
        query: [B, heads, T, head_dim].
        key, value: [B, heads, S, head_dim].
        mask: [T, S], added; none if causal.
        causal: row t sees columns up to t only.
    """
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if query.device.type != "cpu" or not learns:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    scores = (query * query.shape[-1] ** -0.5) @ key.mT  # [B, heads, T, S]
    if causal:
        mask = torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype).triu(1)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(dim=-1).to(value) @ value
