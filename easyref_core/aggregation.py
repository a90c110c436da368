"""How a group of references becomes reference tokens.

`easyref` lets the MLLM read all pictures and the prompt together (arXiv 2412.09618, section 3.2);
`average` and `concatenate` are the paper's baselines, which encode each picture alone.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from .encoder import EasyRefEncoder
from .errors import EasyRefError
from .limits import check_length
from .pictures import named
from .preprocessing import (
    DEFAULT_IMAGE_SIZE,
    FACTOR,
    Patches,
    black_picture,
    plan_sizes,
    preprocess,
)
from .prompt import PromptTokenizer, TokenizedPrompt
from .tokens import ReferenceTokens

AGGREGATIONS = ("easyref", "average", "concatenate")
MAX_INSERTION = 3

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Reference:
    """One picture of a group.

    Attributes:
        picture: RGB, any size.
        weight: multiplies the attention (before normalisation) that the reference tokens pay to
            this picture in the final layer; 1 changes nothing, 0 removes the picture there.
        name: for messages.
    """

    picture: Image.Image
    weight: float = 1.0
    name: str = "the picture"


class EncodingCache:
    """What does not change with the prompt: pictures' vision tokens and the unconditional tokens.

    Belongs to one encoder. Keyed by the pixels themselves; holds CPU tensors, about 0.4 MB a
    picture at real size in half precision.
    """

    def __init__(self, pictures: int = 64) -> None:
        self.seen = _Recent(pictures)
        self.unconditional = _Recent(8)


class _Recent:
    """The most recently used tensors."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def get(self, key: bytes) -> torch.Tensor | None:
        if key in self._items:
            self._items.move_to_end(key)
        return self._items.get(key)

    def put(self, key: bytes, value: torch.Tensor) -> None:
        self._items[key] = value
        while len(self._items) > self._size:
            self._items.popitem(last=False)


def count_tokens(references: Sequence[Reference], image_size: int) -> list[int]:
    """How many tokens the MLLM reads for each picture of a group, from its size alone.

    Raises:
        EasyRefError: no picture, a weight out of range, or a picture too elongated (named).
    """
    if not references:
        raise EasyRefError(
            "There is no reference picture. Connect at least one to images or references."
        )
    counts = []
    for reference in references:
        if not (math.isfinite(reference.weight) and reference.weight >= 0):
            raise EasyRefError(
                f"{reference.name}: weight {reference.weight} cannot be used; it multiplies the "
                "picture's attention and must be 0 or more."
            )
        with named(reference.name):
            _, (width, height) = plan_sizes(*reference.picture.size, image_size)
        counts.append(width * height // FACTOR**2)
    return counts


@torch.no_grad()
def encode_references(
    encoder: EasyRefEncoder,
    tokenizer: PromptTokenizer,
    references: Sequence[Reference],
    prompt: str,
    *,
    adapter: str,
    adapter_name: str = "",
    aggregation: str = "easyref",
    image_size: int = DEFAULT_IMAGE_SIZE,
    insert_before: int | None = None,
    device: torch.device | str = "cpu",
    cache: EncodingCache | None = None,
    progress: Progress = lambda done, total: None,
) -> ReferenceTokens:
    """Condense references and a prompt into reference tokens.

    Args:
        references: the group, in order.
        prompt: plain text; text that spells a special token stays text.
        adapter, adapter_name: who made the tokens.
        aggregation: `easyref`, `average` or `concatenate`.
        image_size: the official `cond_image_size`, in pixels.
        insert_before: the tokens enter before the last 1, 2 or 3 layers.
        progress: called with (steps done, steps in all) after each picture and each layer; may
            raise to stop.

    Returns:
        Tokens [1, N, W], or [1, N * pictures, W] for `concatenate` (whose unconditional tokens
        are repeated as often, which leaves attention to them unchanged).

    Raises:
        EasyRefError: see `count_tokens`; unknown aggregation or layer; the group is longer than the
            MLLM's context; the MLLM gave values that are not numbers.
    """
    device = torch.device(device)
    if aggregation not in AGGREGATIONS:
        raise EasyRefError(
            f"There is no aggregation {aggregation!r}. Choose one of {', '.join(AGGREGATIONS)}."
        )
    layers = min(MAX_INSERTION, encoder.num_layers)
    if insert_before is not None and not 1 <= insert_before <= layers:
        raise EasyRefError(
            f"Reference tokens cannot enter before the last {insert_before} layers; 1 to "
            f"{layers} can be chosen."
        )
    counts = count_tokens(references, image_size)
    weights = [r.weight for r in references]
    joint = aggregation == "easyref"
    groups = [list(range(len(counts)))] if joint else [[i] for i in range(len(counts))]
    plans = [tokenizer.tokenize([counts[i] for i in g], prompt) for g in groups]
    black = preprocess(black_picture(), image_size)
    empty = tokenizer.tokenize([black.num_tokens], "")
    for plan in [*plans, empty]:
        check_length(encoder, tokenizer, plan, prompt, image_size)

    passes = (len(groups) + 1) * encoder.num_layers
    steps = _Steps(len(counts) + 1 + passes, progress)
    run = _Run(encoder, device, insert_before, cache or EncodingCache(), steps)
    seen = [run.see(preprocess(r.picture, image_size)) for r in references]
    parts = [
        run.tokens(plan, [seen[i] for i in group], [weights[i] for i in group] if joint else [1.0])
        for plan, group in zip(plans, groups, strict=True)
    ]
    uncond = run.unconditional(empty, black)
    cond = _combine(parts, weights, aggregation)
    return ReferenceTokens(
        cond=_checked(cond, encoder),
        uncond=_checked(uncond, encoder).repeat(1, cond.shape[1] // uncond.shape[1], 1),
        adapter=adapter,
        adapter_name=adapter_name,
        prompt=prompt,
        num_references=len(references),
        aggregation=aggregation,
    )


def _combine(parts: list[torch.Tensor], weights: list[float], aggregation: str) -> torch.Tensor:
    """Tokens [1, N, W] of each part to the group's. A baseline weighs whole pictures."""
    if aggregation == "easyref":
        return parts[0]
    if sum(weights) == 0:
        raise EasyRefError(
            f"All references have weight 0, so aggregation {aggregation!r} has nothing left. "
            "Give one of them a weight above 0."
        )
    if aggregation == "concatenate":
        return torch.cat([p for p, w in zip(parts, weights, strict=True) if w > 0], dim=1)
    if len(set(weights)) == 1:
        return torch.stack(parts).mean(dim=0)
    share = torch.tensor(weights) / sum(weights)
    return (torch.stack(parts) * share[:, None, None, None]).sum(dim=0)


@dataclass
class _Steps:
    """Counts the work and tells whoever asked."""

    total: int
    report: Progress
    done: int = 0

    def __call__(self, count: int = 1) -> None:
        self.done += count
        self.report(self.done, self.total)


@dataclass(frozen=True)
class _Run:
    """One call's encoder passes."""

    encoder: EasyRefEncoder
    device: torch.device
    insert_before: int | None
    cache: EncodingCache
    steps: _Steps

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
        self, plan: TokenizedPrompt, pictures: list[torch.Tensor], weights: list[float]
    ) -> torch.Tensor:
        """Reference tokens [1, N, W] of one reading, float32 on the CPU."""
        states = self.encoder.reference_states(
            self.encoder.embed(plan, pictures, self.device),
            insert_before=self.insert_before,
            column_bias=_bias(plan, weights, self.device),
            on_step=self.steps,
        )
        return self.encoder.project(states).float().cpu()

    def unconditional(self, plan: TokenizedPrompt, black: Patches) -> torch.Tensor:
        """Tokens of the black picture without a prompt; the same for every group."""
        key = f"unconditional {self.insert_before}".encode() + _pixel_key(black)
        tokens = self.cache.unconditional.get(key)
        if tokens is not None:
            self.steps(1 + self.encoder.num_layers)
            return tokens
        tokens = self.tokens(plan, [self.see(black)], [1.0])
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


def _checked(tokens: torch.Tensor, encoder: EasyRefEncoder) -> torch.Tensor:
    """The tokens, unless they are not numbers: then the weight at fault is named."""
    if torch.isfinite(tokens).all():
        return tokens
    for name, weight in encoder.state_dict().items():
        if not torch.isfinite(weight).all():
            raise EasyRefError(
                f"The encoder's weight {name} holds values that are not numbers (NaN or "
                "infinite). The file is damaged; download it again."
            )
    raise EasyRefError(
        f"The MLLM overflowed in {str(encoder.compute_dtype).removeprefix('torch.')}. Choose bf16 "
        "or fp32 as the loader's precision."
    )
