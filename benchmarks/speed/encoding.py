"""What a change of a group costs, as a share of encoding it for the first time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from easyref_core.encode.cache import EncodingCache
from easyref_core.encode.encoder import EasyRefEncoder
from easyref_core.encode.group import Reference
from easyref_core.encode.mllm_layers import MllmLayerWeights
from easyref_core.encode.passes import encode_references

from .counting import operations
from .models import NUM_TOKENS, pictures, plan
from .timing import Row, row, seconds

PROMPT = "a watercolour of this person reading in a garden at dusk"
OTHER = "a photograph of this person on a bridge in the rain, from afar"
COUNTS = (1, 2, 4, 8, 16, 32, 64, 112)
DEVIATION = 0.15
_MANY = 8  # references from which on one measurement is steady
_BARS = {
    "prompt edit": 0.05,
    "ninth reference appended": 0.15,
    "weight of one reference changed": 0.05,
    "the same again": 0.005,
}

# Another weight of a layer pools all tokens again, but runs no layer of the body.
_POOLED_BARS = {"prompt edit": 0.05, "other weights of the MLLM's layers": 0.1}


def changes(encoder: EasyRefEncoder, device: torch.device, repeats: int) -> list[Row]:
    """Rows of the table, for 8 references."""
    cold: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in _BARS}
    for number in range(repeats):
        group = pictures(9, 10 * number)
        heavy = [replace(group[0], weight=2.0), *group[1:8]]
        cache = EncodingCache()
        cold.append(_time(encoder, device, cache, group[:8], PROMPT))
        given: dict[str, tuple[list[Reference], str]] = {
            "prompt edit": (group[:8], OTHER),
            "ninth reference appended": (group, OTHER),
            "weight of one reference changed": (heavy, OTHER),
            "the same again": (heavy, OTHER),
        }
        for name, (changed, prompt) in given.items():
            times[name].append(_time(encoder, device, cache, changed, prompt))
    counted, read = _multiplications(encoder), _bytes(encoder)
    return [
        row(name, times[name], cold, bar, counted[name], read[name]) for name, bar in _BARS.items()
    ]


def pooled_changes(encoder: EasyRefEncoder, device: torch.device, repeats: int) -> list[Row]:
    """Rows for aggregation `dla`, which also keeps the hidden states of all layers. Their
    multiplications are counted while they run."""
    edit, weights = _POOLED_BARS
    given: dict[str, tuple[str, MllmLayerWeights | None]] = {
        "cold": (PROMPT, None),
        edit: (OTHER, None),
        weights: (OTHER, MllmLayerWeights("early")),
    }

    def measured(number: int, measure: Callable[[Callable[[], object]], float]) -> list[float]:
        group, cache = pictures(8, 300 + 10 * number), EncodingCache()
        found = []
        for prompt, layers in given.values():
            planned = plan(encoder, group, prompt, aggregation="dla", mllm_layers=layers)
            encode = partial(encode_references, encoder, planned, device=device, cache=cache)
            found.append(measure(encode))
        return found

    runs = [measured(number, partial(seconds, device=device)) for number in range(repeats)]
    cold, *times = (list(column) for column in zip(*runs, strict=True))
    whole, *counted = measured(repeats, operations)
    return [
        row(f"dla: {name}", of_change, cold, bar, part / whole)
        for (name, bar), of_change, part in zip(_POOLED_BARS.items(), times, counted, strict=True)
    ]


def by_count(
    encoder: EasyRefEncoder, device: torch.device, counts: Sequence[int], repeats: int
) -> dict[int, tuple[int, float]]:
    """Number of references -> (tokens that the MLLM reads, seconds of encoding them for the first
    time, the median of several for few)."""
    found = {}
    for count in counts:
        times = [
            _time(encoder, device, None, pictures(count, 100 + count), PROMPT)
            for _ in range(1 if count >= _MANY else repeats)
        ]
        planned = plan(encoder, pictures(count), PROMPT)
        passes = (*planned.passes, planned.unconditional)
        found[count] = sum(len(one.chat) for one in passes), statistics.median(times)
    return found


def straight_line(found: Mapping[int, tuple[int, float]]) -> tuple[float, float, float]:
    """Seconds against tokens by a straight line: (seconds of no token, of one, largest deviation as
    a share of the line). Its relative deviations are smallest in the sense of least squares."""
    tokens, seconds = torch.tensor([*found.values()], dtype=torch.float64).T
    sides = torch.stack([1 / seconds, tokens / seconds], dim=1)
    start, slope = torch.linalg.lstsq(sides, torch.ones_like(seconds)[:, None]).solution[:, 0]
    line = start + slope * tokens
    return float(start), float(slope), float(((seconds - line) / line).abs().max())


def _time(
    encoder: EasyRefEncoder,
    device: torch.device,
    cache: EncodingCache | None,
    group: list[Reference],
    prompt: str,
    **settings: Any,
) -> float:
    planned = plan(encoder, group, prompt, **settings)
    encode: Callable[[], object] = lambda: encode_references(  # noqa: E731
        encoder, planned, device=device, cache=cache
    )
    return seconds(encode, device)


def _multiplications(encoder: EasyRefEncoder) -> dict[str, float]:
    """Those that no cache can save, as a share of the first encoding's."""
    config, vision = encoder.config, encoder.config.vision
    layer = sum(p.numel() for p in encoder.mllm_final_layer.layers[0].parameters())
    block = sum(p.numel() for p in encoder.multimodal_llm.visual.blocks[0].parameters())
    merger = sum(p.numel() for p in encoder.multimodal_llm.visual.merger.parameters())

    def tokens(rows: int, keys: int, layers: int) -> float:
        """Of so many rows in so many layers, which attend to so many keys on average."""
        return layers * rows * (layer + 2 * keys * config.hidden_size)

    def picture(count: int) -> float:
        patches, merged = 576, 144
        of_block = block + 2 * patches * vision.embed_dim
        return count * (patches * vision.depth * of_block + merged * merger)

    chat, black = (len(plan(encoder, pictures(n), PROMPT).passes[0].chat) for n in (8, 1))
    tail = chat - plan(encoder, pictures(8), PROMPT).passes[0].segments[-2].end
    body = config.num_layers - 1
    last = tokens(NUM_TOKENS, chat, 1)
    cold = picture(9) + last + tokens(NUM_TOKENS, black, 1)
    cold += tokens(chat, chat // 2, body) + tokens(black, black // 2, body)
    ninth = picture(1) + tokens(146 + tail, chat, body) + last
    return {
        "prompt edit": (tokens(tail, chat, body) + last) / cold,
        "ninth reference appended": ninth / cold,
        "weight of one reference changed": last / cold,
        "the same again": 0.0,
    }


def _bytes(encoder: EasyRefEncoder) -> dict[str, float]:
    """Of weights, read once a pass, and of kept keys and values, as shares of the first encoding's,
    which has a pass for the black picture too."""
    config = encoder.config

    def size(module: torch.nn.Module) -> int:
        return sum(weight.nbytes for weight in module.parameters())

    vision, body = encoder.multimodal_llm.visual, encoder.multimodal_llm.model.layers
    last = size(encoder.mllm_final_layer) + size(encoder.image_proj_model)
    chat = len(plan(encoder, pictures(8), PROMPT).passes[0].chat)
    kept = chat * 2 * config.num_kv_heads * config.head_dim * encoder.compute_dtype.itemsize
    cold = size(vision) + 2 * (size(body) + last)
    edit = size(body) + last + config.num_layers * kept
    return {
        "prompt edit": edit / cold,
        "ninth reference appended": (size(vision) + edit) / cold,
        "weight of one reference changed": (last + kept) / cold,
        "the same again": 0.0,
    }
