"""dtypes by PyTorch's names: how many bytes a number takes, and which of them weights have.

Names, so that a file's header can be read without PyTorch, whose import takes longer than that.
"""

from __future__ import annotations

SIZES = {  # bytes of a number
    "complex128": 16,
    **dict.fromkeys(("float64", "complex64", "int64", "uint64"), 8),
    **dict.fromkeys(("float32", "complex32", "int32", "uint32", "qint32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16", "bits16"), 2),
    **{f"float8_{kind}": 1 for kind in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu")},
    **{f"{kind}int{bits}": 1 for kind in ("", "u") for bits in range(1, 9)},
    **dict.fromkeys(("bool", "float4_e2m1fn_x2", "bits8", "bits1x8", "bits2x4", "bits4x2"), 1),
    **dict.fromkeys(("qint8", "quint8", "quint4x2", "quint2x4"), 1),
}
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
