"""What the MLLM's layers have computed of a chat, so that another with the same beginning continues
from there.

Pictures come first in a chat, and attention is causal: what the layers give for them does not
depend on the prompt after them, nor on pictures added behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch

from ..qwen2vl.config import MllmConfig
from ..qwen2vl.decoder import LayerCache


@dataclass(frozen=True, eq=False)
class ChatPart:
    """What is known of T tokens of a chat that follow each other. All tensors are on the CPU.

    Attributes:
        body: keys and values in the layers of the body, [layers, 2, kv_heads, T, head_dim].
        hidden: where layers are pooled, their states after the body's norm, [M, T, hidden].
        final: as `body`, in the final layers.
    """

    body: torch.Tensor
    hidden: torch.Tensor | None
    final: torch.Tensor | None

    @property
    def length(self) -> int:
        return self.body.shape[3]


class ChatState:
    """The beginning of a chat, as far as it is known, and what a run adds to it.

    Args:
        config: sizes of the MLLM.
        final_layers: how many of its layers are the final ones.
        known: of the beginning, in order, each without `final` only with `hidden`: the final
            layers run again from the first one that lacks it.
        new: tokens of the parts behind them that are to be kept; what follows is not.
        pooled: M, how many layers are pooled.
        dtype: of what is kept.

    Attributes:
        body, final: the caches of the layers.
        length: tokens that the body does not run again.
        final_length: tokens that the final layers do not run again.
        parts: the known ones and the new ones, filled by a run.
        unfinished: hidden states [M, T, hidden] of known parts that the final layers run again.
    """

    def __init__(
        self,
        config: MllmConfig,
        final_layers: int,
        known: Sequence[ChatPart] = (),
        new: Sequence[int] = (),
        pooled: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        def rows(layers: int, length: int) -> torch.Tensor:
            shape = layers, 2, config.num_kv_heads, length, config.head_dim
            return torch.empty(shape, dtype=dtype)

        def hidden(length: int) -> torch.Tensor | None:
            return torch.empty(pooled, length, config.hidden_size, dtype=dtype) if pooled else None

        body_layers = config.num_layers - final_layers
        finished = [*takewhile(lambda part: part.final is not None, known)]
        self._added = [ChatPart(rows(body_layers, n), hidden(n), None) for n in new]
        again = [*known[len(finished) :], *self._added]
        again = [replace(part, final=rows(final_layers, part.length)) for part in again]
        self.parts = [*finished, *again]
        self.length = sum(part.length for part in known)
        self.final_length = sum(part.length for part in finished)
        self.unfinished = [part.hidden for part in known[len(finished) :]]

        def caches(layers: int, past: list[Any], filled: list[Any]) -> list[LayerCache]:
            return [LayerCache([p[n] for p in past], [f[n] for f in filled]) for n in range(layers)]

        past, filled = [part.body for part in known], [part.body for part in self._added]
        self.body = caches(body_layers, past, filled)
        past, filled = [part.final for part in finished], [part.final for part in again]
        self.final = caches(final_layers, past, filled)

    def keep_hidden(self, hidden: torch.Tensor) -> None:
        """Fill the new parts with the hidden states [M, L, hidden] of a run."""
        first = 0
        for part in self._added:
            part.hidden.copy_(hidden[:, first : first + part.length])
            first += part.length
