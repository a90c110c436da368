"""The parts of the encoder behind the MLLM's body: the final layers, and the projector."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..qwen2vl.config import MllmConfig
from ..qwen2vl.decoder import DecoderLayer


class FinalLayers(nn.Module):
    """The learned reference tokens and the decoder layers they pass through."""

    def __init__(
        self, config: MllmConfig, layers: int, num_tokens: int, operations: Any, **factory: Any
    ) -> None:
        super().__init__()
        self.reference_tokens = nn.Parameter(
            torch.empty(num_tokens, config.hidden_size, **factory), requires_grad=False
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, operations, **factory) for _ in range(layers)
        )
        self.norm = operations.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **factory)


class Projector(nn.Module):
    """From the MLLM's width to that of the cross-attention's context."""

    def __init__(self, width: int, token_width: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            operations.Linear(width, width, **factory),
            nn.GELU(),
            operations.Linear(width, token_width, **factory),
            operations.LayerNorm(token_width, **factory),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)
