"""Layerwise Attention Pooling: one state of a token's hidden states of many layers.

Sources: arXiv 2510.12789 (blocks of full attention along the layer axis, then a linear layer over
layers, the shape that Krea 2 has) and arXiv 2605.26111 (attention, a score for each layer, softmax,
weighted sum; and a pool of its own for text and for image tokens).

Every hidden state has passed the body's norm, so the last is what the final layers read without
pooling. A new pool gives exactly that one, so any adapter can be its starting point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..adapter.layer_pooling import POOLS, PoolingSizes, PoolSizes, new_sizes, resolved_layers
from ..attention_kernels import attend_of
from ..errors import EasyRefError
from ..qwen2vl.config import MllmConfig
from ..qwen2vl.decoder import Mlp

if TYPE_CHECKING:
    from .encoder import EasyRefEncoder

CHUNK_BYTES = 8 * 2**20
"""Hidden states that are pooled at once."""
_STD = 0.02  # of new matrices, as Qwen2-VL's own
_ADDED = ("o_proj.weight", "down_proj.weight", "score.weight", "gate.weight")  # zero when new

Factors = tuple[torch.Tensor, torch.Tensor]
"""Of each hidden state, [M] for text tokens and [M] for image tokens."""


@dataclass(frozen=True, eq=False)
class Pooling:
    """How the hidden states of one chat are pooled.

    Attributes:
        aggregation: `dla` or `lap`.
        image_spans: (first, end) positions of each picture's image tokens.
        factors: multiply the learned weight of each hidden state; None for those as trained.
        device: where to compute.
    """

    aggregation: str
    image_spans: Sequence[tuple[int, int]]
    factors: Factors | None = None
    device: torch.device | None = None


def join_poolings(poolings: Sequence[Pooling], lengths: Sequence[int]) -> Pooling:
    """The pooling of several chats one after the other, of these lengths, with the aggregation and
    factors of the first."""
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    spans = [
        (start + first, start + end)
        for start, pooling in zip(starts, poolings, strict=True)
        for first, end in pooling.image_spans
    ]
    return replace(poolings[0], image_spans=spans)


class _Vector(nn.Module):
    """A learned vector, in a module of its own so that a host can move it."""

    def __init__(self, size: int, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, **factory), requires_grad=False)


class _LayerAttention(nn.Module):
    """Full attention among the hidden states of one token."""

    def __init__(self, width: int, sizes: PoolSizes, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.attend = attend_of(operations)
        self.q_proj = operations.Linear(width, sizes.attention, bias=False, **factory)
        self.k_proj = operations.Linear(width, sizes.attention, bias=False, **factory)
        self.v_proj = operations.Linear(width, sizes.attention, bias=False, **factory)
        self.o_proj = operations.Linear(sizes.attention, width, bias=False, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, M, D] -> [T, M, D]"""
        heads = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(self.attend(*heads).transpose(1, 2).flatten(2))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """[T, M, heads * head_dim] -> [T, heads, M, head_dim]"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class _Block(nn.Module):
    """A transformer block along the layer axis."""

    def __init__(
        self, config: MllmConfig, sizes: PoolSizes, operations: Any, **factory: Any
    ) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = operations.RMSNorm(width, eps=eps, **factory)
        self.self_attn = _LayerAttention(width, sizes, operations, **factory)
        self.post_attention_layernorm = operations.RMSNorm(width, eps=eps, **factory)
        narrow = replace(config, intermediate_size=sizes.feed_forward)
        self.mlp = Mlp(narrow, operations, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, M, D] -> [T, M, D]"""
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class LayerPooling(nn.Module):
    """One pool over M hidden states of each token, of width D.

    `blocks`: transformer blocks along the layer axis, then a weighted sum over layers whose weights
    are learned as they are: sum_m w_m x_m.

    `scores`: attended states a = x + attention(norm(x)); a linear score of each, softmax over
    layers: p_m; and last + gate * (sum_m p_m a_m - last), because a softmax of usable gradients
    cannot give one layer alone.

    Sums over layers are elementwise in float32: a matrix product may be rounded to TF32, and then
    a new pool would not give the last state to the bit.
    """

    def __init__(
        self, config: MllmConfig, sizes: PoolSizes, count: int, operations: Any, **factory: Any
    ) -> None:
        super().__init__()
        self.sizes = sizes
        width = config.hidden_size
        if sizes.shape == "blocks":
            self.blocks = nn.ModuleList(
                _Block(config, sizes, operations, **factory) for _ in range(sizes.blocks)
            )
            self.weighted_sum = _Vector(count, **factory)
        else:
            self.input_layernorm = operations.RMSNorm(width, eps=config.rms_norm_eps, **factory)
            self.self_attn = _LayerAttention(width, sizes, operations, **factory)
            self.score = operations.Linear(width, 1, bias=False, **factory)
            self.gate = _Vector(width, **factory)

    @torch.no_grad()
    def initialise(self) -> None:
        """New weights, with which the pool gives the last hidden state.

        What is added to a state is zero, its inner matrices are random (of torch's generator).
        """
        for name, weight in self.named_parameters():
            if name.endswith("norm.weight"):
                weight.fill_(1)
            elif name.endswith(_ADDED):
                weight.zero_()
            elif name == "weighted_sum.weight":
                weight.zero_()[-1] = 1
            else:
                weight.normal_(std=_STD)

    def forward(self, x: torch.Tensor, factors: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [T, M, D] -> [T, D], in their dtype.

        Args:
            factors: [M], multiply the weight of each hidden state.
        """
        exact = torch.promote_types(x.dtype, torch.float32)
        factors = None if factors is None else factors.to(x.device, exact)
        if self.sizes.shape == "blocks":
            for block in self.blocks:
                x = block(x)
            weights = self.weighted_sum.weight.to(x.device, exact)
            return _weighted_sum(x, weights if factors is None else weights * factors).to(x.dtype)
        attended = x + self.self_attn(self.input_layernorm(x))
        weights = self.score(attended)[..., 0].to(exact).softmax(dim=-1)  # [T, M]
        last = x[:, -1].to(exact)
        if factors is not None:
            weights, last = weights * factors, last * factors[-1]
        gate = self.gate.weight.to(x.device, exact)
        return (last + gate * (_weighted_sum(attended, weights) - last)).to(x.dtype)


def _weighted_sum(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """x [T, M, D], weights [M] or [T, M] -> [T, D] in the weights' dtype."""
    total = torch.zeros_like(x[:, 0], dtype=weights.dtype)
    for number, state in enumerate(x.unbind(dim=1)):
        total = total + weights[..., number, None] * state.to(weights.dtype)
    return total


class LayerPools(nn.ModuleDict):
    """An adapter's pools by name: `text` and `image` (dla), `all` (lap), or all three."""

    def __init__(
        self, config: MllmConfig, sizes: PoolingSizes, operations: Any = nn, **factory: Any
    ) -> None:
        count = len(sizes.layers)
        super().__init__(
            {
                name: LayerPooling(config, of_pool, count, operations, **factory)
                for name, of_pool in sizes.pools
            }
        )
        self.sizes = sizes

    def initialise(self) -> None:
        """See `LayerPooling.initialise`."""
        for pool in self.values():
            pool.initialise()

    def pool(
        self,
        states: Sequence[torch.Tensor] | torch.Tensor,
        pooling: Pooling,
        gradient_checkpointing: bool = False,
    ) -> torch.Tensor:
        """Pool the hidden states of one chat.

        Args:
            states: M of [L, D], or [M, L, D], on any device; a chunk of tokens at a time goes to
                `pooling.device`.
            gradient_checkpointing: compute each chunk again in the backward pass.

        Returns:
            [L, D] on `pooling.device`, in the states' dtype.
        """
        device = pooling.device or states[0].device
        length, width = states[0].shape
        images = torch.zeros(length, dtype=torch.bool)
        for first, end in pooling.image_spans:
            images[first:end] = True
        text_factors, image_factors = pooling.factors or (None, None)
        kinds = ((~images, "text", text_factors), (images, "image", image_factors))
        order, pooled = [], []
        for mask, kind, factors in kinds:
            pool = self["all" if pooling.aggregation == "lap" else kind]
            rows = mask.nonzero()[:, 0]
            step = chunk_length(len(states), width, states[0].dtype)
            for chunk in rows.split(step) if len(rows) else ():
                given = torch.stack([state[chunk.to(state.device)] for state in states], dim=1)
                given = given.to(device)  # [chunk, M, D]
                if gradient_checkpointing and torch.is_grad_enabled():
                    pooled.append(checkpoint(pool, given, factors, use_reentrant=False))
                else:
                    pooled.append(pool(given, factors))
            order.append(rows)
        return torch.cat(pooled)[torch.cat(order).argsort().to(device)]


def chunk_length(count: int, width: int, dtype: torch.dtype) -> int:
    """Tokens that are pooled at once."""
    return max(1, CHUNK_BYTES // (count * width * dtype.itemsize))


def pooling_bytes(
    width: int, sizes: PoolingSizes, length: int, dtype: torch.dtype, fused: bool
) -> int:
    """Peak memory of pooling a chat of `length` tokens, weights and hidden states not counted.

    Args:
        fused: attention never writes its scores to memory.
    """
    count = len(sizes.layers)
    tokens = min(length, chunk_length(count, width, dtype))
    rows = tokens * count
    inner = live = 0
    for _, pool in sizes.pools:
        # The given states, a block's input and its sum with attention, beside a norm in float32.
        norm = 12 if dtype.itemsize < 4 else 8
        norm += (3 if pool.shape == "blocks" else 1) * dtype.itemsize
        live = max(live, rows * width * max(norm, 5 * dtype.itemsize))
        attention = 4 * rows * pool.attention * dtype.itemsize
        if not fused:
            attention += rows * pool.attention * 8 + 2 * tokens * pool.heads * count**2 * 4
        inner = max(inner, attention, 3 * rows * pool.feed_forward * dtype.itemsize)
    # Pooled chunks, and those together.
    return live + inner + 2 * length * width * dtype.itemsize


def add_layer_pools(
    encoder: EasyRefEncoder,
    aggregation: str,
    shape: str = "blocks",
    layers: Sequence[int] | None = None,
) -> None:
    """Give an encoder the pools of an aggregation that it does not have yet, in its own dtype.

    With new pools the aggregation gives what the plain encoder gives, to the bit. Inner matrices
    are random, of torch's generator. Pools that it has are kept.

    Args:
        aggregation: `dla` or `lap`.
        shape: `blocks` or `scores`.
        layers: numbers of the hidden states that are read, rising, up to the body's last; None for
            those of the pools that it has, or for all.

    Raises:
        EasyRefError: other hidden states than those of the pools it has, or some that the MLLM has
            not.
    """
    old, width = encoder.mllm_layer_pooling, encoder.config.hidden_size
    had = old.sizes.layers if old is not None else None
    body_layers = len(encoder.multimodal_llm.model.layers)
    wanted = resolved_layers(
        had if layers is None else layers, body_layers, "The new layer pooling"
    )
    if had is not None and wanted != had:
        raise EasyRefError(
            f"The adapter's layer pooling reads the hidden states {', '.join(map(str, had))}, "
            f"not {', '.join(map(str, wanted))}. All pools of an adapter read the same."
        )
    kept = dict(old.sizes.pools) if old is not None else {}
    new = {name: new_sizes(shape, width) for name in POOLS[aggregation] if name not in kept}
    sizes = PoolingSizes(tuple((kept | new).items()), wanted)
    pools = LayerPools(encoder.config, sizes)
    pools.initialise()
    pools = pools.to(encoder.mllm_final_layer.norm.weight)
    for name in kept:
        pools[name] = old[name]
    encoder.mllm_layer_pooling = pools
