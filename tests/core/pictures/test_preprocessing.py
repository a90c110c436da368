"""Pictures become exactly the patches of the official preprocessing."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import goldens
import pytest
import torch
from PIL import Image

from easyref_core.encode.group import Reference, plan_images
from easyref_core.pictures.preprocessing import Patches, black_picture, preprocess, reduced
from easyref_core.pictures.sizes import pixel_limits, plan_sizes, resized_size

TABLE = json.loads((goldens.DATA / "resize_table_336.json").read_text(encoding="utf-8"))
CASES_336 = goldens.description()["cases_336"]


def checksum(patches: list[Patches]) -> str:
    """As `expected.json` has it: SHA-256 of all pixels as little-endian float32."""
    pixels = torch.cat([p.pixels for p in patches])
    return hashlib.sha256(pixels.numpy().astype("<f4").tobytes()).hexdigest()


def grids(patches: list[Patches]) -> list[list[int]]:
    return [[1, p.rows, p.columns] for p in patches]


def identifier(row: dict[str, Any]) -> str:
    return "x".join(map(str, row["input_wh"]))


@pytest.mark.parametrize("row", TABLE["rows"], ids=identifier)
def test_sizes_follow_the_official_table(row: dict[str, Any]) -> None:
    first, second = plan_sizes(*row["input_wh"], TABLE["cond_image_size"])
    assert list(first) == row["after_first_resize_wh"]
    rows, columns = row["image_grid_thw"][1:]
    assert second == (columns * 14, rows * 14)
    assert rows * columns // 4 == row["merged_tokens"]


def test_a_small_row_of_the_table_is_also_cut_so() -> None:
    row = next(r for r in TABLE["rows"] if r["input_wh"] == [64, 64])
    patches = preprocess(Image.new("RGB", (64, 64)), 336)
    assert grids([patches]) == [row["image_grid_thw"]]
    assert patches.num_tokens == row["merged_tokens"]
    assert patches.pixels.shape == (patches.rows * patches.columns, 1176)


def test_limits_of_the_official_image_size() -> None:
    assert pixel_limits(336) == (TABLE["processor_min_pixels"], TABLE["processor_max_pixels"])
    assert pixel_limits(84) == (3136, 7840)
    assert pixel_limits(56) == (784, 3920)


@pytest.mark.parametrize("size", [55, 28, 0, -336])
def test_too_small_an_image_size_is_refused(size: int) -> None:
    with goldens.refused(f"image_size is {size}", "at least 56", "336"):
        preprocess(Image.new("RGB", (64, 64)), size)


@pytest.mark.parametrize("case", goldens.CASES)
def test_golden_pixels_at_84(case: str) -> None:
    wanted = goldens.description()["cases"][case]
    pictures = goldens.pictures(case)
    firsts = [plan_sizes(*p.size, goldens.IMAGE_SIZE)[0] for p in pictures]
    assert [list(f) for f in firsts] == wanted["first_resize_wh"]
    patches = [preprocess(p, goldens.IMAGE_SIZE) for p in pictures]
    assert grids(patches) == wanted["image_grid_thw"]
    assert grids(patches) == goldens.expected()[f"{case}.image_grid_thw"].tolist()
    assert checksum(patches) == wanted["pixel_values"]["sha256_f32_le"]


@pytest.mark.parametrize("case", goldens.CASES)
def test_golden_pixels_at_336(case: str) -> None:
    patches = [preprocess(p) for p in goldens.pictures(case)]
    assert grids(patches) == CASES_336[case]["image_grid_thw"]
    assert checksum(patches) == CASES_336[case]["pixel_values"]["sha256_f32_le"]


def test_golden_pixels_number_by_number() -> None:
    patches = [preprocess(p, 84) for p in goldens.pictures("four_refs_prompt")]
    wanted = goldens.expected()["four_refs_prompt.pixel_values"]
    assert torch.equal(torch.cat([p.pixels for p in patches]), wanted)


def test_black_picture_is_the_official_one() -> None:
    assert (
        checksum([preprocess(black_picture())])
        == (CASES_336["uncond_black"]["pixel_values"]["sha256_f32_le"])
    )


def test_both_temporal_frames_are_the_same() -> None:
    patches = preprocess(goldens.pictures("one_ref_prompt")[0], 84)
    frames = patches.pixels.unflatten(1, (3, 2, 14, 14))
    assert torch.equal(frames[:, :, 0], frames[:, :, 1])
    assert float(frames.std()) > 0.1


def test_patches_come_in_blocks_of_two_by_two() -> None:
    """A picture whose patches each have one grey says where every patch went."""
    picture = Image.new("RGB", (84, 84))
    for row in range(6):
        for column in range(6):
            grey = 6 * row + column
            picture.paste(
                (grey, grey, grey), (14 * column, 14 * row, 14 * column + 14, 14 * row + 14)
            )
    levels = preprocess(picture, 84).pixels.unflatten(1, (3, 2, 14, 14))[:, 0, 0, 7, 7]
    found = (levels * 0.26862954 + 0.48145466) * 255
    assert found.round().int()[:8].tolist() == [0, 1, 6, 7, 2, 3, 8, 9]


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 145)])
def test_tiny_pictures_are_read(size: tuple[int, int]) -> None:
    patches = preprocess(Image.new("RGB", size, "red"), 336)
    assert patches.pixels.isfinite().all()
    low, high = pixel_limits(336)
    assert low <= patches.rows * patches.columns * 196 <= high


@pytest.mark.parametrize("size", [(201, 1), (1, 201), (10050, 50)])
def test_aspect_ratio_over_200_is_refused(size: tuple[int, int]) -> None:
    with goldens.refused(f"{size[0]}x{size[1]}", "aspect ratio of 201", "200", "Crop it"):
        preprocess(Image.new("RGB", size))


@pytest.mark.parametrize("size", [(4480, 28), (28, 4480)])
def test_a_short_side_never_shrinks_below_one_token(size: tuple[int, int]) -> None:
    patches = preprocess(Image.new("RGB", size), 336)
    assert min(patches.rows, patches.columns) == 2
    assert max(patches.rows, patches.columns) > 100


def test_longest_picture_that_can_be_read() -> None:
    _, (width, height) = plan_sizes(4000, 28, 336)
    assert height == 28
    assert width > 100 * height


def test_a_picture_without_pixels_is_refused() -> None:
    with goldens.refused("0x5", "no pixels"):
        preprocess(Image.new("RGB", (0, 5)))


def test_a_refused_picture_is_named_within_its_group() -> None:
    good = Reference(Image.new("RGB", (64, 64)), name="reference 1")
    bad = Reference(Image.new("RGB", (500, 2)), name="reference 2")
    with goldens.refused("reference 2: the picture is 500x2"):
        plan_images([good, bad], 336)


@pytest.mark.parametrize("size", [(512, 512), (333, 120), (56, 2000), (3000, 4000), (1, 1)])
def test_resized_size_keeps_its_promises(size: tuple[int, int]) -> None:
    low, high = pixel_limits(336)
    width, height = resized_size(*size, low, high)
    assert width % 28 == height % 28 == 0
    assert low <= width * height <= high


@pytest.mark.parametrize("image_size", [84, 336])
@pytest.mark.parametrize("size", [(900, 700), (333, 1200), (4000, 30), (90, 91), (1, 1)])
def test_a_reduced_picture_becomes_the_same_patches(size: tuple[int, int], image_size: int) -> None:
    picture = Image.effect_noise(size, 90).convert("RGB")
    small = reduced(picture, image_size)
    assert small.width * small.height <= size[0] * size[1]
    found, wanted = preprocess(small, image_size), preprocess(picture, image_size)
    assert (found.rows, found.columns) == (wanted.rows, wanted.columns)
    assert torch.equal(found.pixels, wanted.pixels)


def test_a_photograph_is_reduced() -> None:
    assert max(reduced(Image.new("RGB", (4000, 3000)), 336).size) == 364


@pytest.mark.parametrize("size", [(96, 96), (333, 120), (10, 300), (1, 1)])
def test_image_tokens_follow_from_the_size_alone(size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size)
    (planned,) = plan_images([Reference(picture)], 336)
    assert planned.num_tokens == preprocess(picture, 336).num_tokens
