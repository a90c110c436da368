"""Pictures as other nodes pass them: whole numbers, truth values, lists, arrays."""

from __future__ import annotations

from typing import Any

import goldens
import numpy as np
import pytest
import torch

from easyref_core.pictures.tensors import picture_list, tensor_to_picture

LEVELS = torch.arange(256).reshape(1, 16, 16, 1).expand(-1, -1, -1, 3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_whole_numbers_are_levels(dtype: torch.dtype) -> None:
    (picture,) = picture_list(LEVELS.to(dtype), "it")
    assert np.array_equal(np.asarray(tensor_to_picture(picture, "it")), LEVELS[0].numpy())


def test_truth_values_are_black_and_white() -> None:
    (picture,) = picture_list(torch.tensor([[[[False], [True]]]]), "it")
    assert np.asarray(tensor_to_picture(picture, "it"))[0, :, 0].tolist() == [0, 255]


def test_a_list_is_a_batch_of_any_sizes_and_types() -> None:
    given = [torch.zeros(2, 4, 6, 3), torch.ones(5, 7, 3), (LEVELS.byte(), [LEVELS.numpy() / 255])]
    shapes = [tuple(picture.shape) for picture in picture_list(given, "it")]
    assert shapes == [(4, 6, 3)] * 2 + [(5, 7, 3)] + [(16, 16, 3)] * 2
    assert picture_list([], "it") == []


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([torch.zeros(1, 4, 4, 3), 5], "it is 5, not a picture"),
        (torch.zeros(2, 2), "it has shape [2, 2]"),
        (torch.zeros(()), "it has shape []"),
    ],
)
def test_what_is_no_picture_is_refused(images: Any, said: str) -> None:
    with goldens.refused(said):
        picture_list(images, "it")
