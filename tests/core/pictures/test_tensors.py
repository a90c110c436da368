"""Pictures and masks as other nodes pass them: whole numbers, truth values, lists, arrays."""

from __future__ import annotations

from typing import Any

import goldens
import numpy as np
import pytest
import torch

from easyref_core.pictures.tensors import mask_batch, mask_list, picture_list, tensor_to_picture

LEVELS = torch.arange(256).reshape(1, 16, 16, 1).expand(-1, -1, -1, 3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_whole_numbers_are_levels(dtype: torch.dtype) -> None:
    (picture,) = picture_list(LEVELS.to(dtype), "it")
    assert np.array_equal(np.asarray(tensor_to_picture(picture, "it")), LEVELS[0].numpy())


def test_truth_values_are_black_and_white() -> None:
    (picture,) = picture_list(torch.tensor([[[[False], [True]]]]), "it")
    assert np.asarray(tensor_to_picture(picture, "it"))[0, :, 0].tolist() == [0, 255]


def test_a_list_is_a_batch_of_any_sizes_and_types() -> None:
    given = [torch.zeros(2, 4, 6, 3), torch.ones(5, 7, 3), LEVELS.byte(), LEVELS.numpy() / 255]
    shapes = [tuple(picture.shape) for picture in picture_list(given, "it")]
    assert shapes == [(4, 6, 3)] * 2 + [(5, 7, 3)] + [(16, 16, 3)] * 2
    assert picture_list([], "it") == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_stay_as_they_are(dtype: torch.dtype) -> None:
    pictures = torch.rand(1, 2, 3, 3).to(dtype)
    assert torch.equal(picture_list(pictures, "it")[0], pictures[0])


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (None, "it is nothing where a picture or a batch"),
        ("a.png", "it is a text"),
        ({"samples": 1}, "it is an object"),
        ([torch.zeros(1, 4, 4, 3), 5], "it is a number"),
        (np.array(["a"]), "it is a ndarray"),
        (torch.full((1, 2, 2, 3), 256), "whole numbers from 256 to 256; levels go from 0 to 255"),
        (torch.full((1, 2, 2, 3), -1), "whole numbers from -1 to -1"),
        (torch.zeros(1, 2, 2, 3, dtype=torch.complex64), "complex64 tensor that holds no plain"),
        (torch.zeros(1, 2, 2, 3).to_sparse(), "no plain values"),
        (torch.zeros(1, 2, 2, 3, device="meta"), "no plain values"),
        (torch.quantize_per_tensor(torch.zeros(1, 2, 2, 3), 1, 0, torch.qint8), "no plain values"),
        (torch.nested.nested_tensor([torch.zeros(2, 2, 3)]), "no plain values"),
        (torch.zeros(2, 2), "it has shape [2, 2]"),
        (torch.zeros(()), "it has shape []"),
    ],
)
def test_what_is_no_picture_is_refused(images: Any, said: str) -> None:
    with goldens.refused(said):
        picture_list(images, "it")


def test_masks_are_zero_and_one_whatever_their_type() -> None:
    plain = torch.tensor([[0.0, 1.0]])
    for mask in (plain.bool(), plain.byte(), plain.long(), (plain * 255).byte(), plain.numpy()):
        (found,) = mask_list(mask, "it")
        assert torch.equal(found, plain)
    for wrong, said in (([], "holds no mask"), (None, "it is nothing"), (plain * 1j, "complex64")):
        with goldens.refused(said):
            mask_list(wrong, "it")


@pytest.mark.parametrize("dtype", ["uint8", ">u2", "int64", ">f4", "longdouble"])
def test_arrays_of_numpy_are_read_in_any_byte_order_and_direction(dtype: str) -> None:
    shares = np.array([[0.0, 0.2, 1.0]])
    values = (shares if "f" in dtype or "double" in dtype else shares * 255).astype(dtype)
    assert torch.allclose(mask_batch(values[:, ::-1]), torch.tensor([[[1.0, 0.2, 0.0]]]))


def test_a_list_of_masks_is_one_batch() -> None:
    two = torch.rand(2, 4, 5)
    assert torch.equal(mask_batch([two[0], two[1]]), two)
    assert torch.equal(mask_batch([two, two[:1, None]]), torch.cat([two, two[:1]]))
    assert mask_batch(two.half()).dtype == torch.float32
    with goldens.refused("different sizes", "3x2", "3x4"):
        mask_batch([torch.ones(2, 3), torch.ones(4, 3)])


@pytest.mark.parametrize(
    ("masks", "said"),
    [
        ([], "holds no mask"),
        ([torch.ones(2, 2), 5], "The mask is a number"),
        (torch.ones(2, 2, 3, 3), "[2, 2, 3, 3]"),
        (torch.ones(0, 3), "[1, 0, 3]"),
        (torch.tensor([[float("nan")]]), "not numbers"),
        (torch.tensor([[float("inf")]]), "not numbers"),
    ],
)
def test_what_is_no_mask_is_refused(masks: Any, said: str) -> None:
    with goldens.refused(said):
        mask_batch(masks)


def test_lists_of_lists_are_refused_however_deep() -> None:
    nested: list[Any] = [torch.zeros(2, 2, 3)]
    for _ in range(5000):
        nested = [nested]
    with goldens.refused("it is a list"):
        picture_list(nested, "it")
    with goldens.refused("it is a list"):
        mask_list(nested, "it")
