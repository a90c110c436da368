"""Which kernel computes attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

SCORE_BYTES = 128 * 2**20
"""What the float32 scores of one chunk of queries may take where no fused kernel computes them."""

Attend = Callable[..., torch.Tensor]
"""As `attend`."""


def attend_of(operations: Any) -> Attend:
    """The attention that comes with `operations` (an attribute `attend`); `torch.nn` has none, so
    PyTorch's own by default."""
    return getattr(operations, "attend", attend)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """softmax(query key^T / sqrt(head_dim) + mask) value.

    PyTorch's fused kernel, and chunks of queries where the device has none; in training on a CPU
    plain matrix products, which take less than half its time forth and back.

    Args:
        query: [B, heads, T, head_dim].
        key, value: [B, heads, S, head_dim].
        mask: [T, S], added; none if causal.
        causal: row t sees columns up to t only.
    """
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if learns and query.device.type == "cpu":
        scores = (query * query.shape[-1] ** -0.5) @ key.mT  # [B, heads, T, S]
        if causal:
            mask = torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype).triu(1)
        if mask is not None:
            scores = scores + mask
        return scores.softmax(dim=-1).to(value) @ value
    if learns or is_fused(query, key, value, mask, causal):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    return attend_in_chunks(query, key, value, mask, causal)


def attend_in_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """`attend` with plain matrix products, as many queries at a time as `SCORE_BYTES` allow.

    Scores are float32 in every precision, as in a fused kernel. Not for training: autograd would
    keep all of them.
    """
    batch, heads, length, head_dim = query.shape
    columns = key.shape[2]
    step = max(1, SCORE_BYTES // (batch * heads * columns * 4))
    # Once, or each chunk's products would copy them again.
    wide, value = key.float().contiguous(), value.contiguous()
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for start in range(0, length, step):
        end = min(start + step, length)
        seen = min(end, columns) if causal else columns
        asked = query[:, :, start:end].float() * head_dim**-0.5
        scores = asked @ wide[:, :, :seen].mT  # [B, heads, end - start, seen]
        if causal:
            later = torch.full((end - start, seen), float("-inf"), device=query.device)
            scores += later.triu(start + 1)
        if mask is not None:
            scores += mask[start:end]
        scores = scores.softmax(dim=-1)
        out[:, :, start:end] = scores.to(value.dtype) @ value[:, :, :seen]
        del scores  # before the next chunk's
    return out


def has_fused(device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool) -> bool:
    """Whether `attend` needs no room for scores there."""
    query = torch.empty((1, 1, 64, head_dim), device=device, dtype=dtype)
    return is_fused(query, query, query, None, causal)


def is_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
) -> bool:
    """Whether PyTorch has a kernel for these that never writes the scores down."""
    try:
        # What scaled_dot_product_attention itself asks; 0 are plain matrix products.
        chosen = torch._fused_sdp_choice(query, key, value, mask, is_causal=causal)
    except (AttributeError, RuntimeError):  # MPS, DirectML and others answer with an error
        return False
    return chosen > 0
