"""Matrices in one byte a number, each row with a scale of its own."""

from __future__ import annotations

import torch


def round_rows(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix to one byte; times its scale it is the matrix again.

    In int8, each number is off by at most half its row's scale; the scale is the row's largest
    number over 127.

    Args:
        weight: [rows, columns], of any dtype.
        dtype: int8, or a one-byte float.

    Returns:
        The rounded matrix, and the scale of each row [rows, 1] in float32.
    """
    whole = dtype == torch.int8
    most = 127 if whole else torch.finfo(dtype).max
    scaled = weight.to(torch.float32, copy=True)
    scale = scaled.abs().amax(dim=1, keepdim=True) / most
    scale[scale == 0] = 1
    scaled /= scale
    if whole:
        scaled.round_()
    # The smallest scales are inexact, and what is out of range would come out as another number.
    return scaled.clamp_(-most, most).to(dtype), scale
