"""Scaled fp8 and int8: weights that were divided by a scale before they were rounded to one byte.

The scale of `X.weight` is `X.scale_weight` or `X.weight_scale`, one number or one for each row.
ComfyUI marks such files by a tensor `scaled_fp8`, newer ones each weight by `X.comfy_quant`; int8
is read with this mark only, as in files of other libraries it means other things. Scales of
activations (`X.input_scale`) are of no use where weights are computed with as usual. Whatever else
stands beside a weight stays in the list of tensors, where nothing claims it.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import EasyRefError
from ..untrusted import escaped, parse_json
from .dtypes import WEIGHTS
from .floats import as_float32, multiplied
from .stored import TensorInfo

INT8 = "int8"

_WEIGHT = "weight"
_SCALES = ("scale_weight", "weight_scale")
_OF_ACTIVATIONS = ("scale_input", "input_scale")
_FORMAT, _MARK = "comfy_quant", "scaled_fp8"
_FORMATS = {  # a mark's -> dtype of the weight
    "float8_e4m3fn": "float8_e4m3fn",
    "float8_e5m2": "float8_e5m2",
    "int8_tensorwise": INT8,
}
_OF_USE = ("full_precision_matrix_mult",)  # in a mark: how to compute with it, not what it is
INT8_MARK = json.dumps({"format": "int8_tensorwise"}).encode()
_MAX_ROWS = 1_000_000
_MAX_FORMAT_BYTES = 4096


@dataclass(frozen=True)
class Scale:
    """What a weight is multiplied by.

    Attributes:
        shape: of one number, or [rows, 1].
        numbers: their bytes, in float32.
    """

    shape: tuple[int, ...]
    numbers: bytes


def split_scales(
    tensors: Mapping[str, TensorInfo], read: Callable[[str], bytes]
) -> tuple[dict[str, TensorInfo], dict[str, Scale]]:
    """(tensors without scales and their marks, name of a weight -> its scale).

    Args:
        read: gives a tensor's bytes.

    Raises:
        EasyRefError: a scale is not a number (named).
    """
    rest = {n: t for n, t in tensors.items() if n.rpartition(".")[2] != _MARK}
    scales: dict[str, Scale] = {}
    for name in tensors:
        layer = name.removesuffix(_WEIGHT)
        found = [layer + n for n in _SCALES if layer + n in tensors]
        if layer == name or len(found) != 1 or not _fits(tensors[name], tensors[found[0]]):
            continue
        if not _is_known(layer + _FORMAT, tensors[name], tensors, read):
            continue
        info = tensors[found[0]]
        numbers = as_float32(read(found[0]), info.dtype)
        if not math.isfinite(sum(numbers)):  # in float64, where float32 numbers do not overflow
            raise EasyRefError(
                f"The scale {escaped(found[0])} holds values that are not numbers (NaN or "
                "infinite). The file is damaged; download it again."
            )
        scales[name] = Scale(info.shape, numbers.tobytes())
        for suffix in (*_SCALES, *_OF_ACTIVATIONS, _FORMAT):
            rest.pop(layer + suffix, None)
    return rest, scales


def scaled_bytes(content: bytes, info: TensorInfo, scale: Scale) -> bytes:
    """The bytes of a weight (or of its first rows) times its scale, in float32."""
    factors = array("f", scale.numbers)
    if len(factors) == 1:
        return multiplied(content, info.dtype, factors[0])
    rows = info.shape[0]
    width = len(content) // rows
    return b"".join(
        multiplied(content[n * width : (n + 1) * width], info.dtype, factors[n])
        for n in range(rows)
    )


def scaled_infos(name: str, weight: TensorInfo, of_scale: tuple[int, ...]) -> dict[str, TensorInfo]:
    """A weight as it is written, and what beside it: its scale, and for int8 `INT8_MARK`.

    Args:
        of_scale: its shape.
    """
    layer, scale = name.removesuffix(_WEIGHT), TensorInfo(of_scale, "float32")
    if weight.dtype != INT8:
        return {name: weight, layer + _SCALES[0]: scale}
    mark = TensorInfo((len(INT8_MARK),), "uint8")
    return {name: weight, layer + _SCALES[1]: scale, layer + _FORMAT: mark}


def _fits(weight: TensorInfo, scale: TensorInfo) -> bool:
    """Whether it is one number, or one for each row."""
    if scale.dtype not in WEIGHTS or weight.dtype not in (*WEIGHTS, INT8):
        return False
    by_row = len(weight.shape) == 2 and scale.shape == (weight.shape[0], 1)
    return math.prod(scale.shape) == 1 or (by_row and 0 < scale.shape[0] <= _MAX_ROWS)


def _is_known(
    name: str,
    weight: TensorInfo,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], bytes],
) -> bool:
    """Whether the mark `name`, or that there is none, says that the weight has a plain scale and
    nothing more."""
    mark = tensors.get(name)
    if mark is None:
        return weight.dtype != INT8
    if mark.dtype != "uint8" or math.prod(mark.shape) > _MAX_FORMAT_BYTES:
        return False
    content = parse_json(read(name), name)
    if not isinstance(content, dict):
        return False
    found = content.get("format")
    if not isinstance(found, str) or _FORMATS.get(found) != weight.dtype:
        return False
    # Rotated or grouped int8 says so in other entries.
    others = (content[key] for key in content if key not in ("format", *_OF_USE))
    return weight.dtype != INT8 or not any(others)
