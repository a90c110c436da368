"""The encoder under ComfyUI's memory management."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import comfy.model_management as mm
import comfy.model_patcher
import torch

from ...easyref_core.adapter.checkpoint import AdapterCheckpoint
from ...easyref_core.encode.cache import EncodingCache, LruCache
from ...easyref_core.encode.encoder import EasyRefEncoder
from ...easyref_core.encode.group import (
    GroupPlan,
    Known,
    Reference,
    nothing_known,
    plan_group,
)
from ...easyref_core.encode.inspection import Inspection, inspect_references
from ...easyref_core.encode.mllm_layers import MllmLayerWeights
from ...easyref_core.encode.passes import encode_references, known_tokens
from ...easyref_core.encode.plan_encoder import EncoderPlan, plan_encoder
from ...easyref_core.errors import EasyRefError
from ...easyref_core.qwen2vl.prompt import PromptTokenizer
from ...easyref_core.tokens.reference_tokens import ReferenceTokens
from ...easyref_core.untrusted import shown
from .attention import mllm_is_fused
from .encoder_weights import INT8, dtypes_of, load_encoder
from .folders import bundled_tokenizer
from .out_of_memory import lack_of_memory
from .patcher import is_dynamic
from .progress import progress_bar

Result = TypeVar("Result")

_CACHE_SETTING = "EASYREF_CACHE_MB"
_ENCODERS = 8  # whose tokens are kept

_tokens: OrderedDict[Hashable, LruCache[torch.Tensor]] = OrderedDict()


def new_cache() -> EncodingCache:
    """For what encoders keep of earlier groups, as much as the user lets them.

    Raises:
        EasyRefError: the setting is no whole number.
    """
    setting = os.environ.get(_CACHE_SETTING, "").strip()
    if not setting:
        return EncodingCache()
    if not (setting.isascii() and setting.isdigit()):
        raise EasyRefError(
            f"The environment variable {_CACHE_SETTING} is {shown(setting)}; a whole number of "
            "megabytes is needed, or 0 to keep nothing of earlier groups."
        )
    return EncodingCache.within(int(setting) * 2**20)


def _tokens_of(plan: EncoderPlan, precision: str) -> LruCache[torch.Tensor]:
    """The tokens that encoders with these weights have made, in whichever EasyRef Loader. They are
    small, so they stay when the encoders go."""
    files = {(file.path, file.stamp) for file, _ in plan.sources.values()}
    device = mm.text_encoder_device()
    how = (dtypes_of(precision, device), precision == INT8, str(device))
    key = (frozenset(files), plan.identity, how)
    if key not in _tokens:
        _tokens[key] = new_cache().tokens
    _tokens.move_to_end(key)
    if len(_tokens) > _ENCODERS:
        _tokens.popitem(last=False)
    return _tokens[key]


class HostedEncoder:
    """Builds the encoder on first use and runs it under ComfyUI's memory management.

    Args:
        checkpoint: the adapter's file.
        mllm_directory: where tokenizer, sizes and missing weights come from; None for the
            adapter's own weights with ComfyUI's Qwen tokenizer.
        precision: one of `encoder_weights.PRECISIONS`.
    """

    def __init__(
        self, checkpoint: AdapterCheckpoint, mllm_directory: Path | None, precision: str
    ) -> None:
        self.checkpoint = checkpoint
        self._directory = mllm_directory
        self._precision = precision
        self._lock = threading.Lock()
        self._cache = new_cache()
        self._tokenizer: PromptTokenizer | None = None
        self._encoder_plan: EncoderPlan | None = None  # of the patcher's encoder
        self._patcher: comfy.model_patcher.ModelPatcher | None = None
        self._made: WeakValueDictionary[bytes, ReferenceTokens] = WeakValueDictionary()
        self._newest: ReferenceTokens | None = None  # alive when only what comes behind it changes

    @property
    def patcher(self) -> comfy.model_patcher.ModelPatcher | None:
        """ComfyUI's handle on the weights; None until the first encoding."""
        return self._patcher

    def plan(self) -> EncoderPlan:
        """Check that adapter and MLLM fit together, without reading weights. See `plan_encoder`."""
        return plan_encoder(self.checkpoint, self._directory)

    def encode(
        self,
        references: Sequence[Reference],
        prompt: str,
        aggregation: str,
        image_size: int,
        negatives: Sequence[Reference] = (),
        mllm_layers: MllmLayerWeights | None = None,
    ) -> ReferenceTokens:
        """Encode a group; shows progress and stops when the user interrupts.

        Args:
            image_size: 0 for the size at which the adapter was trained.
            negatives: pictures to avoid; none for the official black picture.
            mllm_layers: weights of the layers that are pooled; None for those as trained.

        Raises:
            EasyRefError: see `plan_encoder`, `plan_group` and `encode_references`; not enough
                memory, and then everything is unloaded.
        """

        def work(plan: GroupPlan) -> ReferenceTokens:
            # Where they still exist, the same ones: then their keys and values do too.
            tokens = self._made.get(plan.key) or known_tokens(plan, self._cache)
            known = partial(self._cache.known_length, plan)
            tokens = tokens or self._with_weights(encode_references, plan, known)
            self._made[plan.key] = self._newest = tokens
            return tokens

        return self._run(
            work,
            references,
            prompt,
            aggregation=aggregation,
            image_size=image_size,
            negatives=negatives,
            mllm_layers=mllm_layers,
        )

    def inspect(
        self,
        references: Sequence[Reference],
        prompt: str,
        aggregation: str,
        image_size: int,
        mllm_layers: MllmLayerWeights | None = None,
    ) -> Inspection:
        """The reference tokens' attention to a group's pictures; otherwise as `encode`."""
        return self._run(
            lambda plan: self._with_weights(inspect_references, plan),
            references,
            prompt,
            aggregation=aggregation,
            image_size=image_size,
            mllm_layers=mllm_layers,
        )

    @property
    def kept_bytes(self) -> int:
        """What is kept in memory of earlier groups, and goes with this value."""
        return self._cache.nbytes

    def forget(self) -> None:
        """Drop what is kept of earlier groups."""
        self._cache.clear()
        self._made.clear()
        self._newest = None

    def _run(
        self,
        work: Callable[[GroupPlan], Result],
        references: Sequence[Reference],
        prompt: str,
        **settings: Any,
    ) -> Result:
        """Run one job at a time; if memory runs out, once more with all of it free.

        Args:
            settings: those of `plan_group`.

        Raises:
            EasyRefError: memory ran out again.
        """
        with self._lock:
            for _ in range(2):
                try:
                    return work(self._plan_group(references, prompt, **settings))
                except Exception as error:
                    reason = lack_of_memory(error)
                    if reason is None:
                        raise
                # Outside the except block, where the traceback no longer holds the tensors.
                self.forget()
                mm.unload_all_models()
                mm.soft_empty_cache()
            self._patcher = None
            count = len(references) + len(settings.get("negatives", ()))
            raise EasyRefError(
                f"Not enough memory to encode {count} references with the MLLM "
                f"({reason}). Everything was unloaded; the graph can be queued "
                "again. Use fewer references, a smaller image_size, or bf16 or int8 as the "
                "precision in EasyRef Loader."
            )

    def _with_weights(
        self, passes: Callable[..., Result], plan: GroupPlan, known: Known = nothing_known
    ) -> Result:
        """`encode_references` or `inspect_references`, with the encoder on its device.

        Args:
            known: see `GroupPlan.working_bytes`.
        """
        encoder = self._load(plan, known)
        device = self._patcher.load_device
        run = {"device": device, "progress": progress_bar(), "fused": _is_fused(encoder, device)}
        return passes(encoder, plan, **run, cache=self._cache)

    def _plan_group(
        self, references: Sequence[Reference], prompt: str, **settings: Any
    ) -> GroupPlan:
        """Plan a group; weights are only read for one that can be encoded."""
        if self._tokenizer is None:
            self._tokenizer = PromptTokenizer.from_directory(self._directory or bundled_tokenizer())
        if self._patcher is None:
            self._encoder_plan = self.plan()
            tokens = _tokens_of(self._encoder_plan, self._precision)
            if tokens is not self._cache.tokens:  # the first plan, or other weights than before
                self.forget()
                self._cache.tokens = tokens
        return plan_group(self._encoder_plan, self._tokenizer, references, prompt, **settings)

    def _load(self, plan: GroupPlan, known: Known) -> EasyRefEncoder:
        """The encoder, on its device, with memory to encode this group."""
        if self._patcher is None:
            self._patcher = load_encoder(plan.encoder, self._precision)
        elif is_dynamic(self._patcher) and self._precision != INT8:
            # Its weights are still in their files.
            plan.encoder.check_unchanged()
        encoder: EasyRefEncoder = self._patcher.model
        needed = _working_bytes(encoder, plan, self._patcher.load_device, known)
        mm.load_models_gpu([self._patcher], memory_required=needed)
        return encoder


def _working_bytes(
    encoder: EasyRefEncoder, plan: GroupPlan, device: torch.device, known: Known
) -> int:
    """Memory for encoding a group in addition to the weights: activations of what is not known yet,
    and the largest weight that is converted when used."""
    compute = encoder.compute_dtype
    converted = (
        weight.numel() * compute.itemsize
        for module in encoder.modules()
        for weight in module.parameters(recurse=False)
        # ComfyUI does not convert embeddings of half precision.
        if weight.dtype != compute
        and not (isinstance(module, torch.nn.Embedding) and weight.itemsize == 2)
    )
    working = plan.working_bytes(compute, _is_fused(encoder, device), known)
    return max(converted, default=0) + working


def _is_fused(encoder: EasyRefEncoder, device: torch.device) -> bool:
    """Whether attention needs no memory for its scores."""
    config = encoder.config
    vision_head = config.vision.embed_dim // config.vision.num_heads
    return mllm_is_fused(device, encoder.compute_dtype, (vision_head, config.head_dim))
