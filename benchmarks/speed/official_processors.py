"""What the official EasyRef's attention processors add to a sampling step.

They are loaded from a checkout (TempleX98/EasyRef) and called on diffusers' attention layers of the
same widths and sizes as the UNet's, with random weights, beside diffusers' own processor, which
computes the text's attention alone. Only cross-attention is counted; theirs also adds a LoRA to
self-attention at each step.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .counting import operations

_FILE = Path("ip_adapter") / "attention_processor_faceid.py"
_TEXT, _TOKENS, _CONTEXT, _RANK, _HEAD = 77, 64, 2048, 128, 64


def load_processor(folder: Path) -> type:
    """Its processor of cross-attention with a LoRA.

    Raises:
        SystemExit: the folder is no checkout of it.
    """
    path = folder / _FILE
    if not path.is_file():
        raise SystemExit(f"{folder} has no {_FILE}: --easyref needs a checkout of it.")
    spec = importlib.util.spec_from_file_location("official_processors", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LoRAIPAttnProcessor2_0


@dataclass(frozen=True)
class _Layer:
    """diffusers' layer, both processors, and the inputs of a call with CFG."""

    attention: Any
    plain: Any
    official: Any
    hidden: torch.Tensor
    text: torch.Tensor

    def run(self, official: bool) -> None:
        if official:
            self.official(self.attention, self.hidden, self.text)
        else:
            self.plain(self.attention, self.hidden, self.text[:, :_TEXT])


class OfficialProcessors:
    """All cross-attention layers of a UNet, each called as often as sampling has steps.

    Args:
        layers: those of `cross_attention_layers`.
        side: of the latent; a layer of n times the first level's width has 1 / n of it.
        width: of the first level.
    """

    def __init__(
        self, processor: type, layers: Mapping[str, Any], side: int, width: int, steps: int
    ) -> None:
        torch.manual_seed(7)
        self._steps = steps
        self._layers = [
            self._layer(processor, found.widths[0], side * width // found.widths[0])
            for found in layers.values()
        ]

    @staticmethod
    def _layer(processor: type, width: int, side: int) -> _Layer:
        from diffusers.models.attention_processor import Attention, AttnProcessor2_0

        heads = width // _HEAD
        attention = Attention(width, _CONTEXT, heads, dim_head=_HEAD)
        official = processor(width, _CONTEXT, _RANK, num_tokens=_TOKENS)
        hidden = torch.randn(2, side**2, width)
        text = torch.randn(2, _TEXT + _TOKENS, _CONTEXT)
        return _Layer(attention, AttnProcessor2_0(), official, hidden, text)

    def seconds(self) -> float:
        """Of the official processor beyond those of diffusers' own."""
        return self._run(True) - self._run(False)

    def operations(self) -> int:
        """As `seconds`."""
        return operations(lambda: self._run(True)) - operations(lambda: self._run(False))

    def _run(self, official: bool) -> float:
        start = time.process_time()
        for layer in self._layers:
            for _ in range(self._steps):
                layer.run(official)
        return time.process_time() - start
