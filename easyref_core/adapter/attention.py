"""Decoupled cross-attention, shared by the diffusers processors and ComfyUI's patches.

out = softmax(q k_text) v_text + scale * softmax(q k_ref) v_ref, before `to_out`: two separate
softmaxes over one shared query. Source: IP-Adapter (arXiv 2308.06721, section 3.2.2), as EasyRef
uses it (arXiv 2412.09618, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .. import attention_kernels

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def add_references(
    text: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | torch.Tensor,
    attend: Attend,
) -> torch.Tensor:
    """Add attention over the reference tokens to attention over the text.

    Args:
        text: [B, T, heads * head_dim], the text's attention output.
        query: [B, T, heads * head_dim].
        key, value: [B, N, heads * head_dim] of the reference tokens.
        scale: a number, or a tensor that broadcasts to [B, T, 1].
        attend: the host's attention of (query, key, value) in these shapes.
    """
    added = attend(query, key, value)
    if isinstance(scale, torch.Tensor):
        return text + added * scale
    return torch.add(text, added, alpha=scale)


@dataclass(frozen=True, eq=False)
class ReferenceShare:
    """Keys and values of reference tokens, for some rows and positions of a layer.

    Attributes:
        key, value: [G, N, heads * head_dim], each for R / G neighbouring rows, as `attend` takes
            them.
        scale: a number, or a tensor that broadcasts to [R, P, 1] for the P positions.
        rows: which of the B rows, None for all.
        positions: [P] which of the T positions, None for all.
    """

    key: torch.Tensor
    value: torch.Tensor
    scale: float | torch.Tensor
    rows: slice | None = None
    positions: torch.Tensor | None = None


def add_shares(
    text: torch.Tensor, query: torch.Tensor, shares: Sequence[ReferenceShare], attend: Attend
) -> torch.Tensor:
    """`add_references` for several sets of tokens, each only at its rows and positions.

    Args:
        text, query: [B, T, heads * head_dim]; neither is changed.
        attend: the host's attention; called with the queries of these rows and positions alone.
    """
    out = text
    for share in shares:
        if share.rows is None and share.positions is None:
            out = add_references(out, query, share.key, share.value, share.scale, attend)
            continue
        if out is text:
            out = text.clone(memory_format=torch.contiguous_format)
        queries, place = query, out
        if share.rows is not None:
            queries, place = query[share.rows], out[share.rows]
        if share.positions is not None:
            queries = queries.index_select(1, share.positions)
        added = attend(queries, share.key, share.value) * share.scale
        if added.dtype != out.dtype:
            added = added.to(out.dtype)
        if share.positions is None:
            place += added
        else:
            place.index_add_(1, share.positions, added)
    return out


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """Multi-head attention of [B, T, heads * head_dim] tensors; see `attention_kernels.attend`."""

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, heads, T, head_dim]

    out = attention_kernels.attend(split(query), split(key), split(value))
    return out.transpose(1, 2).flatten(2)
