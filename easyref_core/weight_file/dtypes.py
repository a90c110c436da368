"""dtypes by name, and which of them weights have."""

from __future__ import annotations

import torch

SAFETENSORS = {  # safetensors' names -> PyTorch's
    **{f"F{bits}": f"float{bits}" for bits in (64, 32, 16)},
    **{
        f"{kind}{bits}": f"{name}int{bits}"
        for kind, name in (("I", ""), ("U", "u"))
        for bits in (64, 32, 16, 8)
    },
    "BF16": "bfloat16",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}
WEIGHTS = frozenset(("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"))


def dtype_name(dtype: torch.dtype) -> str:
    """PyTorch's name without `torch.`."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype | None:
    """The dtype of this name; None where PyTorch (or this PyTorch) has none."""
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else None


def all_finite(weight: torch.Tensor) -> bool:
    """Whether a weight holds neither NaN nor infinities; one-byte floats too, which torch cannot
    test as they are.
    """
    return bool(torch.isfinite(weight.float() if weight.itemsize == 1 else weight).all())
