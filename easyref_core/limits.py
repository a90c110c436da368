"""How long a group may be, and how much memory reading it takes."""

from __future__ import annotations

from typing import Protocol

import torch

from .config import MllmConfig
from .errors import EasyRefError
from .prompt import PromptTokenizer, TokenizedPrompt

_NO_ROOM = ("out of memory", "allocate memory", "not enough memory", "alloc_failed")


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
    needed = activation_bytes(sizes.config, length, torch.bfloat16) / 1e9
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


def activation_bytes(config: MllmConfig, length: int, dtype: torch.dtype) -> int:
    """Working memory for `length` tokens computed in `dtype`, weights not counted.

    The widest moment is a feed-forward layer: gate, up and their product, beside the residual
    and its norm.
    """
    per_token = 3 * config.intermediate_size + 6 * config.hidden_size
    return length * per_token * dtype.itemsize


def lack_of_memory(error: Exception) -> str | None:
    """What an error says, in one line, where a device or the computer ran out of memory; None for
    any other error. CPU, MPS and others raise a plain RuntimeError then.
    """
    said = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return said
    if isinstance(error, (RuntimeError, OSError)):
        return said if any(sign in str(error).lower() for sign in _NO_ROOM) else None
    return None
