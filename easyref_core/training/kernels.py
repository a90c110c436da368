"""Which of PyTorch's attention kernels to train with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def quick_attention(device: torch.device) -> AbstractContextManager[Any]:
    """On a CPU the fused kernels' backward pass is slower than plain matrix products."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
