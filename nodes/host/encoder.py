"""The encoder under ComfyUI's memory management."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch

from ...easyref_core.aggregation import (
    EncodingCache,
    Reference,
    count_tokens,
    encode_references,
)
from ...easyref_core.checkpoint import AdapterCheckpoint
from ...easyref_core.encoder import EasyRefEncoder
from ...easyref_core.errors import OutOfMemoryError
from ...easyref_core.limits import activation_bytes
from ...easyref_core.loading import EncoderPlan, plan_encoder
from ...easyref_core.prompt import PromptTokenizer
from ...easyref_core.tokens import ReferenceTokens
from .folders import bundled_tokenizer
from .patcher import new_patcher

PRECISIONS = ("auto", "bf16", "fp16", "fp32")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_PROMPT_TOKENS = 512  # room for the chat and the prompt in the memory estimate


class HostedEncoder:
    """Builds the encoder when first used and runs it where ComfyUI has room for it.

    Args:
        checkpoint: the adapter's file.
        mllm_directory: where tokenizer, sizes and missing weights come from; None for the
            adapter's own weights with ComfyUI's Qwen tokenizer.
        precision: one of `PRECISIONS`.
    """

    def __init__(
        self, checkpoint: AdapterCheckpoint, mllm_directory: Path | None, precision: str
    ) -> None:
        self.checkpoint = checkpoint
        self._directory = mllm_directory
        self._precision = precision
        self._lock = threading.Lock()
        self._cache = EncodingCache()
        self._tokenizer: PromptTokenizer | None = None
        self._patcher: comfy.model_patcher.ModelPatcher | None = None

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
    ) -> ReferenceTokens:
        """Encode a group; shows progress and stops when the user interrupts.

        Raises:
            EasyRefError: see `encode_references` and `plan_encoder`.
            OutOfMemoryError: the device has no room; everything is unloaded then.
        """
        with self._lock:
            failed: str | None = None
            try:
                return self._encode(references, prompt, aggregation, image_size)
            except mm.OOM_EXCEPTION as error:
                failed = str(error)
            except MemoryError as error:
                failed = str(error) or "MemoryError"
            except RuntimeError as error:
                if "allocate memory" not in str(error):
                    raise
                failed = str(error)
            # Outside the except blocks, where the traceback no longer holds the tensors.
            self._patcher = None
            mm.unload_all_models()
            mm.soft_empty_cache()
            raise OutOfMemoryError(
                f"Not enough memory to read {len(references)} references with the MLLM "
                f"({failed.splitlines()[0]}). Everything was unloaded; the graph can be queued "
                "again. Use fewer references, a smaller image_size, or bf16 in EasyRef Loader."
            )

    def _encode(
        self,
        references: Sequence[Reference],
        prompt: str,
        aggregation: str,
        image_size: int,
    ) -> ReferenceTokens:
        counts = count_tokens(references, image_size)  # raises before anything is loaded
        if self._tokenizer is None:
            self._tokenizer = PromptTokenizer.from_directory(self._directory or bundled_tokenizer())
        if self._patcher is None:
            self._patcher = self._build()
        encoder: EasyRefEncoder = self._patcher.model
        seen = sum(counts) if aggregation == "easyref" else max(counts)
        needed = activation_bytes(encoder, seen + _PROMPT_TOKENS + encoder.num_tokens)
        mm.load_models_gpu([self._patcher], memory_required=needed)
        return encode_references(
            encoder,
            self._tokenizer,
            references,
            prompt,
            adapter=self.checkpoint.identity,
            adapter_name=self.checkpoint.name,
            aggregation=aggregation,
            image_size=image_size,
            device=self._patcher.load_device,
            cache=self._cache,
            progress=_progress(),
        )

    def _build(self) -> comfy.model_patcher.ModelPatcher:
        plan = self.plan()
        device = mm.text_encoder_device()
        compute = _DTYPES.get(self._precision)
        if compute is None:
            compute = torch.bfloat16 if mm.should_use_bf16(device) else torch.float32
        # Computing in float32, weights stay as they are in their files and are widened when
        # used: nothing is lost, and a half-precision file takes half the memory.
        encoder = plan.build(
            operations=comfy.ops.manual_cast,
            dtype=None if compute == torch.float32 else compute,
            compute_dtype=compute,
        )
        logging.info("EasyRef: MLLM built, computing in %s on %s", compute, device)
        return new_patcher(encoder, device, mm.text_encoder_offload_device())


def _progress() -> Callable[[int, int], None]:
    """Shows progress in the graph; raises ComfyUI's exception when the user interrupts."""
    bar: comfy.utils.ProgressBar | None = None

    def report(done: int, total: int) -> None:
        nonlocal bar
        mm.throw_exception_if_processing_interrupted()
        bar = bar or comfy.utils.ProgressBar(total)
        bar.update_absolute(done, total)

    return report
