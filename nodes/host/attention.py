"""ComfyUI's layers for the MLLM, and its attention kernels if they are exact enough.

Quantised attention (Sage, `--use-ck-attention`, or another pack's) is for the thousands of
positions of a picture. Reference tokens are few, and errors in the MLLM add up over its layers, so
neither uses it.
"""

from __future__ import annotations

from collections.abc import Callable

import comfy.ldm.modules.attention as host
import comfy.model_management as mm
import comfy.ops
import torch
import torch.nn.functional as F

from ...easyref_core import attention_kernels as kernels
from ...easyref_core.qwen2vl.int8 import RowScaled, scaled_linear

Attention = Callable[..., torch.Tensor]


class MllmOperations(comfy.ops.manual_cast):
    """Linear and norm layers that ComfyUI can offload, and the MLLM's attention."""

    class Linear(RowScaled, comfy.ops.manual_cast.Linear):
        def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
            weight, bias, used = comfy.ops.cast_bias_weight(self, input, offloadable=True)
            result = scaled_linear(input, weight, bias, self.weight_scale)
            comfy.ops.uncast_bias_weight(self, weight, bias, used)
            return result

    @staticmethod
    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        """As `attention_kernels.attend`, by the kernel that the user chose where it can: none
        supports causal attention, and rows with a mask are too few to gain from one."""
        chosen = None
        if mask is None and not causal:
            chosen = _fused_choice(query.device, query.dtype)
        if chosen is not None:
            heads = query.shape[1]
            return chosen(query, key, value, heads, skip_reshape=True, skip_output_reshape=True)
        if _pytorch_allowed(query.device):
            return kernels.attend(query, key, value, mask, causal)
        return kernels.attend_in_chunks(query, key, value, mask, causal)


def mllm_is_fused(device: torch.device, dtype: torch.dtype, head_dims: tuple[int, int]) -> bool:
    """Whether `MllmOperations.attend` needs no memory for attention scores.

    Args:
        head_dims: of the vision tower and of the decoder.
    """
    if not _pytorch_allowed(device):
        return False
    vision, decoder = head_dims
    chosen = _fused_choice(device, dtype) not in (None, host.attention_pytorch)
    return (chosen or kernels.has_fused(device, dtype, vision, causal=False)) and (
        kernels.has_fused(device, dtype, decoder, causal=True)
    )


def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    precision: torch.dtype | None = None,
) -> torch.Tensor:
    """Cross-attention to reference tokens, [B, heads, T, head_dim]: by PyTorch's kernels where
    ComfyUI allows them, else by its path for short sequences.

    Args:
        precision: the block's `attn_precision`.
    """
    if precision is None and _pytorch_allowed(query.device):
        return F.scaled_dot_product_attention(query, key, value)
    attend = host.optimized_attention_for_device(query.device, mask=False, small_input=True)
    reshapes = {"skip_reshape": True, "skip_output_reshape": True}
    exact = {"attn_precision": precision, "low_precision_attention": False}
    return attend(query, key, value, query.shape[1], **reshapes, **exact)


def _fused_choice(device: torch.device, dtype: torch.dtype) -> Attention | None:
    """The kernel that ComfyUI was started with, if it is exact and stores no scores."""
    if device.type == "cpu":  # ComfyUI may offload the MLLM; most kernels are for GPUs only
        return None
    chosen = host.optimized_attention
    half = dtype in (torch.float16, torch.bfloat16)
    if chosen is host.attention_flash:  # logs an error for anything else
        return chosen if half else None
    return chosen if chosen in (host.attention_pytorch, host.attention_xformers) else None


def _pytorch_allowed(device: torch.device) -> bool:
    """Whether ComfyUI allows PyTorch's attention there; it lists GPUs where that fails."""
    return device.type == "cpu" or mm.pytorch_attention_enabled()
