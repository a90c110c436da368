"""Attention with PyTorch's fused kernels, or in chunks where a device has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

SCORE_BYTES = 128 * 2**20
"""Largest float32 scores of one chunk of queries, where no fused kernel computes them."""

Attend = Callable[..., torch.Tensor]  # the signature of `attend`


def attend_of(operations: Any) -> Attend:
    """The attention of `operations` (an attribute `attend`), or `attend` where it has none."""
    return getattr(operations, "attend", attend)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """softmax(query key^T / sqrt(head_dim) + mask) value.

    PyTorch's fused kernel, or chunks of queries where the device has none. Training on a CPU uses
    plain matrix products, which take less than half the time, backward pass included.

    Args:
        query: [B, heads, T, head_dim].
        key, value: [B, heads, S, head_dim].
        mask: [T, S], added; none if causal.
        causal: row t attends to columns up to t only.
    """
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if training and query.device.type == "cpu":
        scores = (query * query.shape[-1] ** -0.5) @ key.mT  # [B, heads, T, S]
        if causal:
            mask = torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype).triu(1)
        if mask is not None:
            scores = scores + mask
        return scores.softmax(dim=-1).to(value) @ value
    # torch.compile cannot trace the question; who compiles has a kernel.
    compiling = torch.compiler.is_compiling()
    if training or compiling or is_fused(query, key, value, mask, causal):
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
    store all of them.
    """
    batch, heads, length, head_dim = query.shape
    columns = key.shape[2]
    step = max(1, SCORE_BYTES // (batch * heads * columns * 4))
    # Contiguous once, or the products of each chunk would copy them again.
    key, value = key.float().contiguous(), value.contiguous()
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for start in range(0, length, step):
        end = min(start + step, length)
        visible = min(end, columns) if causal else columns
        chunk = query[:, :, start:end].float() * head_dim**-0.5
        scores = chunk @ key[:, :, :visible].mT  # [B, heads, end - start, visible]
        if causal:
            later = torch.full((end - start, visible), float("-inf"), device=query.device)
            scores += later.triu(start + 1)
        if mask is not None:
            scores += mask[start:end]
        scores = scores.softmax(dim=-1)
        out[:, :, start:end] = scores.to(value.dtype) @ value[:, :, :visible]
        del scores  # before those of the next chunk
    return out


def has_fused(device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool) -> bool:
    """Whether `attend` uses a fused kernel there, without memory for scores."""
    query = torch.empty((1, 1, 64, head_dim), device=device, dtype=dtype)
    return is_fused(query, query, query, None, causal)


def is_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
) -> bool:
    """Whether PyTorch has a kernel for these that never writes scores to memory."""
    try:
        # The choice of scaled_dot_product_attention; 0 is the one without a fused kernel.
        chosen = torch._fused_sdp_choice(query, key, value, mask, is_causal=causal)
    except (AttributeError, RuntimeError):  # MPS, DirectML and others answer with an error
        return False
    return chosen > 0
