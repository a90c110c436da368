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
from .pictures import named
from .preprocessing import DEFAULT_IMAGE_SIZE, Patches, black_picture, preprocess
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


class FeatureCache:
    """The last pictures' vision tokens, so that a changed prompt does not see them again.

    Keyed by the pixels themselves; holds CPU tensors, about 0.4 MB a picture at real size.
    """

    def __init__(self, size: int = 64) -> None:
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


@dataclass
class _Steps:
    """Counts the work and tells whoever asked."""

    total: int
    report: Progress
    done: int = 0

    def __call__(self, count: int = 1) -> None:
        self.done += count
        self.report(self.done, self.total)


def prepare(references: Sequence[Reference], image_size: int) -> list[Patches]:
    """Preprocess a group's pictures.

    Raises:
        EasyRefError: no picture, a weight out of range, or a picture that cannot be read (named).
    """
    if not references:
        raise EasyRefError(
            "There is no reference picture. Connect at least one to images or references."
        )
    patches = []
    for reference in references:
        if not (math.isfinite(reference.weight) and reference.weight >= 0):
            raise EasyRefError(
                f"{reference.name}: weight {reference.weight} cannot be used; it multiplies the "
                "picture's attention and must be 0 or more."
            )
        with named(reference.name):
            patches.append(preprocess(reference.picture, image_size))
    return patches


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
    cache: FeatureCache | None = None,
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
        EasyRefError: see `prepare`; unknown aggregation or layer; the group is longer than the
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
    patches = prepare(references, image_size)
    weights = [r.weight for r in references]
    black = preprocess(black_picture(), image_size)
    joint = aggregation == "easyref"
    groups = [list(range(len(patches)))] if joint else [[i] for i in range(len(patches))]
    plans = [tokenizer.tokenize([patches[i].num_tokens for i in g], prompt) for g in groups]
    empty = tokenizer.tokenize([black.num_tokens], "")
    for plan in [*plans, empty]:
        check_length(encoder, tokenizer, plan, prompt, image_size)

    steps = _Steps(len(patches) + 1 + (len(groups) + 1) * encoder.num_layers, progress)
    seen = [_see(encoder, p, device, cache, steps) for p in patches]
    seen_black = _see(encoder, black, device, cache, steps)

    def tokens(plan: TokenizedPrompt, pictures: list[torch.Tensor], w: list[float]) -> torch.Tensor:
        states = encoder.reference_states(
            encoder.embed(plan, pictures, device),
            insert_before=insert_before,
            column_bias=_bias(plan, w, device),
            on_step=steps,
        )
        return encoder.project(states).float().cpu()

    parts = [
        tokens(plan, [seen[i] for i in group], [weights[i] for i in group] if joint else [1.0])
        for plan, group in zip(plans, groups, strict=True)
    ]
    uncond = tokens(empty, [seen_black], [1.0])
    cond = _combine(parts, weights, aggregation)
    return ReferenceTokens(
        cond=_checked(cond, encoder),
        uncond=uncond.repeat(1, cond.shape[1] // uncond.shape[1], 1),
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


def _see(
    encoder: EasyRefEncoder,
    patches: Patches,
    device: torch.device,
    cache: FeatureCache | None,
    steps: _Steps,
) -> torch.Tensor:
    """One picture's vision tokens [n, hidden] on `device`."""
    if cache is None:
        seen = encoder.see(patches, device)
    else:
        shape = f"{patches.rows}x{patches.columns}".encode()
        key = hashlib.sha256(shape + patches.pixels.numpy().tobytes()).digest()
        found = cache.get(key)
        seen = encoder.see(patches, device) if found is None else found.to(device)
        if found is None:
            cache.put(key, seen.cpu())
    steps()
    return seen


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


def check_length(
    encoder: EasyRefEncoder,
    tokenizer: PromptTokenizer,
    plan: TokenizedPrompt,
    prompt: str,
    image_size: int,
) -> None:
    """Raise EasyRefError where a chat and the reference tokens exceed the MLLM's context."""
    limit = encoder.config.max_positions
    length = len(plan) + encoder.num_tokens
    if int(plan.ids.max()) >= encoder.config.vocab_size:
        raise EasyRefError(
            f"The tokenizer of {tokenizer.source} has token {int(plan.ids.max())}, but the MLLM "
            f"knows only {encoder.config.vocab_size}. Choose the MLLM directory the adapter was "
            "trained from; its tokenizer belongs to it."
        )
    if length <= limit:
        return
    pictures = sum(end - first for first, end in plan.image_spans)
    needed = activation_bytes(encoder, length) / 1e9
    text = len(plan) - pictures
    if pictures <= limit // 2:
        raise EasyRefError(
            f"The prompt is too long: {len(prompt):,} characters are {text:,} tokens, and with "
            f"{len(plan.image_spans)} pictures the MLLM would read {length:,} where {limit:,} is "
            f"its limit. Shorten the prompt by {length - limit:,} tokens."
        )
    each = pictures / len(plan.image_spans)
    fits = int((limit - text - encoder.num_tokens) / each)
    raise EasyRefError(
        f"{len(plan.image_spans)} references are {pictures:,} tokens at image_size {image_size}; "
        f"with the prompt the MLLM would read {length:,} where {limit:,} is its limit (and about "
        f"{needed:.1f} GB of working memory). Use at most about {fits} references of these shapes, "
        "or a smaller image_size."
    )


def activation_bytes(encoder: EasyRefEncoder, length: int) -> int:
    """Working memory for a chat of `length` tokens, weights not counted.

    The widest moment is a feed-forward layer: gate, up and their product, beside the residual
    and its norm.
    """
    config = encoder.config
    per_token = 3 * config.intermediate_size + 6 * config.hidden_size
    return length * per_token * encoder.compute_dtype.itemsize


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
