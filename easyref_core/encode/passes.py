"""From a planned group to reference tokens: the MLLM's passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from ..attention_kernels import has_fused
from ..errors import EasyRefError
from ..pictures.preprocessing import Patches
from ..qwen2vl.memory import vision_calls
from ..tokens.reference_tokens import ReferenceTokens
from ..weight_file.tensors import all_finite, dtype_name
from .cache import EncodingCache
from .chat_state import ChatState
from .encoder import EasyRefEncoder
from .group import BASELINES, GroupPlan, MllmPass, PlannedImage
from .layer_pooling import Pooling

Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


@dataclass
class EncoderRun:
    """One run of the encoder over a planned group.

    Attributes:
        fused: see `encode_references`.
        total, done: progress steps.
    """

    encoder: EasyRefEncoder
    plan: GroupPlan
    device: torch.device
    cache: EncodingCache
    fused: bool | None
    progress: Progress
    total: int
    done: int = 0

    def __post_init__(self) -> None:
        if self.fused is None:
            vision = self.encoder.config.vision
            head, dtype = vision.embed_dim // vision.num_heads, self.encoder.compute_dtype
            self.fused = has_fused(self.device, dtype, head, causal=False)

    def step(self, count: int = 1) -> None:
        if count:
            self.done += count
            self.progress(self.done, self.total)

    def tokens(self, mllm_pass: MllmPass) -> torch.Tensor:
        """Reference tokens [1, N, W] of one pass, float32 on the CPU.

        Raises:
            EasyRefError: values that are not numbers.
        """
        key = self.plan.tokens_key(mllm_pass)
        tokens = self.cache.tokens.get(key)
        if tokens is not None:
            self.step(len(mllm_pass.images) + self.encoder.config.num_layers)
            return tokens
        chat = self.cache.begin(self.encoder, self.plan, mllm_pass)
        states = self.encoder.reference_states(**self._inputs(mllm_pass, chat))
        tokens = self.encoder.project(states).float().cpu()
        _check_finite(tokens, self.encoder)
        self.cache.tokens.put(key, tokens)
        if chat is not None:
            self.cache.keep(self.plan, mllm_pass, chat)
        return tokens

    def attention(self, mllm_pass: MllmPass) -> torch.Tensor:
        """How the reference tokens of one pass share their attention: [N, L + N] on the CPU.

        Raises:
            EasyRefError: values that are not numbers.
        """
        chat = self.cache.begin(self.encoder, self.plan, mllm_pass)
        attention = self.encoder.reference_attention(**self._inputs(mllm_pass, chat)).cpu()
        if not torch.isfinite(attention).all():
            raise EasyRefError(
                "The MLLM's attention holds values that are not numbers. Choose bf16 or fp32 as "
                "the loader's precision."
            )
        if chat is not None:
            self.cache.keep(self.plan, mllm_pass, chat)
        return attention

    def _inputs(self, mllm_pass: MllmPass, chat: ChatState | None) -> dict[str, Any]:
        """Of `EasyRefEncoder.reference_states`."""
        plan, pooling = self.plan, None
        weights = plan.mllm_layers.attention if plan.mllm_layers is not None else (1.0, 1.0)
        if plan.pooled:
            factors = None
            if plan.mllm_layers is not None:
                count = len(self.encoder.mllm_layer_pooling.sizes.layers)
                factors = tuple(torch.tensor(f) for f in plan.mllm_layers.factors(count))
            pooling = Pooling(plan.aggregation, mllm_pass.chat.image_spans, factors)
        return {
            "embeds": self._embeds(mllm_pass, 0 if chat is None else chat.length),
            "insert_before": plan.insert_before,
            "column_bias": _attention_bias(mllm_pass, self.device, *weights),
            "on_step": self.step,
            "pooling": pooling,
            "chat": chat,
        }

    def _embeds(self, mllm_pass: MllmPass, start: int) -> torch.Tensor:
        """[1, L, hidden] of the tokens from `start`; pictures before it are not looked at."""
        chat = mllm_pass.chat
        spans = zip(mllm_pass.images, chat.image_spans, strict=True)
        images = [image for image, (first, _) in spans if first >= start]
        self.step(len(mllm_pass.images) - len(images))
        features = self._image_features(images, len(chat))
        return self.encoder.embed(chat, features, self.device, start)

    def _image_features(self, images: Sequence[PlannedImage], length: int) -> list[torch.Tensor]:
        """[tokens, hidden] of each image of a chat of so many tokens, on the device."""
        kept = self.cache.image_features
        found = {i.key: f for i in images if (f := kept.get(i.key)) is not None}
        new = {image.key: image for image in images if image.key not in found}
        self.step(len(images) - len(new))
        left, calls, encoded = [*new.values()], [], {}
        sizes = [image.num_tokens for image in left], length, self.encoder.compute_dtype
        for count in vision_calls(self.encoder.config, *sizes, self.fused):
            calls.append(left[:count])
            del left[:count]
        try:
            # Pictures are prepared while others are encoded.
            with ThreadPoolExecutor(1) as pool:
                prepared = [pool.submit(_patches, call) for call in calls[:1]]
                for number, call in enumerate(calls):
                    patches = prepared.pop().result()
                    prepared += [pool.submit(_patches, call) for call in calls[number + 1 :][:1]]
                    features = self.encoder.encode_images(patches, self.device)
                    encoded |= {i.key: f for i, f in zip(call, features, strict=True)}
                    for _ in call:
                        self.step()
        finally:  # also of an interrupted run
            for key, features in encoded.items():
                kept.put(key, features.to("cpu", copy=True))
        found = {key: features.to(self.device) for key, features in found.items()} | encoded
        return [found[image.key] for image in images]


def _patches(images: Sequence[PlannedImage]) -> list[Patches]:
    return [image.patches() for image in images]


@torch.no_grad()
def encode_references(
    encoder: EasyRefEncoder,
    plan: GroupPlan,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
    cache: EncodingCache | None = None,
    fused: bool | None = None,
) -> ReferenceTokens:
    """Encode a planned group into reference tokens.

    Args:
        encoder: as planned, on `device`.
        progress: called with (steps done, steps in all) after each picture and each layer; may
            raise to stop.
        cache: of this encoder.
        fused: attention never writes its scores to memory, so several pictures can be read at once;
            None where the encoder's attention is PyTorch's own.

    Returns:
        Tokens [1, N, W], or [1, N * pictures, W] for `concatenate` (whose unconditional tokens
        are repeated as often, which leaves attention to them unchanged).

    Raises:
        EasyRefError: the adapter's file has changed; the MLLM gave values that are not numbers.
    """
    # Of the file as it was planned: a changed one is refused now, not after encoding.
    identity = plan.encoder.identity
    cache = cache or EncodingCache(prefixes=0)
    run = EncoderRun(encoder, plan, torch.device(device), cache, fused, progress, plan.steps)
    cond = [run.tokens(mllm_pass) for mllm_pass in plan.passes]
    return _reference_tokens(plan, identity, cond, run.tokens(plan.unconditional))


def known_tokens(plan: GroupPlan, cache: EncodingCache) -> ReferenceTokens | None:
    """What `encode_references` would give, if all of it is in the cache, as after a change of what
    comes behind encoding; else None.

    Raises:
        EasyRefError: the adapter's file has changed.
    """
    identity = plan.encoder.identity
    *cond, uncond = (
        cache.tokens.get(plan.tokens_key(mllm_pass))
        for mllm_pass in (*plan.passes, plan.unconditional)
    )
    if uncond is None or any(tokens is None for tokens in cond):
        return None
    return _reference_tokens(plan, identity, cond, uncond)


def _reference_tokens(
    plan: GroupPlan, identity: str, passes: list[torch.Tensor], uncond: torch.Tensor
) -> ReferenceTokens:
    cond = _aggregated(passes, plan)
    return ReferenceTokens(
        cond=cond,
        uncond=uncond.repeat(1, cond.shape[1] // uncond.shape[1], 1),
        adapter=identity,
        adapter_name=plan.encoder.checkpoint.name,
        prompt=plan.prompt,
        num_references=len(plan.references),
        aggregation=plan.aggregation,
    )


def _aggregated(tokens: list[torch.Tensor], plan: GroupPlan) -> torch.Tensor:
    """Tokens [1, N, W] of each pass to the group's. A baseline weighs whole pictures."""
    if plan.aggregation not in BASELINES:
        return tokens[0].clone()  # the cache's own stay as they are
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
