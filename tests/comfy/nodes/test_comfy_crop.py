"""EasyRef Crop: crops as a list of pictures and as a group that can be encoded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfyhost import Pack, gathered

WHOLE = {"x": 0.0, "y": 0.0, "width": 1.0, "height": 1.0, "padding": 0.25, "square": True}


def crop(pack: Pack, images: torch.Tensor, **settings: Any) -> tuple[list[torch.Tensor], Any]:
    """The node with its defaults: both outputs."""
    result = pack.nodes["EasyRefCrop"].execute(images, **(WHOLE | settings))
    return result[0], result[1]


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand((1, 40, 60, 3), generator=torch.Generator().manual_seed(4))


def white(height: int, width: int, left: int, top: int, right: int, bottom: int) -> torch.Tensor:
    mask = torch.zeros(1, height, width)
    mask[:, top:bottom, left:right] = 1
    return mask


def test_the_pictures_are_a_list_output(pack: Pack) -> None:
    info = pack.nodes["EasyRefCrop"].GET_NODE_INFO_V1()
    assert info["output_is_list"] == [True, False]
    assert info["output_name"] == ["images", "references"]


def test_the_defaults_keep_the_whole_picture(pack: Pack, image: torch.Tensor) -> None:
    (found,), group = crop(pack, image)
    assert torch.equal(found, image)
    assert [reference.picture.size for reference in group] == [(60, 40)]


def test_a_box_is_cropped_with_padding_to_a_square(pack: Pack, image: torch.Tensor) -> None:
    box = {"x": 0.5, "y": 0.25, "width": 0.2, "height": 0.2}  # 12 x 8 pixels from (30, 10)
    (found,), _ = crop(pack, image, **box, padding=0.0, square=False)
    assert torch.equal(found, image[:, 10:18, 30:42])
    (found,), _ = crop(pack, image, **box)  # 3 pixels more on every side, then square
    assert torch.equal(found, image[:, 5:23, 27:45])


def test_a_mask_replaces_the_box_and_is_stretched(pack: Pack, image: torch.Tensor) -> None:
    mask = white(20, 30, 5, 2, 10, 6)
    (found,), _ = crop(pack, image, mask=mask, x=0.9, width=0.1, padding=0.0, square=False)
    assert torch.equal(found, image[:, 4:12, 10:20])


def test_several_masks_of_one_picture_give_a_group_of_several_sizes(
    pack: Pack, easyref: Any, image: torch.Tensor
) -> None:
    masks = torch.cat([white(40, 60, 0, 0, 10, 10), white(40, 60, 20, 5, 50, 39)])
    crops, group = crop(pack, image, mask=masks, padding=0.0)
    assert [list(c.shape) for c in crops] == [[1, 10, 10, 3], [1, 34, 34, 3]]
    assert [reference.name for reference in group] == ["crop 1", "crop 2"]
    tokens = pack.run("EasyRefEncode", easyref, "a cat", "easyref", 84, references=group)
    assert tokens.num_references == 2
    more = gathered(pack, image, previous=group)
    assert len(more) == 3


def test_a_batch_with_a_mask_each_and_one_for_all(pack: Pack, image: torch.Tensor) -> None:
    batch = torch.cat([image, 1 - image])
    masks = torch.cat([white(40, 60, 0, 0, 10, 10), white(40, 60, 50, 30, 60, 40)])
    each, _ = crop(pack, batch, mask=masks, padding=0.0)
    assert torch.equal(each[0], image[:, :10, :10])
    assert torch.equal(each[1], 1 - image[:, 30:, 50:])
    for_all, _ = crop(pack, batch, mask=masks[:1], padding=0.0)
    assert torch.equal(for_all[1], 1 - image[:, :10, :10])


def test_mistakes_are_named(pack: Pack, image: torch.Tensor) -> None:
    masks = torch.cat([white(40, 60, 0, 0, 10, 10), torch.zeros(1, 40, 60)])
    with pack.refused("Mask 2 of 2", "all of it is black"):
        crop(pack, image, mask=masks)
    with pack.refused("from 0.7 to 1.2", "width"):
        crop(pack, image, x=0.7, width=0.5)
    with pack.refused("3 pictures and 2 masks"):
        crop(pack, image.expand(3, -1, -1, -1), mask=masks + 1)
    broken = image.clone()
    broken[0, 0, 0, 0] = float("nan")
    with pack.refused("crop", "not numbers"):
        crop(pack, broken)
