"""The body of the MLLM: Qwen2-VL without the last decoder layers, which EasyRef trains.

Source: official code (`multimodal_llm`); weight names as in Hugging Face's files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .config import MllmConfig
from .decoder import DecoderLayer
from .vision import VisionTower


class LanguageModel(nn.Module):
    """Word embedding, the body's decoder layers and the norm after them."""

    def __init__(self, config: MllmConfig, layers: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.embed_tokens = operations.Embedding(config.vocab_size, config.hidden_size, **factory)
        self.layers = nn.ModuleList(
            DecoderLayer(config, operations, **factory) for _ in range(layers)
        )
        self.norm = operations.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **factory)


class MllmBody(nn.Module):
    """Vision tower and truncated language model (27 of Qwen2-VL-2B's 28 layers)."""

    def __init__(self, config: MllmConfig, layers: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.visual = VisionTower(config.vision, operations, **factory)
        self.model = LanguageModel(config, layers, operations, **factory)

    def embed(
        self,
        ids: torch.Tensor,
        spans: Sequence[tuple[int, int]],
        features: Sequence[torch.Tensor],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Word embeddings, with image features at the positions of `<|image_pad|>`.

        Args:
            ids: [L] int64.
            spans: (first, end) positions of each picture.
            features: [n, hidden] of each picture, n as long as its span.

        Returns:
            [1, L, hidden] in `dtype`, on the device of `ids`.
        """
        words = self.model.embed_tokens(ids[None]).to(dtype)
        pieces: list[torch.Tensor] = []
        start = 0
        for (first, end), picture in zip(spans, features, strict=True):
            pieces += [words[:, start:first], picture[None].to(words)]
            start = end
        return torch.cat([*pieces, words[:, start:]], dim=1)
