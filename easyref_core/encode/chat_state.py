"""What the MLLM's layers have computed of a chat, so that another with the same beginning continues
from there.

Pictures come first in a chat, and attention is causal: what the layers give for them does not
depend on the prompt after them, nor on pictures added behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

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

    body: torch.Tensor | None
    hidden: torch.Tensor | None
    final: torch.Tensor | None


class ChatState:
    """The beginning of a chat, as far as it is known, and what a run adds to it.

    Args:
        config: sizes of the MLLM.
        final_layers: how many of its layers are the final ones.
        parts: of the beginning, in order, each with `body`, and without `final` only with `hidden`:
            the final layers run again from the first one that lacks it.

    Attributes:
        body, final: the caches of the layers.
        length: tokens that the body does not run again.
        final_length: tokens that the final layers do not run again.
    """

    def __init__(
        self, config: MllmConfig, final_layers: int, parts: Sequence[ChatPart] = ()
    ) -> None:
        bodies = [part.body for part in parts]
        finals = [part.final for part in takewhile(lambda part: part.final is not None, parts)]
        body_layers = config.num_layers - final_layers
        self.body = [LayerCache([b[layer] for b in bodies]) for layer in range(body_layers)]
        self.final = [LayerCache([f[layer] for f in finals]) for layer in range(final_layers)]
        self.length = self.body[0].length
        self.final_length = self.final[0].length
        self._unfinished = [part.hidden for part in parts[len(finals) :]]
        self._hidden: torch.Tensor | None = None

    def unfinished(self, hidden: torch.Tensor) -> torch.Tensor:
        """All hidden states [M, T, hidden] that the final layers have not read yet.

        Args:
            hidden: those of the run, which are kept.
        """
        self._hidden = hidden
        return torch.cat((*self._unfinished, hidden), dim=1) if self._unfinished else hidden

    def part(self, first: int, end: int) -> ChatPart:
        """The tokens from `first` to `end`, after a run; None for what was known before it."""
        body = hidden = None
        if first >= self.length:
            rows = slice(first - self.length, end - self.length)
            body = _stacked(self.body, rows)
            hidden = None if self._hidden is None else self._hidden[:, rows].clone()
        final = None
        if first >= self.final_length:
            rows = slice(first - self.final_length, end - self.final_length)
            final = _stacked(self.final, rows)
        return ChatPart(body, hidden, final)


def _stacked(caches: Sequence[LayerCache], rows: slice) -> torch.Tensor:
    """[layers, 2, kv_heads, T, head_dim], in memory of its own."""
    return torch.stack([cache.rows[:, :, rows] for cache in caches])
