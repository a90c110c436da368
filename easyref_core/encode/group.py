"""How a group of references becomes reference tokens.

`easyref` lets the MLLM read all pictures and the prompt together (arXiv 2412.09618, section 3.2);
`average` and `concatenate` are the paper's baselines, which encode each picture alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from ..errors import EasyRefError
from ..pictures.loading import named
from ..pictures.preprocessing import FACTOR, MIN_IMAGE_SIZE, black_picture, plan_sizes, preprocess
from ..qwen2vl.limits import MllmSizes, check_length
from ..qwen2vl.prompt import PromptTokenizer, TokenizedPrompt
from ..tokens.reference_tokens import ReferenceTokens
from ..weight_file import all_finite
from .encoder import EasyRefEncoder
from .passes import EncodingCache, Progress, Reader, Steps

AGGREGATIONS = ("easyref", "average", "concatenate")
MAX_INSERTION = 3


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


@dataclass(frozen=True, eq=False)
class GroupPlan:
    """What the MLLM is to read of a group.

    Attributes:
        image_size: at which pictures are read, in pixels.
        groups: numbers of the pictures that are read together.
        chats: one for each of `groups`.
        negatives: pictures of the unconditional branch.
        unconditional: their chat.
    """

    image_size: int
    groups: tuple[range, ...]
    chats: tuple[TokenizedPrompt, ...]
    negatives: tuple[Reference, ...]
    unconditional: TokenizedPrompt

    @property
    def longest(self) -> int:
        """Tokens of the longest chat."""
        return max(map(len, (*self.chats, self.unconditional)))

    @property
    def picture_tokens(self) -> list[int]:
        """Tokens of every picture, negatives included."""
        chats = (*self.chats, self.unconditional)
        return [end - first for chat in chats for first, end in chat.image_spans]


def chosen_size(image_size: int | None, sizes: MllmSizes) -> int:
    """The size at which references are read.

    Args:
        image_size: in pixels; 0 or None for the adapter's own.

    Raises:
        EasyRefError: below 56 pixels, where no picture would be left, or so large that one picture
            exceeds the MLLM's context.
    """
    size = image_size or sizes.image_size
    own = f"0 for the size at which the adapter was trained ({sizes.image_size})"
    if size < MIN_IMAGE_SIZE:
        raise EasyRefError(
            f"image_size is {size}; it must be at least {MIN_IMAGE_SIZE} pixels, or {own}."
        )
    most = FACTOR * math.isqrt(sizes.config.max_positions)
    if size > most:
        raise EasyRefError(
            f"image_size is {size}; one picture would be more than the "
            f"{sizes.config.max_positions:,} tokens that the MLLM reads. Choose at most {most} "
            f"pixels, or {own}."
        )
    return size


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


def plan_group(
    sizes: MllmSizes,
    tokenizer: PromptTokenizer,
    references: Sequence[Reference],
    prompt: str,
    *,
    aggregation: str = "easyref",
    image_size: int | None = None,
    insert_before: int | None = None,
    negatives: Sequence[Reference] = (),
) -> GroupPlan:
    """Plan what `encode_references` does with the same arguments, and refuse what it refuses; no
    weights are needed.

    Raises:
        EasyRefError: unknown aggregation or layer; see `chosen_size` and `count_tokens`; nothing is
            left of a baseline whose weights are all 0; the group is longer than the MLLM's
            context, or the negatives are.
    """
    if aggregation not in AGGREGATIONS:
        raise EasyRefError(
            f"There is no aggregation {aggregation!r}. Choose one of {', '.join(AGGREGATIONS)}."
        )
    layers = min(MAX_INSERTION, sizes.config.num_layers)
    if insert_before is not None and not 1 <= insert_before <= layers:
        raise EasyRefError(
            f"Reference tokens cannot enter before the last {insert_before} layers; 1 to "
            f"{layers} can be chosen."
        )
    image_size = chosen_size(image_size, sizes)
    counts = count_tokens(references, image_size)
    joint = aggregation == "easyref"
    if not joint and not any(reference.weight for reference in references):
        raise EasyRefError(
            f"All references have weight 0, so aggregation {aggregation!r} has nothing left. "
            "Give one of them a weight above 0."
        )
    everything = range(len(counts))
    groups = (everything,) if joint else tuple(range(i, i + 1) for i in everything)
    chats = tuple(tokenizer.tokenize([counts[i] for i in group], prompt) for group in groups)
    for chat in chats:
        check_length(sizes, tokenizer, chat, prompt, image_size)
    negatives = tuple(negatives) or (Reference(black_picture(), name="the black picture"),)
    with named("negative references"):
        unconditional = tokenizer.tokenize(count_tokens(negatives, image_size), "")
        check_length(sizes, tokenizer, unconditional, "", image_size)
    return GroupPlan(image_size, groups, chats, negatives, unconditional)


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
    image_size: int | None = None,
    insert_before: int | None = None,
    negatives: Sequence[Reference] = (),
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
        image_size: the official `cond_image_size`, in pixels; 0 or None for the size at which the
            adapter was trained.
        insert_before: the tokens enter before the last 1, 2 or 3 layers.
        negatives: pictures to avoid, read together and without the prompt in the unconditional
            branch; a black picture by default, as in the official code.
        progress: called with (steps done, steps in all) after each picture and each layer; may
            raise to stop.

    Returns:
        Tokens [1, N, W], or [1, N * pictures, W] for `concatenate` (whose unconditional tokens
        are repeated as often, which leaves attention to them unchanged).

    Raises:
        EasyRefError: see `plan_group`; the MLLM gave values that are not numbers.
    """
    plan = plan_group(
        encoder,
        tokenizer,
        references,
        prompt,
        aggregation=aggregation,
        image_size=image_size,
        insert_before=insert_before,
        negatives=negatives,
    )
    weights = [r.weight for r in references]
    joint = aggregation == "easyref"
    passes = (len(plan.chats) + 1) * encoder.num_layers
    steps = Steps(len(references) + len(plan.negatives) + passes, progress)
    run = Reader(encoder, torch.device(device), insert_before, cache or EncodingCache(), steps)
    seen = [run.see(preprocess(r.picture, plan.image_size)) for r in references]
    parts = [
        run.tokens(chat, [seen[i] for i in group], [weights[i] for i in group] if joint else [1.0])
        for chat, group in zip(plan.chats, plan.groups, strict=True)
    ]
    uncond = run.unconditional(
        plan.unconditional,
        [preprocess(n.picture, plan.image_size) for n in plan.negatives],
        [n.weight for n in plan.negatives],
    )
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
    if aggregation == "concatenate":
        return torch.cat([p for p, w in zip(parts, weights, strict=True) if w > 0], dim=1)
    if len(set(weights)) == 1:
        return torch.stack(parts).mean(dim=0)
    share = torch.tensor(weights) / sum(weights)
    return (torch.stack(parts) * share[:, None, None, None]).sum(dim=0)


def _checked(tokens: torch.Tensor, encoder: EasyRefEncoder) -> torch.Tensor:
    """The tokens, unless they are not numbers: then the weight at fault is named."""
    if torch.isfinite(tokens).all():
        return tokens
    for name, weight in encoder.state_dict().items():
        if not all_finite(weight):
            raise EasyRefError(
                f"The encoder's weight {name} holds values that are not numbers (NaN or "
                "infinite). The file is damaged; download it again."
            )
    raise EasyRefError(
        f"The MLLM overflowed in {str(encoder.compute_dtype).removeprefix('torch.')}. Choose bf16 "
        "or fp32 as the loader's precision."
    )
