"""Qwen2 decoder layers, with plain positions 0..L-1 and causal attention.

Source: Qwen2's Hugging Face weights, whose names are kept. The official code passes embeddings
alone, no token ids and no grids, so Qwen2-VL's multimodal rotary positions never apply.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..attention_kernels import attend_of
from .config import MllmConfig

Rope = tuple[torch.Tensor, torch.Tensor]

MASK_BYTES = 16 * 2**20
"""Largest mask of one chunk of rows that continue a chat."""


def rope(config: MllmConfig, length: int, device: torch.device, dtype: torch.dtype) -> Rope:
    """Cosines and sines [length, head_dim] of positions 0..length-1."""
    dim = config.head_dim
    steps = torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim
    frequencies = 1.0 / (config.rope_theta**steps)
    half = torch.arange(length, device=device).float()[:, None] * frequencies
    angles = torch.cat((half, half), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: torch.Tensor, position: Rope) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * position[0] + torch.cat((-second, first), dim=-1) * position[1]


class LayerCache:
    """Keys and values of one layer for the beginning of a chat, so that only its other rows run.

    Args:
        past: [2, kv_heads, P, head_dim] of each part of the beginning, in order, on the CPU; keys
            with their rotary positions.
        new: likewise, to be filled with those of the first rows that run.

    Attributes:
        length: P of all parts.
    """

    def __init__(self, past: Sequence[torch.Tensor] = (), new: Sequence[torch.Tensor] = ()) -> None:
        self._past, self._new = past, new
        self.length = sum(part.shape[2] for part in past)

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep keys and values [1, kv_heads, L, head_dim], and put the earlier ones before them."""
        if not self._past and not self._new:
            return keys, values
        rows = torch.cat((keys, values))
        lengths = [part.shape[2] for part in self._new]
        if lengths:
            kept = rows[:, :, : sum(lengths)].cpu()  # together, as each copy is a wait
            for part, found in zip(self._new, kept.split(lengths, dim=2), strict=True):
                part.copy_(found)
        if self._past:
            rows = torch.cat((torch.cat([*self._past], dim=2).to(rows), rows), dim=2)
        return rows[:1], rows[1:]


class SelfAttention(nn.Module):
    """Causal attention with fewer key/value heads than query heads."""

    def __init__(self, config: MllmConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        width, head = config.hidden_size, config.head_dim
        self.head_dim = head
        self.attend = attend_of(operations)
        self.groups = config.num_heads // config.num_kv_heads
        self.q_proj = operations.Linear(width, config.num_heads * head, bias=True, **factory)
        self.k_proj = operations.Linear(width, config.num_kv_heads * head, bias=True, **factory)
        self.v_proj = operations.Linear(width, config.num_kv_heads * head, bias=True, **factory)
        self.o_proj = operations.Linear(config.num_heads * head, width, bias=False, **factory)

    def forward(
        self,
        x: torch.Tensor,
        position: Rope,
        queries: int,
        bias: torch.Tensor | None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        """x [B, L, D] -> [B, queries, D], the last `queries` rows only."""
        q, k, v = self._project(x, position, queries, cache)
        length = k.shape[2]
        if queries == length and bias is None:
            out = self.attend(q, k, v, causal=True)
        else:
            rows = max(1, MASK_BYTES // (length * q.itemsize))
            chunks = []
            for chunk in q.split(rows, dim=2):  # each sees what is before it, and itself
                queries -= chunk.shape[2]
                seen = length - queries
                part = None if bias is None else bias[:seen]
                mask = _mask(chunk.shape[2], seen, part, x.device, x.dtype)
                chunks.append(self.attend(chunk, k[:, :, :seen], v[:, :, :seen], mask))
            out = torch.cat(chunks, dim=2) if len(chunks) > 1 else chunks[0]
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def probabilities(
        self,
        x: torch.Tensor,
        position: Rope,
        queries: int,
        bias: torch.Tensor | None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        """Attention probabilities of the last `queries` rows of x [B, L, D]: [B, queries, L]
        float32, the mean of all heads. Each row adds up to 1. With a cache, L counts its rows."""
        q, k, _ = self._project(x, position, queries, cache)
        mask = _mask(queries, k.shape[2], bias, x.device, torch.float32)
        scores = q.float() @ k.float().mT * self.head_dim**-0.5
        return (scores + mask).softmax(dim=-1).mean(dim=1)

    def _project(
        self, x: torch.Tensor, position: Rope, queries: int, cache: LayerCache | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries with rotary positions [B, heads, queries, head_dim], keys likewise and values
        [B, heads, L, head_dim], those of the cache before the rows'."""
        start = x.shape[1] - queries
        q = self._heads(self.q_proj(x[:, start:]))
        q = _rotate(q, (position[0][start:], position[1][start:]))
        k = _rotate(self._heads(self.k_proj(x)), position)
        v = self._heads(self.v_proj(x))
        if cache is not None:
            k, v = cache.extend(k, v)
        return q, *(t.repeat_interleave(self.groups, dim=1) for t in (k, v))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, heads * head_dim] -> [B, heads, L, head_dim]"""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _mask(
    queries: int,
    length: int,
    bias: torch.Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Additive causal mask [queries, length] for the last `queries` of `length` positions, plus
    bias [length]."""
    mask = torch.full((queries, length), float("-inf"), device=device, dtype=dtype)
    mask = mask.triu(length - queries + 1)
    return mask if bias is None else mask + bias.to(mask)


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, config: MllmConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = operations.Linear(width, inner, bias=False, **factory)
        self.up_proj = operations.Linear(width, inner, bias=False, **factory)
        self.down_proj = operations.Linear(inner, width, bias=False, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: MllmConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        eps = config.rms_norm_eps
        self.input_layernorm = operations.RMSNorm(config.hidden_size, eps=eps, **factory)
        self.self_attn = SelfAttention(config, operations, **factory)
        self.post_attention_layernorm = operations.RMSNorm(config.hidden_size, eps=eps, **factory)
        self.mlp = Mlp(config, operations, **factory)

    def forward(
        self,
        x: torch.Tensor,
        position: Rope,
        queries: int | None = None,
        bias: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        """x [B, L, D] -> [B, queries, D].

        Args:
            position: cosines and sines of the rows' positions, and maybe more after them.
            queries: compute only so many last rows (all by default); each still attends to every
                row before it.
            bias: added to the attention logits of each computed row; [L], rows of the cache
                included.
            cache: of the rows before x, if x continues a chat (B is 1 then).
        """
        length = x.shape[1]
        queries = length if queries is None else queries
        position = (position[0][:length], position[1][:length])
        x = x[:, length - queries :] + self.self_attn(
            self.input_layernorm(x), position, queries, bias, cache
        )
        return x + self.mlp(self.post_attention_layernorm(x))

    def attention(
        self,
        x: torch.Tensor,
        position: Rope,
        queries: int,
        bias: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        """`SelfAttention.probabilities` for the input x of `forward`, at L positions."""
        return self.self_attn.probabilities(self.input_layernorm(x), position, queries, bias, cache)
