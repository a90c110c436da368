"""How long a group may be, and how much memory reading it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ..attention_kernels import SCORE_BYTES
from ..errors import EasyRefError
from .config import MllmConfig, VisionConfig
from .prompt import PromptTokenizer, TokenizedPrompt


class MllmSizes(Protocol):
    """What must be known of an encoder to plan its readings: an `EncoderPlan` says it before
    weights are read, an `EasyRefEncoder` afterwards.
    """

    @property
    def config(self) -> MllmConfig: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def image_size(self) -> int: ...


def check_length(
    sizes: MllmSizes,
    tokenizer: PromptTokenizer,
    plan: TokenizedPrompt,
    prompt: str,
    image_size: int,
) -> None:
    """Raise EasyRefError where a chat and the reference tokens exceed the MLLM's context."""
    limit = sizes.config.max_positions
    length = len(plan) + sizes.num_tokens
    if int(plan.ids.max()) >= sizes.config.vocab_size:
        raise EasyRefError(
            f"The tokenizer of {tokenizer.source} has token {int(plan.ids.max())}, but the MLLM "
            f"knows only {sizes.config.vocab_size}. Choose the MLLM directory the adapter was "
            "trained from; its tokenizer belongs to it."
        )
    if length <= limit:
        return
    pictures = sum(end - first for first, end in plan.image_spans)
    needed = decoder_bytes(sizes.config, length, torch.bfloat16, fused=True) / 1e9
    text = len(plan) - pictures
    if pictures <= limit // 2:
        raise EasyRefError(
            f"The prompt is too long: {len(prompt):,} characters are {text:,} tokens, and with "
            f"{len(plan.image_spans)} pictures the MLLM would read {length:,} where {limit:,} is "
            f"its limit. Shorten the prompt by {length - limit:,} tokens."
        )
    each = pictures / len(plan.image_spans)
    fits = int((limit - text - sizes.num_tokens) / each)
    fewer = f"at most about {fits} references of these shapes, or " if fits > 0 else ""
    raise EasyRefError(
        f"{len(plan.image_spans)} references are {pictures:,} tokens at image_size {image_size}; "
        f"with the prompt the MLLM would read {length:,} where {limit:,} is its limit (and, in "
        f"bf16, about {needed:.1f} GB of working memory). Use {fewer}a smaller image_size."
    )


def working_bytes(
    config: MllmConfig, pictures: Sequence[int], length: int, dtype: torch.dtype, fused: bool
) -> int:
    """The most memory that reading a group takes at once, weights not counted.

    Within a tenth of the truth at Qwen2-VL-2B's size; benchmarks/encoding_memory.py counts it.

    Args:
        pictures: tokens of each, negatives included.
        length: tokens of the longest chat, reference tokens included.
        dtype: of the activations.
        fused: attention never writes its scores down; otherwise they go in chunks.
    """
    features = sum(pictures) * config.hidden_size * dtype.itemsize  # kept until the end
    largest = vision_bytes(config.vision, max(pictures, default=0), dtype, fused)
    return features + max(largest, decoder_bytes(config, length, dtype, fused))


def vision_bytes(config: VisionConfig, tokens: int, dtype: torch.dtype, fused: bool) -> int:
    """The widest moment of a block of the vision tower, for one picture of so many tokens."""
    patches = tokens * config.spatial_merge_size**2
    # Patches, a block's input, its sum with attention, and the norm of either.
    base = (config.patch_dim + 3 * config.embed_dim) * dtype.itemsize
    # The wide layer's result, its gate, and their product.
    feed_forward = 3 * config.mlp_dim * dtype.itemsize
    # Queries, keys and values, then turned ones, beside the three float32 copies they are made of.
    rotation = config.embed_dim * (5 * dtype.itemsize + 3 * 4)
    if fused:
        return patches * (base + max(feed_forward, rotation))
    attention = patches * config.embed_dim * (7 * dtype.itemsize + 4)
    attention += _score_bytes(config.num_heads, patches, dtype)
    return patches * base + max(patches * max(feed_forward, rotation), attention)


def decoder_bytes(config: MllmConfig, length: int, dtype: torch.dtype, fused: bool) -> int:
    """The widest moment of a decoder layer, for a chat of `length` tokens."""
    # The chat, a layer's input, its sum with attention, its norm, and the positions.
    base = (4 * config.hidden_size + 2 * config.head_dim) * dtype.itemsize
    # Gate, up and their product.
    feed_forward = 3 * config.intermediate_size * dtype.itemsize
    if fused:
        return length * (base + feed_forward)
    attention = length * config.hidden_size * (4 * dtype.itemsize + 4)
    attention += _score_bytes(config.num_heads, length, dtype)
    return length * base + max(length * feed_forward, attention)


def _score_bytes(heads: int, length: int, dtype: torch.dtype) -> int:
    """Of `attend_in_chunks`: a chunk's scores, their softmax, and that in the values' dtype."""
    scores = min(SCORE_BYTES, heads * length**2 * 4)
    return scores * 2 + (scores * dtype.itemsize // 4 if dtype.itemsize < 4 else 0)
