"""The MLLM's passes over one group: pictures are looked at once and remembered, then read together
with the prompt.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..pictures.preprocessing import Patches
from ..qwen2vl.prompt import TokenizedPrompt
from .encoder import EasyRefEncoder

Progress = Callable[[int, int], None]


class EncodingCache:
    """What does not change with the prompt: pictures' vision tokens and the unconditional tokens.

    Belongs to one encoder. Keyed by the pixels themselves; holds CPU tensors, about 0.4 MB a
    picture at real size in half precision.

    Args:
        budget: bytes that vision tokens may take. By default as many as hold every group that
            fills the MLLM's context at real size (32,768 tokens of width 1536 in float32): of a
            group that does not fit, each picture would be forgotten just before it is used again.
    """

    def __init__(self, budget: int = 256 * 2**20) -> None:
        self.seen = _Recent(budget)
        self.unconditional = _Recent(8 * 2**20)


class _Recent:
    """The most recently used tensors, of so many bytes in all."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._items: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def get(self, key: bytes) -> torch.Tensor | None:
        if key in self._items:
            self._items.move_to_end(key)
        return self._items.get(key)

    def put(self, key: bytes, value: torch.Tensor) -> None:
        self._items[key] = value
        while sum(item.nbytes for item in self._items.values()) > self._budget:
            self._items.popitem(last=False)


@dataclass
class Steps:
    """Counts the work and tells whoever asked."""

    total: int
    report: Progress
    done: int = 0

    def __call__(self, count: int = 1) -> None:
        self.done += count
        self.report(self.done, self.total)


@dataclass(frozen=True)
class Reader:
    """One call's encoder passes."""

    encoder: EasyRefEncoder
    device: torch.device
    insert_before: int | None
    cache: EncodingCache
    steps: Steps

    def see(self, patches: Patches) -> torch.Tensor:
        """One picture's vision tokens [n, hidden] on the device."""
        key = _pixel_key(patches)
        seen = self.cache.seen.get(key)
        if seen is None:
            seen = self.encoder.see(patches, self.device)
            self.cache.seen.put(key, seen.cpu())
        self.steps()
        return seen.to(self.device)

    def tokens(
        self, plan: TokenizedPrompt, pictures: Sequence[torch.Tensor], weights: Sequence[float]
    ) -> torch.Tensor:
        """Reference tokens [1, N, W] of one reading, float32 on the CPU."""
        states = self.encoder.reference_states(
            self.encoder.embed(plan, pictures, self.device),
            insert_before=self.insert_before,
            column_bias=_bias(plan, weights, self.device),
            on_step=self.steps,
        )
        return self.encoder.project(states).float().cpu()

    def attention(
        self, plan: TokenizedPrompt, pictures: Sequence[torch.Tensor], weights: Sequence[float]
    ) -> torch.Tensor:
        """How the reference tokens share their attention [N, L + N] in one reading, on the CPU."""
        return self.encoder.reference_attention(
            self.encoder.embed(plan, pictures, self.device),
            insert_before=self.insert_before,
            column_bias=_bias(plan, weights, self.device),
            on_step=self.steps,
        ).cpu()

    def unconditional(
        self, plan: TokenizedPrompt, pictures: Sequence[Patches], weights: Sequence[float]
    ) -> torch.Tensor:
        """Tokens of pictures without a prompt; the same for every group."""
        key = f"unconditional {self.insert_before} {[*map(float, weights)]}".encode()
        key += b"".join(map(_pixel_key, pictures))
        tokens = self.cache.unconditional.get(key)
        if tokens is not None:
            self.steps(len(pictures) + self.encoder.num_layers)
            return tokens
        tokens = self.tokens(plan, [self.see(picture) for picture in pictures], weights)
        self.cache.unconditional.put(key, tokens)
        return tokens


def _pixel_key(patches: Patches) -> bytes:
    shape = f"{patches.rows}x{patches.columns}".encode()
    return hashlib.sha256(shape + patches.pixels.numpy().tobytes()).digest()


def _bias(
    plan: TokenizedPrompt, weights: Sequence[float], device: torch.device
) -> torch.Tensor | None:
    """[L] logarithms of the weights on each picture's columns; None when all are 1."""
    if all(w == 1.0 for w in weights):
        return None
    bias = torch.zeros(len(plan), device=device)
    for (first, end), weight in zip(plan.image_spans, weights, strict=True):
        bias[first:end] = math.log(weight) if weight > 0 else float("-inf")
    return bias
