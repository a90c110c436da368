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
        key, value: [G, N, heads * head_dim], each for R / G neighbouring rows.
        scale: a number, or a tensor that broadcasts to [R, P, 1, 1] for the P positions.
        rows: which of the B rows, None for all.
        positions: [P] which of the T positions, None for all.
    """

    key: torch.Tensor
    value: torch.Tensor
    scale: float | torch.Tensor
    rows: slice | None = None
    positions: torch.Tensor | None = None

    @property
    def everywhere(self) -> bool:
        return self.rows is None and self.positions is None


def add_shares(
    text: torch.Tensor,
    query: torch.Tensor,
    shares: Sequence[ReferenceShare],
    heads: int,
    attend: Attend,
) -> torch.Tensor:
    """`add_references` for several sets of tokens, each only at its rows and positions.

    Args:
        text, query: [B, T, heads * head_dim]; neither is changed.
        attend: the host's attention of heads, [R, heads, P, head_dim] for the queries of these rows
            and positions alone.
    """
    out = text
    # Of all heads, once for all sets: the query, and a view of `out` to add to.
    queries = place = None
    for share in shares:
        if share.everywhere:
            out, place = _add_everywhere(out, query, share, heads, attend), None
            continue
        if queries is None:
            queries = split_heads(query, heads)
        if place is None:
            if out is text:
                out = text.clone(memory_format=torch.contiguous_format)
            place = out.unflatten(-1, (heads, -1))  # [B, T, heads, head_dim]
        _add_some(place, queries, share, heads, attend)
    return out


def _add_everywhere(
    out: torch.Tensor, query: torch.Tensor, share: ReferenceShare, heads: int, attend: Attend
) -> torch.Tensor:
    scale = share.scale
    if isinstance(scale, torch.Tensor):
        scale = scale[..., 0]
    both = share.key, share.value
    return add_references(
        out, query, *both, scale, lambda q, k, v: attend_heads(q, k, v, heads, attend)
    )


def _add_some(
    place: torch.Tensor, queries: torch.Tensor, share: ReferenceShare, heads: int, attend: Attend
) -> None:
    """Add in place, [B, T, heads, head_dim], with the queries [B, heads, T, head_dim]."""
    if share.rows is not None:
        queries, place = queries[share.rows], place[share.rows]
    if share.positions is not None:
        queries = queries.index_select(2, share.positions)
    each = queries.shape[0] // share.key.shape[0]
    # Keys are few: repeating them takes less than bringing the rows that share them together.
    both = (x if each == 1 else x.repeat_interleave(each, 0) for x in (share.key, share.value))
    added = attend(queries, *(split_heads(x, heads) for x in both)).transpose(1, 2) * share.scale
    if added.dtype != place.dtype:
        added = added.to(place.dtype)
    if share.positions is None:
        place += added
    else:
        place.index_add_(1, share.positions, added)


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, T, heads * head_dim] -> [B, heads, T, head_dim]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, attend: Attend
) -> torch.Tensor:
    """Multi-head attention of [B, T, heads * head_dim] tensors.

    Args:
        key, value: [G, N, heads * head_dim], each for B / G neighbouring rows.
        attend: the host's attention of [B, heads, T, head_dim].
    """
    shape, groups = query.shape, key.shape[0]
    if shape[0] != groups:  # queries do not see each other, so rows with the same keys are one
        query = query.reshape(groups, -1, shape[2])
    out = attend(*(split_heads(x, heads) for x in (query, key, value)))
    out = out.transpose(1, 2).flatten(2)
    return out if shape[0] == groups else out.reshape(shape)


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """`attend_heads` with `attention_kernels.attend`."""
    return attend_heads(query, key, value, heads, attention_kernels.attend)
