"""Pictures and masks of other kinds of values are converted where their meaning is plain."""

from __future__ import annotations

from typing import Any

import goldens
import numpy as np
import pytest
import torch

from easyref_core.pictures.levels import as_levels
from easyref_core.pictures.masks import mask_batch

LEVELS = torch.tensor([[0, 51, 255]])
SHARES = torch.tensor([[[0.0, 0.2, 1.0]]])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_whole_numbers_are_levels(dtype: torch.dtype) -> None:
    assert torch.equal(mask_batch(LEVELS.to(dtype)), SHARES)


@pytest.mark.parametrize("dtype", ["uint8", ">u2", "int64", "float16", "longdouble"])
def test_arrays_of_numpy_are_read(dtype: str) -> None:
    values = LEVELS.numpy() if "float" not in dtype and "long" not in dtype else SHARES[0].numpy()
    found = mask_batch(values.astype(dtype)[:, ::-1])
    assert torch.allclose(found, SHARES.flip(-1), atol=1e-3)


def test_booleans_are_black_and_white() -> None:
    assert torch.equal(mask_batch(LEVELS > 60), torch.tensor([[[0.0, 0.0, 1.0]]]))


def test_floats_are_taken_as_they_are() -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        found = mask_batch(SHARES.to(dtype))
        assert found.dtype == torch.float32
        assert torch.equal(found, SHARES.to(dtype).float())


def test_a_list_is_one_batch() -> None:
    two = torch.rand(2, 4, 5)
    assert torch.equal(mask_batch([two[0], two[1]]), two)
    assert torch.equal(mask_batch([two, two[:1, None][:, 0]]), torch.cat([two, two[:1]]))
    pictures = torch.rand(3, 1, 5, 3)
    assert torch.equal(as_levels(list(pictures), "images", "picture", 3), pictures)


SPARSE = torch.eye(3).to_sparse()
BAD: list[tuple[Any, tuple[str, ...]]] = [
    (None, ("nothing", "not a mask")),
    ("white", ("'white'", "not a mask")),
    (1.0, ("1.0",)),
    ({"samples": SHARES}, ("an object",)),
    (np.array([["a"]]), ("ndarray",)),
    ([], ("empty list",)),
    ([SHARES, 5], ("The mask (mask 2) is 5",)),
    ([torch.ones(2, 3), torch.ones(3, 3)], ("different sizes", [2, 3], [3, 3])),
    (SHARES.to(torch.complex64), ("complex64",)),
    (SPARSE, ("sparse",)),
    (torch.ones(3, 3, device="meta"), ("meta",)),
    (torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.quint8), ("quint8",)),
    (LEVELS * 257, ("from 0 to 65535", "0 to 255")),
    (LEVELS - 1, ("from -1 to 254",)),
    (torch.ones(2, 2, 3, 3), ([2, 2, 3, 3],)),
    (torch.ones(0, 3), ([1, 0, 3],)),
    (torch.tensor([[float("nan")]]), ("not numbers",)),
    (torch.tensor([[float("inf")]]), ("not numbers",)),
]


@pytest.mark.parametrize(("value", "said"), BAD, ids=lambda value: None)
def test_what_is_no_mask_is_named(value: Any, said: tuple[Any, ...]) -> None:
    with goldens.refused("The mask", *said):
        mask_batch(value)
