"""From a planned group to reference tokens: the MLLM's passes, and a cache for what stays."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from ..errors import EasyRefError
from ..tokens.reference_tokens import ReferenceTokens
from ..weight_file import all_finite, dtype_name
from .encoder import EasyRefEncoder
from .group import BASELINES, GroupPlan, MllmPass, PlannedImage
from .layer_pooling import HiddenStates, Pooling

Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


class EncodingCache:
    """Image features and unconditional tokens, which do not change with the prompt, and where
    layers are pooled the hidden states of the last group, which do not change with their weights.

    Belongs to one encoder. Holds CPU tensors: in half precision at real size about 0.4 MB of
    features a picture, and 0.1 MB of hidden states a token.

    Args:
        budget: bytes of image features. The default holds every group that fits the MLLM's context
            at real size (32,768 tokens of width 1536 in float32): of a larger group, each picture
            would be dropped just before it is used again.
        hidden_states: bytes of hidden states. The default holds 60 pictures of 336 pixels at real
            size in half precision; those of a longer group are not kept.
    """

    def __init__(self, budget: int = 256 * 2**20, hidden_states: int = 2**30) -> None:
        self.image_features = _LruCache[torch.Tensor](budget)
        self.unconditional = _LruCache[torch.Tensor](8 * 2**20)
        self.hidden_states = _LruCache[HiddenStates](hidden_states)


class _Sized(Protocol):
    nbytes: int


Item = TypeVar("Item", bound=_Sized)


class _LruCache(Generic[Item]):
    """The most recently used values, up to so many bytes in all."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._items: OrderedDict[bytes, Item] = OrderedDict()

    def keep_only(self, keys: Collection[bytes]) -> None:
        for key in [key for key in self._items if key not in keys]:
            del self._items[key]

    def get(self, key: bytes) -> Item | None:
        if key in self._items:
            self._items.move_to_end(key)
        return self._items.get(key)

    def put(self, key: bytes, value: Item) -> None:
        self._items[key] = value
        while sum(item.nbytes for item in self._items.values()) > self._budget:
            self._items.popitem(last=False)


@dataclass
class EncoderRun:
    """One run of the encoder over a planned group.

    Attributes:
        total, done: progress steps.
    """

    encoder: EasyRefEncoder
    plan: GroupPlan
    device: torch.device
    cache: EncodingCache
    progress: Progress
    total: int
    done: int = 0

    def step(self, count: int = 1) -> None:
        self.done += count
        self.progress(self.done, self.total)

    def image_features(self, image: PlannedImage) -> torch.Tensor:
        """[tokens, hidden] on the device."""
        features = self.cache.image_features.get(image.key)
        if features is None:
            features = self.encoder.encode_image(image.patches(), self.device)
            self.cache.image_features.put(image.key, features.cpu())
        self.step()
        return features.to(self.device)

    def tokens(self, mllm_pass: MllmPass) -> torch.Tensor:
        """Reference tokens [1, N, W] of one pass, float32 on the CPU."""
        states = self.encoder.reference_states(**self._inputs(mllm_pass))
        return self.encoder.project(states).float().cpu()

    def attention(self, mllm_pass: MllmPass) -> torch.Tensor:
        """How the reference tokens of one pass share their attention: [N, L + N] on the CPU."""
        return self.encoder.reference_attention(**self._inputs(mllm_pass)).cpu()

    def unconditional_tokens(self) -> torch.Tensor:
        """Reference tokens [1, N, W] of the negatives; the same for every group and prompt."""
        mllm_pass, key = self.plan.unconditional, self.plan.unconditional_key
        tokens = self.cache.unconditional.get(key)
        if tokens is None:
            tokens = self.tokens(mllm_pass)
            self.cache.unconditional.put(key, tokens)
        else:
            self.step(self.total - self.done)
        return tokens

    def _inputs(self, mllm_pass: MllmPass) -> dict[str, Any]:
        """Of `EasyRefEncoder.reference_states`."""
        plan = self.plan
        weights = plan.mllm_layers.attention if plan.mllm_layers is not None else (1.0, 1.0)
        inputs = {
            "insert_before": plan.insert_before,
            "column_bias": _attention_bias(mllm_pass, self.device, *weights),
            "on_step": self.step,
        }
        if not plan.pooled:
            return inputs | {"embeds": self._embeds(mllm_pass)}
        spans, factors = mllm_pass.chat.image_spans, None
        if plan.mllm_layers is not None:
            count = len(self.encoder.mllm_layer_pooling.sizes.layers)
            factors = tuple(torch.tensor(f) for f in plan.mllm_layers.factors(count))
        pooling = Pooling(plan.aggregation, spans, factors, self.device)
        return inputs | {"embeds": self._hidden_states(mllm_pass), "pooling": pooling}

    def _embeds(self, mllm_pass: MllmPass) -> torch.Tensor:
        features = [self.image_features(image) for image in mllm_pass.images]
        return self.encoder.embed(mllm_pass.chat, features, self.device)

    def _hidden_states(self, mllm_pass: MllmPass) -> HiddenStates:
        """Of the body's layers, which do not run where the cache has them."""
        plan, kept = self.plan, self.cache.hidden_states
        key = plan.hidden_states_key(mllm_pass)
        # Only those of the last group: there is no room for two.
        kept.keep_only([plan.hidden_states_key(p) for p in (*plan.passes, plan.unconditional)])
        hidden = kept.get(key)
        if hidden is not None:
            self.step(len(mllm_pass.images) + len(self.encoder.multimodal_llm.model.layers))
            return hidden
        embeds = self._embeds(mllm_pass)
        hidden = self.encoder.hidden_states(embeds, plan.insert_before, self.step)
        kept.put(key, hidden)
        return hidden


@torch.no_grad()
def encode_references(
    encoder: EasyRefEncoder,
    plan: GroupPlan,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
    cache: EncodingCache | None = None,
) -> ReferenceTokens:
    """Encode a planned group into reference tokens.

    Args:
        encoder: as planned, on `device`.
        progress: called with (steps done, steps in all) after each picture and each layer; may
            raise to stop.
        cache: of this encoder.

    Returns:
        Tokens [1, N, W], or [1, N * pictures, W] for `concatenate` (whose unconditional tokens
        are repeated as often, which leaves attention to them unchanged).

    Raises:
        EasyRefError: the adapter's file has changed; the MLLM gave values that are not numbers.
    """
    checkpoint = plan.encoder.checkpoint
    # Of the file as it was planned: a changed one is refused now, not after encoding.
    identity = plan.encoder.identity
    cache = cache or EncodingCache()
    run = EncoderRun(encoder, plan, torch.device(device), cache, progress, plan.steps)
    cond = _aggregated([run.tokens(mllm_pass) for mllm_pass in plan.passes], plan)
    uncond = run.unconditional_tokens()
    for tokens in (cond, uncond):
        _check_finite(tokens, encoder)
    return ReferenceTokens(
        cond=cond,
        uncond=uncond.repeat(1, cond.shape[1] // uncond.shape[1], 1),
        adapter=identity,
        adapter_name=checkpoint.name,
        prompt=plan.prompt,
        num_references=len(plan.references),
        aggregation=plan.aggregation,
    )


def _aggregated(tokens: list[torch.Tensor], plan: GroupPlan) -> torch.Tensor:
    """Tokens [1, N, W] of each pass to the group's. A baseline weighs whole pictures."""
    if plan.aggregation not in BASELINES:
        return tokens[0]
    weights = [reference.weight for reference in plan.references]
    if plan.aggregation == "concatenate":
        return torch.cat([t for t, w in zip(tokens, weights, strict=True) if w > 0], dim=1)
    if len(set(weights)) == 1:
        return torch.stack(tokens).mean(dim=0)
    scale = torch.tensor(weights) / sum(weights)
    return (torch.stack(tokens) * scale[:, None, None, None]).sum(dim=0)


def _attention_bias(
    mllm_pass: MllmPass, device: torch.device, text: float = 1.0, pictures: float = 1.0
) -> torch.Tensor | None:
    """[L] logarithms of the weights at each position; None when all are 1.

    Args:
        text: weight of every position that is no picture's.
        pictures: multiplies the weight of each picture.
    """
    weights = [weight * pictures for weight in mllm_pass.weights]
    if all(weight == 1.0 for weight in (*weights, text)):
        return None
    bias = torch.full((len(mllm_pass.chat),), _log(text), device=device)
    for (first, end), weight in zip(mllm_pass.chat.image_spans, weights, strict=True):
        bias[first:end] = _log(weight)
    return bias


def _log(weight: float) -> float:
    return math.log(weight) if weight > 0 else float("-inf")


def _check_finite(tokens: torch.Tensor, encoder: EasyRefEncoder) -> None:
    """Raise EasyRefError where tokens are not numbers; a damaged weight is named."""
    if torch.isfinite(tokens).all():
        return
    for name, weight in encoder.state_dict().items():
        if not all_finite(weight):
            raise EasyRefError(
                f"The encoder's weight {name} holds values that are not numbers (NaN or "
                "infinite). The file is damaged; download it again."
            )
    raise EasyRefError(
        f"The MLLM overflowed in {dtype_name(encoder.compute_dtype)}. Choose bf16 or fp32 as the "
        "loader's precision."
    )
