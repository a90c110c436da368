"""Which pictures make a group, which are left out, which groups are held out."""

from __future__ import annotations

import io
from itertools import combinations
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from easyref_core.evaluation.building import grouping
from easyref_core.evaluation.building.tagged_pictures import Tag, TaggedPicture


def tagged(*tags: str, folder: str = "", group: str = "") -> TaggedPicture:
    return TaggedPicture(
        Path("x.png"),
        "x.png",
        tags=tuple(map(Tag, tags)),
        folder=Tag(folder) if folder else None,
        group=Tag(group) if group else None,
    )


def unit(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows), dim=1)


def drawing(seed: int, side: int = 96) -> Image.Image:
    picture = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(picture)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(6):
        x, y, r, red, green, blue = torch.randint(0, 96, (6,), generator=generator).tolist()
        box = [v * side / 96 for v in (x - r / 3, y - r / 3, x + r / 3, y + r / 3)]
        draw.ellipse(box, fill=(2 * red, 2 * green, 2 * blue))
    return picture


def test_a_picture_belongs_to_the_tag_that_fewest_carry() -> None:
    pictures = [*[tagged("girl", "ana")] * 2, *[tagged("girl", "bo")] * 3, *[tagged("sky")] * 6]
    groups = grouping.by_tag(pictures, least=2)
    assert groups == {
        Tag("ana"): [0, 1],
        Tag("bo"): [2, 3, 4],
    }  # on more than half of all, "sky" says nothing


def test_a_group_is_said_before_a_folder_and_a_folder_before_tags() -> None:
    pictures = [tagged("a", folder="f", group="g"), tagged("a", folder="f"), tagged("a")]
    pictures += [tagged("a"), tagged(), tagged(), tagged(), tagged()]
    groups = grouping.by_tag(pictures, least=2)
    assert groups == {Tag("a"): [2, 3], Tag("f"): [1], Tag("g"): [0]}


def test_a_list_chooses_the_tags_and_names_their_kind() -> None:
    pictures = [tagged("cat", "noto", folder="f"), tagged("dog", "noto"), tagged("cat", "other")]
    assert grouping.by_tag(pictures, 2, [Tag("noto", "style")]) == {Tag("noto", "style"): [0, 1]}
    assert grouping.by_tag(pictures, 2, [Tag("cat")]) == {Tag("cat"): [0, 2]}


def as_jpeg(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return Image.open(file).convert("RGB")


def test_copies_are_found_as_jpeg_and_in_another_size() -> None:
    first, other = drawing(0), drawing(1)
    pictures = [first, other, as_jpeg(first), other.resize((57, 57), Image.Resampling.BICUBIC)]
    thumbnails = torch.stack([grouping.thumbnail(picture) for picture in pictures])
    assert grouping.same_pixels(thumbnails) == {2: 0, 3: 1}


def test_a_small_change_of_a_drawing_is_no_copy() -> None:
    first, changed = drawing(0), drawing(0)
    ImageDraw.Draw(changed).ellipse((40, 40, 46, 46), fill="black")
    thumbnails = torch.stack([grouping.thumbnail(picture) for picture in (first, changed)])
    assert grouping.same_pixels(thumbnails) == {}


@pytest.mark.parametrize("rows", [1, 2, 3, 1024])
def test_of_nearly_equal_pictures_the_first_stays(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouping, "_ROWS", rows)
    embeddings = unit((1, 0, 0), (0, 1, 0), (1, 0.01, 0), (0, 1, 0.01), (1, 0, 0.01), (0, 0, 1))
    assert grouping.near_duplicates(embeddings, 0.99) == {2: 0, 3: 1, 4: 0}


def test_what_is_like_a_left_out_picture_alone_stays() -> None:
    # 0 and 1 are alike, 1 and 2 are alike, 0 and 2 are not.
    angles = torch.tensor([0.0, 0.3, 0.6])
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert grouping.near_duplicates(embeddings, 0.95) == {1: 0}


def test_the_picture_unlike_its_group_is_left_out() -> None:
    embeddings = unit((1, 0.1, 0), (0, 0, 1), (1, -0.1, 0), (1, 0, 0.1))
    assert grouping.outliers(embeddings, 0.5) == [1]
    assert grouping.outliers(embeddings, -1) == []


def test_another_persons_face_is_left_out() -> None:
    faces = torch.tensor([[0.0, 0.0], [0.1, 0.0], [3.0, 3.0], [0.0, 0.1]])
    assert grouping.strangers(faces, 0.6) == [2]
    assert grouping.strangers(faces[:2], 0.05) != []


def test_mean_similarity_is_that_of_all_pairs() -> None:
    embeddings = torch.nn.functional.normalize(
        torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), dim=1
    )
    pairs = [float(a @ b) for a, b in combinations(embeddings, 2)]
    assert grouping.mean_similarity(embeddings) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_a_share_of_each_kind_is_held_out() -> None:
    tags = [Tag(f"s{n}", "style") for n in range(8)] + [Tag(f"c{n}", "character") for n in range(4)]
    chosen = grouping.held_out(tags, 0.25, seed=0)
    assert sorted(tag.kind for tag in chosen) == ["character", "style", "style"]
    assert chosen == grouping.held_out(tags[::-1], 0.25, seed=0)
    assert len({frozenset(grouping.held_out(tags, 0.25, seed)) for seed in range(10)}) > 5


def test_both_splits_get_a_group_of_each_kind_with_two() -> None:
    tags = [Tag("a"), Tag("b")]
    assert len(grouping.held_out(tags, 0.01, 0)) == 1
    assert len(grouping.held_out(tags, 0.99, 0)) == 1
    assert grouping.held_out(tags, 0.0, 0) == set()
    assert grouping.held_out(tags, 1.0, 0) == set(tags)
    assert grouping.held_out(tags[:1], 0.25, 0) == set()
