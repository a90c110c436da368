"""Rows rounded to one byte: how far off they are, and what is kept exactly."""

from __future__ import annotations

import pytest
import torch

from easyref_core.weight_file.rounding import round_rows

ONE_BYTE = [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
def test_an_int8_number_is_off_by_at_most_half_its_rows_scale(given: torch.dtype) -> None:
    weight = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(-4, 2, 40)[:, None]
    weight = weight.to(given)
    rounded, scale = round_rows(weight, torch.int8)
    assert (rounded.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (40, 1))
    assert torch.equal(scale[:, 0], weight.float().abs().amax(dim=1) / 127)
    assert rounded.abs().amax(dim=1).eq(127).all()
    error = (rounded.double() * scale.double() - weight.double()).abs()
    assert (error <= scale * 0.50001).all()


@pytest.mark.parametrize("dtype", ONE_BYTE)
def test_a_row_of_zeros_stays_zero(dtype: torch.dtype) -> None:
    rounded, scale = round_rows(torch.tensor([[0.0, 0.0], [1.0, -1.0]]), dtype)
    assert scale.isfinite().all()
    assert rounded.float()[0].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", ONE_BYTE)
def test_the_smallest_numbers_keep_their_sign(dtype: torch.dtype) -> None:
    """Their scale is inexact: 190 of the smallest steps over 127 are one step."""
    step = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps
    for count in (1, 60, 190, 670):
        rounded, scale = round_rows(torch.tensor([[step * count, -step * count]]), dtype)
        assert rounded.float().isfinite().all()
        first, second = (rounded.float() * scale)[0].tolist()
        assert first == -second >= 0


def test_the_matrix_itself_is_not_changed() -> None:
    weight = torch.randn(3, 5)
    before = weight.clone()
    round_rows(weight, torch.int8)
    assert torch.equal(weight, before)
