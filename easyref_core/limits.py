"""How long a group may be, and how much memory reading it takes."""

from __future__ import annotations

from .encoder import EasyRefEncoder
from .errors import EasyRefError
from .prompt import PromptTokenizer, TokenizedPrompt


def check_length(
    encoder: EasyRefEncoder,
    tokenizer: PromptTokenizer,
    plan: TokenizedPrompt,
    prompt: str,
    image_size: int,
) -> None:
    """Raise EasyRefError where a chat and the reference tokens exceed the MLLM's context."""
    limit = encoder.config.max_positions
    length = len(plan) + encoder.num_tokens
    if int(plan.ids.max()) >= encoder.config.vocab_size:
        raise EasyRefError(
            f"The tokenizer of {tokenizer.source} has token {int(plan.ids.max())}, but the MLLM "
            f"knows only {encoder.config.vocab_size}. Choose the MLLM directory the adapter was "
            "trained from; its tokenizer belongs to it."
        )
    if length <= limit:
        return
    pictures = sum(end - first for first, end in plan.image_spans)
    needed = activation_bytes(encoder, length) / 1e9
    text = len(plan) - pictures
    if pictures <= limit // 2:
        raise EasyRefError(
            f"The prompt is too long: {len(prompt):,} characters are {text:,} tokens, and with "
            f"{len(plan.image_spans)} pictures the MLLM would read {length:,} where {limit:,} is "
            f"its limit. Shorten the prompt by {length - limit:,} tokens."
        )
    each = pictures / len(plan.image_spans)
    fits = int((limit - text - encoder.num_tokens) / each)
    fewer = f"at most about {fits} references of these shapes, or " if fits > 0 else ""
    raise EasyRefError(
        f"{len(plan.image_spans)} references are {pictures:,} tokens at image_size {image_size}; "
        f"with the prompt the MLLM would read {length:,} where {limit:,} is its limit (and about "
        f"{needed:.1f} GB of working memory). Use {fewer}a smaller image_size."
    )


def activation_bytes(encoder: EasyRefEncoder, length: int) -> int:
    """Working memory for a chat of `length` tokens, weights not counted.

    The widest moment is a feed-forward layer: gate, up and their product, beside the residual
    and its norm.
    """
    config = encoder.config
    per_token = 3 * config.intermediate_size + 6 * config.hidden_size
    return length * per_token * encoder.compute_dtype.itemsize
