"""What a compiled model call does in its attention layers: an operator that adds the references.

A trace contains the operator and the layer's name. Tokens, weights and masks are those of the model
call that runs, so one trace serves all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Optional

import torch

from ..host.unet_layers import BlockKey
from .layer import ReferenceAttention, attend_to_text

Layers = Mapping[str, Sequence[ReferenceAttention]]
"""`layer_name` of a slot -> what acts there, in order."""

_running: ContextVar[Layers] = ContextVar("easyref_layers")


@contextmanager
def running(layers: Layers) -> Iterator[None]:
    """Inside, the operator adds these references, in this thread."""
    token = _running.set(layers)
    try:
        yield
    finally:
        _running.reset(token)


def layer_name(block: BlockKey) -> str:
    side, number, index = block
    return f"{side}.{number}.{index}"


def call_with_references(
    unet: Callable[..., torch.Tensor],
    layers: tuple[str, ...],
    blocks: tuple[BlockKey, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    transformer_options: dict[str, Any],
) -> torch.Tensor:
    """Call the UNet with the operator on attention slots; to be compiled.

    Args:
        layers, blocks: names and keys of the slots.
        args, kwargs: others of the UNet.
    """
    slots = {block: _Slot(layer) for layer, block in zip(layers, blocks, strict=True)}
    options = {**transformer_options, "patches_replace": {"attn2": slots}}
    return unet(*args, transformer_options=options, **kwargs)


class _Slot:
    """What stands on one attention slot; as `ReferenceAttention`, without its state."""

    def __init__(self, layer: str) -> None:
        self._layer = layer

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: Mapping[str, Any]
    ) -> torch.Tensor:
        text = attend_to_text(q, k, v, extra_options)
        height, width = extra_options["activations_shape"][-2:]
        heads, precision = extra_options["n_heads"], extra_options.get("attn_precision")
        return _add_references(text, q, self._layer, heads, height, width, precision)


# The annotations are read by PyTorch, which knows no `|`.
@torch.library.custom_op("easyref::add_references", mutates_args=())
def _add_references(
    text: torch.Tensor,
    query: torch.Tensor,
    layer: str,
    heads: int,
    height: int,
    width: int,
    precision: Optional[torch.dtype],  # noqa: UP045
) -> torch.Tensor:
    """What `ReferenceAttention` adds to the text's attention [B, T, heads * head_dim]."""
    options = {
        "n_heads": heads,
        "activations_shape": (height, width),
        "attn_precision": precision,
    }
    out = text
    for attention in _running.get()[layer]:
        out = attention.add(out, query, options)
    # An operator's result is never one of its inputs.
    return text.clone(memory_format=torch.contiguous_format) if out is text else out.contiguous()


@_add_references.register_fake
def _like_text(text: torch.Tensor, *args: Any) -> torch.Tensor:
    return text.new_empty(text.shape)
