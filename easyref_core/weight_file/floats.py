"""Weights as float32 from their bytes, without PyTorch, with the same results."""

from __future__ import annotations

import struct
from array import array
from functools import cache
from itertools import chain

from .dtypes import SIZES

_CODES = range(256)


def as_float32(content: bytes, dtype: str) -> array[float]:
    """
    Args:
        dtype: one of `WEIGHTS`, or int8.
    """
    if SIZES[dtype] == 1:
        return array("f", _looked_up(content, _table(dtype)))
    if dtype == "bfloat16":
        wide = bytearray(2 * len(content))
        wide[2::4], wide[3::4] = content[::2], content[1::2]
        return array("f", bytes(wide))
    if dtype == "float16":
        return array("f", chain.from_iterable(struct.iter_unpack("<e", content)))
    return array("f", content) if dtype == "float32" else array("f", array("d", content))


def multiplied(content: bytes, dtype: str, factor: float) -> bytes:
    """The bytes of numbers times a factor in float32; each product is rounded once."""
    if SIZES[dtype] == 1:
        products = array("f", (n * factor for n in _table(dtype)))
        return _looked_up(content, products)
    return array("f", (n * factor for n in as_float32(content, dtype))).tobytes()


@cache
def _table(dtype: str) -> array[float]:
    """The 256 numbers of a one-byte dtype, by way of float16.

    int8 needs no way. float8_e5m2 is float16's upper byte. float8_e4m3fn has one bit less for the
    exponent, a bias that is 8 less, no infinities and one NaN of either sign.
    """
    if dtype == "int8":
        return array("f", array("b", bytes(_CODES)))
    if dtype == "float8_e5m2":
        return array("f", struct.unpack("<256e", struct.pack("<256H", *(c << 8 for c in _CODES))))
    halves = struct.pack("<256H", *((c & 128) << 8 | (c & 127) << 7 for c in _CODES))
    numbers = array("f", (number * 2**8 for number in struct.unpack("<256e", halves)))
    numbers[127], numbers[255] = float("nan"), float("nan")
    return numbers


def _looked_up(codes: bytes, numbers: array[float]) -> bytes:
    """The bytes of `numbers[code]` of each code."""
    table, found = numbers.tobytes(), bytearray(4 * len(codes))
    for place in range(4):
        found[place::4] = codes.translate(table[place::4])
    return bytes(found)
