"""Layer pooling in an adapter's file: its weights' names and shapes, and what a file has of them.

A pool makes one state of a token's hidden states of many layers (`encode/layer_pooling.py` has the
maths). Dual Layer Aggregation (arXiv 2605.26111) has two, one for text tokens and one for image
tokens; a single Layerwise Attention Pooling (LAP; arXiv 2510.12789) has one for all tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import EasyRefError
from ..qwen2vl.config import MAX_LAYERS
from ..untrusted import escaped, shown
from ..weight_file import WeightFile
from .parts import MAX_WIDTH

POOLING = "mllm_layer_pooling."
LAYERS_KEY = "mllm_layers"
"""In the metadata: numbers of the hidden states that are read, such as "0,4,8,12". 0 is the
embedding output, n what the n-th decoder layer gives. Without it, all of them."""

POOLS = {"dla": ("text", "image"), "lap": ("all",)}
"""Aggregation -> the pools that it needs."""
SHAPES = ("blocks", "scores")
HEAD = 64
"""Width of an attention head of the pools."""
_MAX_BLOCKS = 16
_AGAIN = "The file is damaged or was converted wrongly; get it again."
_BLOCK = re.compile(r"blocks\.(\d{1,3})\.")


@dataclass(frozen=True)
class PoolSizes:
    """Sizes of one pool.

    Attributes:
        shape: `blocks` or `scores`.
        attention: width of the queries, keys and values: heads of 64, or one narrower head.
        feed_forward: inner width of a block's feed-forward layer (`blocks` only).
        blocks: their number (`blocks` only).
    """

    shape: str
    attention: int
    feed_forward: int = 0
    blocks: int = 0

    @property
    def heads(self) -> int:
        return max(1, self.attention // HEAD)

    def weight_shapes(self, width: int, count: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each weight.

        Args:
            width: of the hidden states.
            count: of the hidden states that are read.
        """
        inner, wide = self.attention, self.feed_forward
        attention = {
            "input_layernorm.weight": (width,),
            **{f"self_attn.{part}_proj.weight": (inner, width) for part in "qkv"},
            "self_attn.o_proj.weight": (width, inner),
        }
        if self.shape == "scores":
            return attention | {"score.weight": (1, width), "gate.weight": (width,)}
        block = attention | {
            "post_attention_layernorm.weight": (width,),
            "mlp.gate_proj.weight": (wide, width),
            "mlp.up_proj.weight": (wide, width),
            "mlp.down_proj.weight": (width, wide),
        }
        shapes = {f"blocks.{n}.{name}": s for n in range(self.blocks) for name, s in block.items()}
        return shapes | {"weighted_sum.weight": (count,)}


def new_sizes(shape: str, width: int) -> PoolSizes:
    """Sizes of a new pool for an MLLM of this width.

    A pool works on every hidden state of a token, 28 rows a token at Qwen2-VL-2B's size. Blocks as
    wide as its decoder layers would cost more than the whole MLLM. A sixth of the width, 4 heads
    of 64, costs an eighth of it: 2 x 2.75 million weights on 28 rows against 27 x 46.8 million.
    """
    inner = min(width, HEAD * max(1, width // (6 * HEAD)))
    return PoolSizes(shape, inner, inner, 2) if shape == "blocks" else PoolSizes(shape, inner)


@dataclass(frozen=True)
class PoolingSizes:
    """Sizes of an adapter's pools.

    Attributes:
        pools: of each pool, by name (`text`, `image`, `all`).
        layers: numbers of the hidden states that are read, rising, up to the body's last.
    """

    pools: tuple[tuple[str, PoolSizes], ...]
    layers: tuple[int, ...]

    @property
    def aggregations(self) -> tuple[str, ...]:
        """Those of `POOLS` that these pools serve."""
        has = dict(self.pools)
        return tuple(name for name, needed in POOLS.items() if has.keys() >= set(needed))

    @property
    def metadata(self) -> dict[str, str]:
        """What belongs into the metadata of a file with these pools."""
        return {LAYERS_KEY: ",".join(map(str, self.layers))}

    def weight_shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Name behind `POOLING` -> shape of each weight."""
        return {
            f"{pool}.{name}": shape
            for pool, sizes in self.pools
            for name, shape in sizes.weight_shapes(width, len(self.layers)).items()
        }


def pooling_of(
    file: WeightFile, names: Mapping[str, str], width: int
) -> tuple[tuple[tuple[str, PoolSizes], ...], tuple[int, ...] | None]:
    """Recognise the pools in an adapter's file, by names and shapes alone.

    Args:
        names: name behind `POOLING` -> name in the file.
        width: of the MLLM.

    Returns:
        Sizes of each pool, and the hidden states that are read where the file says.

    Raises:
        EasyRefError: weights that are missing, unknown or of another shape; one pool of the two of
            `dla`; hidden states that are no list of rising numbers.
    """
    if not names:
        return (), None
    path = escaped(str(file.path))
    file.check_weights(names.values())
    shapes = {name: file.tensors[source].shape for name, source in names.items()}
    of_pool: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        pool, _, rest = name.partition(".")
        of_pool.setdefault(pool, {})[rest] = shape
    known = [pool for needed in POOLS.values() for pool in needed]
    for pool in of_pool:
        if pool not in known:
            raise EasyRefError(
                f"{path} has a layer pool {shown(pool)}; those of EasyRef are {', '.join(known)}. "
                "It is of a newer version, or of something else; the file is not used."
            )
    if ("text" in of_pool) != ("image" in of_pool):
        lacking = "image" if "text" in of_pool else "text"
        raise EasyRefError(
            f"{path} lacks {POOLING}{lacking}.*, half of its layer pooling. {_AGAIN}"
        )
    layers = _layers(file, path)
    pools = tuple((pool, _sizes(of_pool[pool], pool, path)) for pool in known if pool in of_pool)
    for pool, sizes in pools:
        found = of_pool[pool]
        count = len(layers) if layers else _count(found)
        _compare(found, sizes.weight_shapes(width, count), f"{POOLING}{pool}.", path)
    counts = {_count(of_pool[pool]) for pool, sizes in pools if sizes.shape == "blocks"}
    if len(counts) > 1:
        raise EasyRefError(
            f"{path} has layer pools over {' and '.join(map(str, sorted(counts)))} hidden states; "
            f"one number is needed. {_AGAIN}"
        )
    return pools, layers


def resolved_layers(
    layers: Sequence[int] | None,
    body_layers: int,
    name: str,
    remedy: str = "Choose the MLLM that the adapter was trained with.",
) -> tuple[int, ...]:
    """The hidden states that are read, all where none are named.

    Args:
        body_layers: decoder layers of the body, so that its last hidden state has this number.
        name: of the adapter or setting, for messages.
        remedy: a sentence, for messages.

    Raises:
        EasyRefError: they are not rising, or do not end with the body's last.
    """
    if layers is None:
        return tuple(range(body_layers + 1))
    layers = tuple(layers)
    if not layers or not _rising(layers) or layers[-1] != body_layers:
        raise EasyRefError(
            f"{name} reads the hidden states {', '.join(map(str, layers[:40])) or 'none'} of the "
            f"MLLM. They must rise and end with {body_layers}, the last one before the final "
            f"layers. {remedy}"
        )
    return layers


def _layers(file: WeightFile, path: str) -> tuple[int, ...] | None:
    text = file.metadata.get(LAYERS_KEY)
    if text is None:
        return None
    # Longer than any list of layers can be: not even split.
    parts = text.split(",") if len(text) < 8 * MAX_LAYERS else ["-1"]
    parts = [part.strip() for part in parts]
    numbers = [int(p) if p.isascii() and p.isdecimal() and len(p) < 5 else -1 for p in parts]
    if not _rising(numbers) or numbers[-1] > MAX_LAYERS:
        raise EasyRefError(
            f"{path} says that its layer pooling reads the hidden states {shown(text)}; rising "
            f"whole numbers up to {MAX_LAYERS} with commas between them are needed. {_AGAIN}"
        )
    return tuple(numbers)


def _rising(numbers: Sequence[int]) -> bool:
    """Whether whole numbers from 0 on rise."""
    return all(a < b for a, b in zip((-1, *numbers), numbers, strict=False))


def _count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Hidden states that a pool of `blocks` reads, as its weights tell; 0 for none."""
    shape = shapes.get("weighted_sum.weight", ())
    return shape[0] if len(shape) == 1 else 0


def _sizes(shapes: Mapping[str, tuple[int, ...]], pool: str, path: str) -> PoolSizes:
    numbers = {int(match[1]) for match in map(_BLOCK.match, shapes) if match}
    first = "blocks.0." if numbers else ""

    def inner(name: str) -> int:
        """Rows of a matrix; 1 where there is none, which the comparison then names."""
        return (shapes.get(first + name) or (1,))[0]

    attention = inner("self_attn.q_proj.weight")
    if numbers:
        sizes = PoolSizes("blocks", attention, inner("mlp.gate_proj.weight"), len(numbers))
    else:
        sizes = PoolSizes("scores", attention)
    if len(numbers) > _MAX_BLOCKS or max(sizes.attention, sizes.feed_forward) > MAX_WIDTH:
        raise EasyRefError(
            f"{path}: {POOLING}{pool} has {len(numbers)} blocks of widths {sizes.attention} and "
            f"{sizes.feed_forward}; up to {_MAX_BLOCKS} of up to {MAX_WIDTH:,} can be. {_AGAIN}"
        )
    if attention < 1 or (attention > HEAD and attention % HEAD):
        raise EasyRefError(
            f"{path}: the attention of {POOLING}{pool} is {attention} wide, which is not a number "
            f"of heads of {HEAD}. {_AGAIN}"
        )
    return sizes


def _compare(
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    prefix: str,
    path: str,
) -> None:
    missing = sorted(wanted.keys() - found.keys())
    unknown = sorted(found.keys() - wanted.keys())
    if missing or unknown:
        kind, names = ("lacks", missing) if missing else ("holds, unknown to EasyRef,", unknown)
        raise EasyRefError(
            f"{path} {kind} {len(names)} weights of its layer pooling, first "
            f"{shown(prefix + names[0])}. {_AGAIN}"
        )
    for name, shape in found.items():
        if shape != wanted[name]:
            raise EasyRefError(
                f"{path}: {escaped(prefix + name)} has shape {list(shape[:8])}, but "
                f"{list(wanted[name])} is needed. {_AGAIN}"
            )
