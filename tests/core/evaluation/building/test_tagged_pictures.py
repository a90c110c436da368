"""What is known of pictures: from metadata, text files and folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from easyref_core.errors import EasyRefError
from easyref_core.evaluation.building.tagged_pictures import (
    Tag,
    TaggedPicture,
    read_tag_list,
    read_tagged,
    tag_of,
)


def save(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)
    return path


def described(folder: Path, *rows: dict[str, Any] | str) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def only(folder: Path) -> TaggedPicture:
    found = read_tagged(folder)
    assert found.problems == []
    (picture,) = found.pictures
    return picture


def test_a_line_of_metadata_describes_a_picture(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    row = {"file_name": "a.png", "text": "on a  beach", "tags": ["Style: Ukiyo-e", "blue_hair"]}
    described(tmp_path, row | {"license": "CC0-1.0", "source": "an archive", "group": "Ana"})
    picture = only(tmp_path)
    assert picture.text == "on a beach"
    assert picture.tags == (Tag("ukiyo-e", "style"), Tag("blue hair"))
    assert (picture.licence, picture.source, picture.group) == ("CC0-1.0", "an archive", Tag("ana"))


def test_both_spellings_of_licence_are_read_and_tags_in_one_text(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    row = {"file_name": "a.png", "licence": "MIT", "tags": "cat, dog,,cat"}
    described(tmp_path, row | {"group": "x", "kind": "style"})
    picture = only(tmp_path)
    assert picture.licence == "MIT"
    assert picture.tags == (Tag("cat"), Tag("dog"))
    assert picture.group == Tag("x", "style")


@pytest.mark.parametrize(
    ("text", "caption", "tags"),
    [
        ("1girl, blue_hair, smile", "", ("1girl", "blue hair", "smile")),
        ("a cat on a beach", "a cat on a beach", ()),
        ("A cat, which sleeps. A dog.", "A cat, which sleeps. A dog.", ()),
        ("", "", ()),
    ],
)
def test_a_text_file_is_a_caption_or_a_list_of_tags(
    tmp_path: Path, text: str, caption: str, tags: tuple[str, ...]
) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(text)
    picture = only(tmp_path)
    assert (picture.text, [tag.name for tag in picture.tags]) == (caption, list(tags))


def test_folders_are_tags_unless_there_is_only_one(tmp_path: Path) -> None:
    save(tmp_path / "all" / "a.png")
    assert only(tmp_path).folder is None
    save(tmp_path / "Style: Red" / "b.png")
    folders = {picture.name: picture.folder for picture in read_tagged(tmp_path).pictures}
    assert folders == {"all/a.png": Tag("all"), "Style: Red/b.png": Tag("red", "style")}


def test_metadata_further_up_says_the_last_word(tmp_path: Path) -> None:
    save(tmp_path / "x" / "a.png")
    described(tmp_path / "x", {"file_name": "a.png", "text": "below", "tags": ["kept"]})
    described(tmp_path, {"file_name": "x/a.png", "text": "above"})
    picture = only(tmp_path)
    assert (picture.text, picture.tags) == ("above", (Tag("kept"),))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "no JSON object"),
        ("{x}", "cannot be read as JSON"),
        ("[1]", "no JSON object"),
        ({"file_name": "none.png"}, "no picture 'none.png'"),
        ({"file_name": "../a.png"}, "outside"),
        ({"text": "x"}, "a file name is needed"),
        ({"file_name": "a.png", "text": 3}, "text is 3"),
        ({"file_name": "a.png", "tags": 3}, "tags is 3"),
        ({"file_name": "a.png", "tags": ["x", 3]}, "tags is a list"),
        ('{"file_name": "a.png", "text": "\\ud800"}', "no Unicode"),
        ({"file_name": "a.png", "text": "x" * 20_000}, "longer than"),
    ],
)
def test_a_line_that_cannot_be_used_is_named_and_the_others_count(
    tmp_path: Path, row: dict[str, Any] | str, said: str
) -> None:
    save(tmp_path / "a.png")
    described(tmp_path, row, {"file_name": "a.png", "text": "used"})
    found = read_tagged(tmp_path)
    (problem,) = found.problems
    assert said in problem
    assert [picture.text for picture in found.pictures] == ["used"]


def test_files_that_are_no_pictures_and_hidden_ones_are_passed_over(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    save(tmp_path / ".hidden.png")
    save(tmp_path / ".git" / "b.png")
    (tmp_path / "notes.md").write_text("notes")
    assert only(tmp_path).name == "a.png"


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EasyRefError, match="no picture in"):
        read_tagged(tmp_path)
    with pytest.raises(EasyRefError, match="no folder"):
        read_tagged(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("  Hatsune_Miku ", Tag("hatsune miku")),
        ("character:hatsune_miku", Tag("hatsune miku", "character")),
        ("rating:safe", Tag("rating:safe")),
        (" ", None),
        ("x" * 300, None),
    ],
)
def test_what_a_tag_stands_for(text: str, tag: Tag | None) -> None:
    assert tag_of(text) == tag


def test_a_list_of_tags(tmp_path: Path) -> None:
    file = tmp_path / "tags.txt"
    file.write_text("# styles\nstyle: Ukiyo-e\n\nstyle: ukiyo-e\ncat\n")
    assert read_tag_list(file) == [Tag("ukiyo-e", "style"), Tag("cat")]
    file.write_text("# nothing\n")
    with pytest.raises(EasyRefError, match="no tag in"):
        read_tag_list(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(EasyRefError, match="UTF-8"):
        read_tag_list(file)
