"""Multiplications of a function, the limit of what it can take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


# PyTorch's counter knows attention on GPUs only.
_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


def operations(function: Callable[[], object]) -> int:
    """Multiplications and additions of its matrix products, convolutions and attention."""
    with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter:
        function()
    return counter.get_total_flops()
