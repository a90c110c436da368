"""Whether a group can be encoded: by the weights that the adapter has, and by its length."""

from __future__ import annotations

import torch

from ..adapter.layer_pooling import POOLS
from ..errors import EasyRefError
from ..qwen2vl.memory import decoder_bytes
from ..qwen2vl.prompt import PromptTokenizer, TokenizedPrompt
from ..untrusted import escaped, shown
from .mllm_layers import MllmLayerWeights
from .plan_encoder import EncoderPlan


def check_pooling(
    encoder: EncoderPlan, aggregation: str, mllm_layers: MllmLayerWeights | None
) -> None:
    """Raise EasyRefError where layers cannot be pooled, or are to be weighed and none is pooled."""
    if aggregation not in POOLS:
        if mllm_layers is not None:
            raise EasyRefError(
                f"mllm_layers weighs the layers that are pooled by the aggregations "
                f"{' and '.join(POOLS)}; {aggregation!r} reads the last layer alone. Choose one of "
                "these, or disconnect mllm_layers."
            )
        return
    if mllm_layers is not None and not isinstance(mllm_layers, MllmLayerWeights):
        raise EasyRefError(f"mllm_layers is {shown(mllm_layers)}; MllmLayerWeights are needed.")
    has = encoder.pooling.aggregations if encoder.pooling is not None else ()
    if aggregation not in has:
        found = f"it pools layers for {' and '.join(has)}" if has else "it pools no layers"
        raise EasyRefError(
            f"{escaped(encoder.checkpoint.name)} has no weights for aggregation {aggregation!r}: "
            f"{found}. Choose {' or '.join((*has, 'easyref'))}, or an adapter that was trained "
            f"with {aggregation!r}."
        )


def check_length(
    encoder: EncoderPlan,
    tokenizer: PromptTokenizer,
    chat: TokenizedPrompt,
    prompt: str,
    image_size: int,
) -> None:
    """Raise EasyRefError where a chat and the reference tokens exceed the MLLM's context."""
    config, num_tokens = encoder.config, encoder.checkpoint.num_tokens
    limit, length = config.max_positions, len(chat) + num_tokens
    if int(chat.ids.max()) >= config.vocab_size:
        raise EasyRefError(
            f"The tokenizer of {tokenizer.source} has token {int(chat.ids.max())}, but the MLLM "
            f"knows only {config.vocab_size}. Choose the MLLM directory the adapter was trained "
            "from; its tokenizer belongs to it."
        )
    if length <= limit:
        return
    count = len(chat.image_spans)
    image_tokens = sum(end - first for first, end in chat.image_spans)
    text = len(chat) - image_tokens
    if image_tokens <= limit // 2:
        raise EasyRefError(
            f"The prompt is too long: {len(prompt):,} characters are {text:,} tokens, and with "
            f"{count} pictures the MLLM would read {length:,} where {limit:,} is its limit. "
            f"Shorten the prompt by {length - limit:,} tokens."
        )
    needed = decoder_bytes(config, length, torch.bfloat16, fused=True) / 1e9
    fits = int((limit - text - num_tokens) / (image_tokens / count))
    fewer = f"at most about {fits} references of these shapes, or " if fits > 0 else ""
    raise EasyRefError(
        f"{count} references are {image_tokens:,} tokens at image_size {image_size}; with the "
        f"prompt the MLLM would read {length:,} where {limit:,} is its limit (and, in bf16, about "
        f"{needed:.1f} GB of working memory). Use {fewer}a smaller image_size."
    )
