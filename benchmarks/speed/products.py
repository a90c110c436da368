"""How near the first encoding is to what its matrix products and attention take at the least."""

from __future__ import annotations

import statistics

import torch
from torch.profiler import ProfilerActivity, profile

from easyref_core.encode.encoder import EasyRefEncoder
from easyref_core.encode.passes import encode_references

from .counting import operations
from .models import pictures, plan
from .timing import Amount, amount, seconds

_COUNT, _PROMPT = 8, "a watercolour of this person"
_KERNELS = ("aten::addmm", "aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu")


def products(encoder: EasyRefEncoder, repeats: int) -> list[Amount]:
    """On a CPU, of the first encoding of eight references: the share of time in matrix products and
    attention, and their speed beside that of the products of its largest layers alone."""
    planned = plan(encoder, pictures(_COUNT, 700), _PROMPT)
    counted = operations(lambda: encode_references(encoder, planned)) / 1e9
    shares, speeds = [], []
    for _ in range(repeats):
        with profile(activities=[ProfilerActivity.CPU]) as found:
            encode_references(encoder, planned)
        times = {event.key: event.self_cpu_time_total / 1e6 for event in found.key_averages()}
        own = sum(times[kernel] for kernel in _KERNELS)
        shares.append(own / sum(times.values()))
        speeds.append(counted / own)
    alone = [_alone(encoder) for _ in range(repeats)]
    name = "8 references: matrix products and attention"
    return [
        amount(f"{name}, of the time", shares, ""),
        amount(name, speeds, "GFLOP/s"),
        amount("the largest matrix products alone", alone, "GFLOP/s"),
    ]


@torch.inference_mode()
def _alone(encoder: EasyRefEncoder) -> float:
    """GFLOP/s of one layer's and one block's feed-forward products, for eight pictures."""
    block = encoder.multimodal_llm.visual.blocks[0].mlp
    layer = encoder.multimodal_llm.model.layers[0].mlp
    patches, tokens = 576 * _COUNT, 146 * _COUNT
    given = [(block.fc1, patches), (block.fc2, patches), (layer.gate_proj, tokens)]
    given.append((layer.down_proj, tokens))
    spent, done = [], 0
    for linear, rows in given:
        x = torch.randn(rows, linear.in_features)
        linear(x)
        spent.append(statistics.median(_time(linear, x) for _ in range(3)))
        done += 2 * rows * linear.in_features * linear.out_features
    return done / sum(spent) / 1e9


def _time(linear: torch.nn.Linear, x: torch.Tensor) -> float:
    return seconds(lambda: linear(x), x.device)
