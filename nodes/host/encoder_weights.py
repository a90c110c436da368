"""The encoder's weights: in which dtype they are kept, and how ComfyUI gets them."""

from __future__ import annotations

import logging
from dataclasses import replace

import comfy.model_management as mm
import comfy.model_patcher
import torch
from comfy.cli_args import args

from ...easyref_core.encode.encoder import EasyRefEncoder
from ...easyref_core.encode.plan_encoder import EncoderPlan
from ...easyref_core.qwen2vl.int8 import SCALE
from .attention import MllmOperations
from .patcher import loads_dynamically, new_patcher
from .weight_files import HostWeightFile

INT8 = "int8"
PRECISIONS = ("auto", "bf16", "fp16", "fp32", INT8)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_FLAGS = {  # ComfyUI's options for the dtype of text encoders
    "fp8_e4m3fn_text_enc": torch.float8_e4m3fn,
    "fp8_e5m2_text_enc": torch.float8_e5m2,
    "fp16_text_enc": torch.float16,
    "bf16_text_enc": torch.bfloat16,
    "fp32_text_enc": torch.float32,
}


def load_encoder(
    plan: EncoderPlan, precision: str, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """Read an encoder's weights and hand them to ComfyUI.

    Args:
        precision: one of `PRECISIONS`.
        disable_dynamic: see `new_patcher`.

    Raises:
        EasyRefError: a file changed in between.
    """
    device = mm.text_encoder_device()
    storage, compute = dtypes_of(precision, device)
    int8 = precision == INT8
    sources = plan.sources
    if not int8:  # rounded weights are no longer those of a file, so all are kept in memory
        sources = {key: (HostWeightFile.of(file), name) for key, (file, name) in sources.items()}
    encoder = replace(plan, sources=sources).build(
        operations=MllmOperations,
        dtype=storage,
        compute_dtype=compute,
        # With dynamic loading, the GPU converts them when they are used.
        convert=int8 or not loads_dynamically(),
        int8=int8,
    )
    _own_weights_as_buffers(encoder)
    _leave_dtypes(encoder, biases=storage is not None and storage.itemsize == 1)
    logging.info("EasyRef: MLLM built, computing in %s on %s", compute, device)
    patcher = new_patcher(encoder, device, mm.text_encoder_offload_device(), disable_dynamic)
    # ComfyUI builds the same model again by this, for another device or kind of patcher.
    patcher.cached_patcher_init = (load_encoder, (plan, precision))
    return patcher


def dtypes_of(precision: str, device: torch.device) -> tuple[torch.dtype | None, torch.dtype]:
    """(dtype of stored weights, None for that of their files; dtype of the computation)."""
    usual = torch.bfloat16 if mm.should_use_bf16(device) else torch.float32
    flag = next((dtype for name, dtype in _FLAGS.items() if getattr(args, name)), None)
    if precision == "auto" and flag is not None:
        efficient = {
            torch.float32: True,
            torch.bfloat16: mm.should_use_bf16(device),
            torch.float16: mm.should_use_fp16(device, prioritize_performance=False),
        }
        return flag, flag if efficient.get(flag) else usual
    compute = _DTYPES.get(precision, usual)
    # For float32, weights stay in the files' dtype and are converted when used: this is exact, and
    # a half-precision file takes half the memory.
    return None if compute == torch.float32 else compute, compute


def _own_weights_as_buffers(encoder: EasyRefEncoder) -> None:
    """Make weights that belong to no layer of ComfyUI's buffers of the same name: the reference
    tokens, and vectors of layer pooling.

    Dynamic loading moves parameters of a module with submodules to the GPU, but neither counts them
    nor moves them back; it does both for buffers.
    """
    for module in encoder.modules():
        if hasattr(module, "comfy_cast_weights"):
            continue
        for name, weight in [*module.named_parameters(recurse=False)]:
            delattr(module, name)
            module.register_buffer(name, weight.data)


def _leave_dtypes(encoder: EasyRefEncoder, biases: bool) -> None:
    """Have ComfyUI move int8 weights as they are.

    Args:
        biases: these too, where it converts weights to one byte.
    """
    for module in encoder.modules():
        if biases and hasattr(module, "bias_comfy_model_dtype"):
            module.bias_comfy_model_dtype = None
        if getattr(module, SCALE, None) is not None:
            module.weight_comfy_model_dtype = None
