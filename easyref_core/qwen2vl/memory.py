"""How much memory encoding a group takes beside the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..attention_kernels import SCORE_BYTES
from .config import MllmConfig, VisionConfig
from .decoder import MASK_BYTES

_PICTURES = 8  # in one call; a run can only be interrupted between calls


def working_bytes(
    config: MllmConfig,
    pictures: Sequence[int],
    length: int,
    dtype: torch.dtype,
    fused: bool,
    known: int = 0,
) -> int:
    """Peak memory of one pass, weights not counted.

    Within a tenth of what is measured at Qwen2-VL-2B's size (benchmarks/encoding_memory.py).

    Args:
        pictures: image tokens of each that is read.
        length: tokens of the chat, reference tokens included.
        dtype: of the activations.
        fused: attention never writes its scores to memory; otherwise they are computed in chunks.
        known: tokens of the chat's beginning that do not run again.
    """
    features = sum(pictures) * config.hidden_size * dtype.itemsize
    largest = vision_bytes(config.vision, max(pictures, default=0), dtype, fused)
    layer = decoder_bytes(config, length - known, dtype, fused, known)
    return max(features + largest if pictures else 0, layer)


def vision_calls(
    config: MllmConfig, pictures: Sequence[int], length: int, dtype: torch.dtype, fused: bool
) -> list[int]:
    """How many pictures, in order, the vision tower reads in each call: as many as fit into the
    memory that the decoder takes afterwards, up to eight, and one at least.

    Args:
        pictures: image tokens of each.
        length: tokens of the chat.
        fused: see `working_bytes`. Otherwise one a call, as scores take the most memory.
    """
    if not fused:
        return [1] * len(pictures)
    features = sum(pictures) * config.hidden_size * dtype.itemsize
    room = decoder_bytes(config, length, dtype, fused=True) - features
    calls: list[int] = []
    together = 0
    for tokens in pictures:
        together += tokens
        fits = vision_bytes(config.vision, together, dtype, fused=True) <= room
        if calls and calls[-1] < _PICTURES and fits:
            calls[-1] += 1
        else:
            calls.append(1)
            together = tokens
    return calls


def vision_bytes(config: VisionConfig, tokens: int, dtype: torch.dtype, fused: bool) -> int:
    """Peak memory of a block of the vision tower, for so many image tokens."""
    patches = tokens * config.spatial_merge_size**2
    # Patches, a block's input, its sum with attention, and the norm of either.
    base = (config.patch_dim + 3 * config.embed_dim) * dtype.itemsize
    # The first layer's output, its gate, and their product.
    feed_forward = 3 * config.mlp_dim * dtype.itemsize
    # Queries, keys and values, rotated queries and keys, and three float32 copies while rotating.
    rotation = config.embed_dim * (5 * dtype.itemsize + 3 * 4)
    if fused:
        return patches * (base + max(feed_forward, rotation))
    attention = patches * config.embed_dim * (7 * dtype.itemsize + 4)
    attention += _score_bytes(config.num_heads, patches, patches, dtype)
    return patches * base + max(patches * max(feed_forward, rotation), attention)


def decoder_bytes(
    config: MllmConfig, length: int, dtype: torch.dtype, fused: bool, known: int = 0
) -> int:
    """Peak memory of a decoder layer, for `length` tokens of a chat behind `known` ones."""
    whole = known + length
    # The chat, a layer's input, its sum with attention, its norm, and the positions.
    base = length * 4 * config.hidden_size * dtype.itemsize
    base += whole * 2 * config.head_dim * dtype.itemsize
    # Gate, up and their product.
    feed_forward = length * 3 * config.intermediate_size * dtype.itemsize
    attention = 0
    if known:
        # Keys and values of all, together and for each head, and a mask.
        narrow = config.num_kv_heads * config.head_dim
        attention = whole * 2 * (narrow + config.hidden_size) * dtype.itemsize
        attention += length * 2 * config.hidden_size * dtype.itemsize
        attention += min(MASK_BYTES, length * whole * dtype.itemsize)
    if not fused:
        attention += length * config.hidden_size * (4 * dtype.itemsize + 4)
        attention += _score_bytes(config.num_heads, length, whole, dtype)
    return base + max(feed_forward, attention)


def _score_bytes(heads: int, queries: int, keys: int, dtype: torch.dtype) -> int:
    """Of `attend_in_chunks`: a chunk's scores, their softmax, and that in the values' dtype."""
    scores = min(SCORE_BYTES, heads * queries * keys * 4)
    return scores * 2 + (scores * dtype.itemsize // 4 if dtype.itemsize < 4 else 0)
