"""Single values: numbers within a range, texts, truth values."""

from __future__ import annotations

import math
import numbers
from typing import Any

from ..errors import EasyRefError
from .messages import shown


def number(
    value: Any, name: str, low: float = -math.inf, high: float = math.inf, hint: str = ""
) -> float:
    """A finite number within a range.

    Args:
        value: an int or a float, numpy's and those of tensors without dimensions included.
        name: of the input, for messages.
        low, high: smallest and largest; infinite for none.
        hint: what to do, a sentence.

    Raises:
        EasyRefError: another type, NaN, infinite, or out of range.
    """
    found = _plain_number(value)
    if found is None or not math.isfinite(found) or not low <= found <= high:
        raise EasyRefError(_wanted(value, name, "a number", low, high, hint))
    return float(found)


def whole_number(
    value: Any, name: str, low: float = -math.inf, high: float = math.inf, hint: str = ""
) -> int:
    """A whole number within a range; see `number`. A float without a fraction is one."""
    found = _plain_number(value)
    if found is None or not math.isfinite(found) or int(found) != found or not low <= found <= high:
        raise EasyRefError(_wanted(value, name, "a whole number", low, high, hint))
    return int(found)


def text(value: Any, name: str, hint: str = "") -> str:
    """A text.

    Raises:
        EasyRefError: another type.
    """
    if not isinstance(value, str):
        raise EasyRefError(f"{name} is {shown(value)}; it must be a text.{_after(hint)}")
    return value


def flag(value: Any, name: str, hint: str = "") -> bool:
    """True or false.

    Raises:
        EasyRefError: another type.
    """
    if not isinstance(value, bool):
        raise EasyRefError(f"{name} is {shown(value)}; it must be true or false.{_after(hint)}")
    return value


def _plain_number(value: Any) -> float | int | None:
    """The value as Python's own number; None if it is none, or a truth value."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # numpy, torch
        try:
            value = value.item()
        except (RuntimeError, TypeError, ValueError):  # a tensor without data
            return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return None
    return value if isinstance(value, int) else float(value)


def _wanted(value: Any, name: str, kind: str, low: float, high: float, hint: str) -> str:
    if math.isinf(low) and math.isinf(high):
        wanted = kind if kind != "a number" else "a finite number"
    elif math.isinf(high):
        wanted = f"{kind} of {low:g} or more"
    elif math.isinf(low):
        wanted = f"{kind} of {high:g} or less"
    else:
        wanted = f"{kind} from {low:g} to {high:g}"
    return f"{name} is {shown(value)}; it must be {wanted}.{_after(hint)}"


def _after(hint: str) -> str:
    return f" {hint}" if hint else ""
