"""Crops: whole pixels, everything covered inside, as square as there is room."""

from __future__ import annotations

import goldens
import pytest
import torch

from easyref_core.pictures.crop import Box, crop_pictures, crop_window, mask_box, mask_boxes


def mask(height: int, width: int, *boxes: tuple[int, int, int, int]) -> torch.Tensor:
    """White boxes (left, top, right, bottom) on black."""
    made = torch.zeros(height, width)
    for left, top, right, bottom in boxes:
        made[top:bottom, left:right] = 1
    return made


def window(
    box: Box, size: tuple[int, int], padding: float = 0.0, square: bool = False
) -> tuple[int, ...]:
    return crop_window(box, *size, padding, square)


def numbered(height: int, width: int, count: int = 1) -> torch.Tensor:
    """Pictures whose pixels are all different: (picture, row, column)."""
    grids = torch.meshgrid(*(torch.arange(n) for n in (count, height, width)), indexing="ij")
    return torch.stack(grids, dim=-1).float()


def test_the_whole_picture_is_the_default() -> None:
    assert window(Box(), (40, 30)) == (0, 0, 40, 30)
    assert window(Box(), (40, 30), 2.0, True) == (0, 0, 40, 30)


@pytest.mark.parametrize(
    ("box", "wanted"),
    [
        (Box(0.25, 0.5, 0.5, 0.5), (10, 10, 30, 20)),
        (Box(0.26, 0.5, 0.5, 0.5), (10, 10, 31, 20)),  # every pixel that is touched
        (Box(0.1 + 0.2, 0, 0.7, 1), (12, 0, 40, 20)),  # not a pixel more for rounding
        (Box(0.999, 0.999, 0.001, 0.001), (39, 19, 40, 20)),  # never nothing
        (Box(0.5, 0.5, 1e-9, 1e-9), (20, 10, 21, 11)),
    ],
)
def test_a_box_in_whole_pixels(box: Box, wanted: tuple[int, ...]) -> None:
    assert window(box, (40, 20)) == wanted


def test_padding_is_a_fraction_of_the_larger_side_on_every_side() -> None:
    box = Box(0.4, 0.4, 0.2, 0.1)  # 20 x 10 of 100 x 100
    assert window(box, (100, 100), 0.25) == (35, 35, 65, 55)
    assert window(box, (100, 100), 2.0) == (0, 0, 100, 90)


def test_a_square_grows_the_shorter_side_around_the_middle() -> None:
    assert window(Box(0.4, 0.4, 0.2, 0.1), (100, 100), 0, True) == (40, 35, 60, 55)
    assert window(Box(0.4, 0.4, 0.2, 0.1), (100, 100), 0.25, True) == (35, 30, 65, 60)


def test_at_the_border_the_square_moves_inside() -> None:
    assert window(Box(0, 0, 0.2, 0.1), (100, 100), 0, True) == (0, 0, 20, 20)
    assert window(Box(0.8, 0.9, 0.2, 0.1), (100, 100), 0.5, True) == (60, 60, 100, 100)


def test_where_there_is_no_room_for_a_square_nothing_covered_is_cut_off() -> None:
    assert window(Box(0.1, 0.4, 0.8, 0.2), (200, 50), 0, True) == (20, 0, 180, 50)


@pytest.mark.parametrize("padding", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("square", [False, True])
def test_every_crop_lies_in_the_picture_and_holds_its_box(padding: float, square: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        width, height = (int(n) for n in torch.randint(1, 90, (2,), generator=generator))
        x, y, w, h = (float(n) for n in torch.rand(4, generator=generator))
        box = Box(x * 0.9, y * 0.9, 0.05 + w * (0.95 - x * 0.9), 0.05 + h * (0.95 - y * 0.9))
        plain = window(box, (width, height))
        left, top, right, bottom = window(box, (width, height), padding, square)
        assert 0 <= left <= plain[0] < plain[2] <= right <= width
        assert 0 <= top <= plain[1] < plain[3] <= bottom <= height
        if square and right - left != bottom - top:
            assert right - left == width or bottom - top == height


# Masks


def test_a_mask_becomes_the_box_around_all_that_it_covers() -> None:
    two = mask(20, 40, (4, 2, 8, 6), (20, 10, 30, 12))
    assert window(mask_box(two, "it"), (40, 20)) == (4, 2, 30, 12)


def test_a_mask_of_another_size_is_stretched() -> None:
    box = mask_box(mask(20, 40, (4, 2, 8, 6)), "it")
    assert window(box, (400, 100)) == (40, 10, 80, 30)
    assert window(box, (4, 4)) == (0, 0, 1, 2)


@pytest.mark.parametrize("brightest", [1.0, 0.2])
def test_feathered_and_faint_masks_count_where_they_are_half_as_bright(brightest: float) -> None:
    soft = mask(20, 20, (5, 5, 15, 15)) * 0.3 + mask(20, 20, (8, 8, 12, 12)) * 0.7
    assert window(mask_box(soft * brightest, "it"), (20, 20)) == (8, 8, 12, 12)


def test_the_empty_mask_is_named() -> None:
    masks = torch.stack([mask(8, 8, (1, 1, 3, 3)), mask(8, 8), mask(8, 8, (0, 0, 1, 1))])
    with goldens.refused("Mask 2 of 3", "all of it is black", "disconnect"):
        mask_boxes(masks)
    with goldens.refused("The mask covers nothing"):
        mask_boxes(mask(8, 8))


def test_a_mask_that_is_no_mask_is_refused() -> None:
    broken = mask(8, 8, (1, 1, 3, 3))
    broken[4, 4] = float("nan")
    with goldens.refused("The mask", "not numbers"):
        mask_boxes(broken)
    for shape in ((0, 8, 8), (1, 2, 3, 4)):
        with goldens.refused(list(shape), "[masks, height, width]"):
            mask_boxes(torch.ones(shape))
    with goldens.refused([1, 0, 8]):
        mask_boxes(torch.ones(1, 0, 8))


def test_masks_come_with_or_without_their_batch() -> None:
    one = mask(8, 8, (1, 1, 3, 3))
    assert mask_boxes(one) == mask_boxes(one[None]) == mask_boxes(one[None, None])


# Boxes and pictures


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ((0.5, 0, 0.6, 1), ("from 0.5 to 1.1", "width", "x or width smaller")),
        ((0, 0.9, 1, 0.2), ("from 0.9 to 1.1", "height", "y or height smaller")),
        ((-0.1, 0, 1, 1), ("from -0.1", "width")),
        ((0.2, 0, 0, 1), ("width 0", "above 0")),
        ((0, 0, 1, -1), ("height -1",)),
        ((0, float("nan"), 1, 1), ("nan",)),
    ],
)
def test_a_box_outside_the_picture_is_refused(
    box: tuple[float, ...], said: tuple[str, ...]
) -> None:
    with goldens.refused(*said):
        Box(*box)


def test_crops_are_the_pixels_themselves() -> None:
    images = numbered(20, 40, 2)
    boxes = [Box(0, 0, 0.5, 0.5), Box(0.5, 0.5, 0.5, 0.5)]
    first, second = crop_pictures(images, boxes, 0, False)
    assert torch.equal(first, images[0:1, :10, :20])
    assert torch.equal(second, images[1:2, 10:, 20:])
    assert first.is_contiguous()
    assert first.untyped_storage().nbytes() == first.numel() * 4, "it holds the whole batch"


def test_one_mask_for_all_and_several_for_one() -> None:
    images, box, other = numbered(20, 40, 3), Box(0, 0, 0.5, 1), Box(0.5, 0, 0.5, 0.5)
    for_all = crop_pictures(images, [box], 0, False)
    assert [int(crop[0, 0, 0, 0]) for crop in for_all] == [0, 1, 2]
    of_one = crop_pictures(images[:1], [box, other], 0, False)
    assert [list(crop.shape) for crop in of_one] == [[1, 20, 20, 3], [1, 10, 20, 3]]
    assert torch.equal(
        crop_pictures(images[0], [box], 0, False)[0], crop_pictures(images[:1], [box], 0, False)[0]
    )


def test_other_numbers_of_masks_are_refused() -> None:
    with goldens.refused("3 pictures and 2 masks", "one for each"):
        crop_pictures(numbered(8, 8, 3), [Box(), Box()])


def test_no_picture_is_refused() -> None:
    for images in (torch.zeros(0, 8, 8, 3), torch.zeros(1, 0, 8, 3), []):
        with goldens.refused("images holds no picture"):
            crop_pictures(images, [Box()])


def test_pictures_of_a_list_may_differ_in_size_and_type() -> None:
    images = [numbered(8, 8) / 9, torch.full((1, 4, 6, 3), 255, dtype=torch.uint8)]
    first, second = crop_pictures(images, [Box(0.5, 0.5, 0.5, 0.5)], padding=0, square=False)
    assert torch.equal(first, numbered(8, 8)[:, 4:, 4:] / 9)
    assert torch.equal(second, torch.ones(1, 2, 3, 3))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_masks_of_truth_values_and_whole_numbers_are_understood(dtype: torch.dtype) -> None:
    one = mask(8, 8, (1, 1, 3, 3))
    assert mask_boxes(one.to(dtype)) == mask_boxes(one)
    assert mask_boxes([one.to(dtype), one]) == mask_boxes(one) * 2
    if dtype != torch.bool:
        assert mask_boxes((one * 255).to(dtype)) == mask_boxes(one)


def test_padding_below_nothing_is_refused() -> None:
    for padding in (-0.1, float("nan")):
        with goldens.refused("padding", padding):
            crop_pictures(numbered(8, 8), [Box()], padding)
