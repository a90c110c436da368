"""Groups from folders and from the JSON of training data, and what is left out of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from bench_fakes import make_groups, picture

from easyref_core.errors import EasyRefError
from easyref_core.evaluation.groups import ReferenceGroup
from easyref_core.evaluation.protocols import read_preset_groups
from easyref_core.evaluation.read_groups import read_groups
from easyref_core.evaluation.usable import PictureIndex, usable_groups


def read(folder: Path) -> tuple[list[ReferenceGroup], list[str]]:
    notes: list[str] = []
    return read_groups(folder, notes), notes


def usable(
    folder: Path, index: PictureIndex | None = None
) -> tuple[dict[str, list[str]], list[str]]:
    """Names of the pictures by group, and the notes."""
    groups, notes = read(folder)
    found = usable_groups(groups, "others", index or PictureIndex(), notes)
    names = {g.name: [picture.source.path.name for picture in g.pictures] for g in found}
    return names, notes


def describe(folder: Path, *lines: object) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metadata.jsonl").write_text(text)


def test_folders_are_groups_in_sorted_order_with_captions_beside(tmp_path: Path) -> None:
    make_groups(tmp_path, {"b": 2, "a": 3})
    groups, notes = read(tmp_path)
    assert [(g.name, g.split, len(g.pictures)) for g in groups] == [("a", "", 3), ("b", "", 2)]
    assert [p.source.path.name for p in groups[0].pictures] == ["0.png", "1.png", "2.png"]
    assert groups[0].pictures[2].caption == "picture 2 of a"
    assert notes == []


def test_splits_are_folders_above_the_groups(tmp_path: Path) -> None:
    make_groups(tmp_path, {"held_in/a": 2, "held_in/b": 2, "held_out/a": 2})
    groups, _ = read(tmp_path)
    assert [(g.name, g.split) for g in groups] == [
        ("held_in/a", "held_in"),  # names that occur twice are told apart
        ("b", "held_in"),
        ("held_out/a", "held_out"),
    ]


def test_a_folder_of_pictures_is_one_group(tmp_path: Path) -> None:
    make_groups(tmp_path, {"cats": 3})
    groups, _ = read(tmp_path / "cats")
    assert [(g.name, len(g.pictures)) for g in groups] == [("cats", 3)]


def test_metadata_gives_captions_licences_and_the_kind(tmp_path: Path) -> None:
    make_groups(tmp_path, {"a": 2, "b": 2})
    describe(
        tmp_path / "a",
        {"file_name": "0.png", "text": "a red ball", "licence": "CC0", "kind": "style"},
        {"file_name": "1.png", "caption": "a cube", "license": "MIT"},
    )
    describe(tmp_path, {"file_name": "b/0.png", "text": "from above"})
    (a, b), notes = read(tmp_path)
    assert [(p.caption, p.licence) for p in a.pictures] == [
        ("a red ball", "CC0"),
        ("a cube", "MIT"),
    ]
    assert (a.kind, b.kind) == ("style", "")
    assert [p.caption for p in b.pictures] == ["from above", "picture 1 of b"]
    assert notes == []


def test_metadata_marks_the_target(tmp_path: Path) -> None:
    make_groups(tmp_path, {"a": 3, "b": 2})
    describe(tmp_path / "a", {"file_name": "1.png", "target": True})
    describe(tmp_path / "b", {"file_name": "1.png", "target": "no truth value"})
    assert [group.target for group in read(tmp_path)[0]] == [1, None]


def test_lines_of_metadata_that_cannot_be_used_are_noted(tmp_path: Path) -> None:
    make_groups(tmp_path, {"a": 2})
    lines = ["{", "[]", '{"text": "no name"}', '{"file_name": "../../etc/passwd", "text": "x"}']
    lines += ['{"file_name": "0.png", "text": 5}', '{"file_name": "1.png", "text": "\\ud800"}']
    (tmp_path / "a" / "metadata.jsonl").write_text("\n".join(lines))
    (group,), notes = read(tmp_path)
    assert [p.caption for p in group.pictures] == ["picture 0 of a", "picture 1 of a"]
    assert len(notes) == 1
    assert "6 of 6 lines cannot be used; the first: Line 1 cannot be read as JSON" in notes[0]


def test_training_data_is_groups_with_fixed_targets(tmp_path: Path) -> None:
    for number in range(4):
        picture(tmp_path / "pictures" / f"{number}.png", number)
    names = [f"pictures/{number}.png" for number in range(4)]
    records = [
        {"image_file": names[1:3], "text": ["a ball", "another"], "target": names[0]},
        {"image_file": [], "text": "no reference", "target": names[1]},
    ]
    (tmp_path / "held_out.json").write_text(json.dumps(records))
    (group,), notes = read(tmp_path)
    assert (group.name, group.split, group.target) == ("held_out-0", "held_out", 0)
    assert [p.source.path.name for p in group.pictures] == ["0.png", "1.png", "2.png"]
    assert group.pictures[0].caption == "a ball"
    assert "1 of 2 records cannot be used; the first" in notes[0]
    (same,), _ = read(tmp_path / "held_out.json")
    assert same == group


def test_a_tar_shard_is_refused(tmp_path: Path) -> None:
    make_groups(tmp_path / "groups", {"a": 2})
    shard = shutil.make_archive(str(tmp_path / "data"), "tar", tmp_path / "groups")
    with pytest.raises(EasyRefError, match="Unpack it"):
        read(Path(shard))


def test_a_group_of_one_and_an_empty_one_are_left_out(tmp_path: Path) -> None:
    make_groups(tmp_path, {"alone": 1, "empty": 0, "good": 2})
    names, notes = usable(tmp_path)
    assert list(names) == ["good"]
    assert notes == [
        "Groups that hold no pictures that can be read, and are left out: 'empty'.",
        "Groups that hold a single picture, which leaves no reference, and are left out: 'alone'.",
    ]


def test_nothing_usable_is_refused(tmp_path: Path) -> None:
    make_groups(tmp_path, {"alone": 1, "empty": 0})
    with pytest.raises(EasyRefError, match=r"None of the 2 groups can be used.*'alone'.*needs at"):
        usable(tmp_path)


def test_pictures_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    make_groups(tmp_path, {"a": 3})
    path = tmp_path / "a" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "a" / "circle.png").symlink_to("circle.png")
    names, notes = usable(tmp_path)
    assert names == {"a": ["0.png", "2.png"]}
    assert len(notes) == 1
    assert "1.png" in notes[0]


def test_a_picture_that_shows_the_same_as_another_is_left_out(tmp_path: Path) -> None:
    from PIL import Image

    make_groups(tmp_path, {"a": 3})
    Image.open(tmp_path / "a" / "0.png").save(tmp_path / "a" / "copy.bmp")  # other bytes
    names, notes = usable(tmp_path)
    assert names == {"a": ["0.png", "1.png", "2.png"]}
    assert notes == ["Group 'a': 'copy.bmp' shows the same as '0.png' and is left out."]


def test_a_duplicate_of_a_fixed_target_is_no_reference(tmp_path: Path) -> None:
    for number in range(3):
        picture(tmp_path / f"{number}.png", number)
    shutil.copy(tmp_path / "2.png", tmp_path / "1.png")
    record = {"image_file": ["0.png", "1.png"], "text": "a ball", "target": "2.png"}
    (tmp_path / "held_in.json").write_text(json.dumps([record]))
    groups, notes = read(tmp_path)
    (group,) = usable_groups(groups, "others", PictureIndex(), notes)
    assert [p.source.path.name for p in group.pictures] == ["2.png", "0.png"]
    assert group.target == 0
    assert "'1.png' shows the same as '2.png'" in notes[0]


def test_missing_captions_are_noted(tmp_path: Path) -> None:
    make_groups(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "b" / "0.txt").unlink()
    names, notes = usable(tmp_path)
    assert list(names) == ["a", "b"]
    assert "have pictures without a caption; they are prompted with nothing: 'b'." in notes[0]


def test_links_and_odd_names_are_read(tmp_path: Path) -> None:
    make_groups(tmp_path / "real", {"a": 2})
    (tmp_path / "groups").mkdir()
    (tmp_path / "groups" / "link \x1b[31m").symlink_to(tmp_path / "real" / "a")
    odd = os.fsdecode(b"\xff\xfe.png")
    shutil.copy(picture(tmp_path / "other.png", 77), tmp_path / "real" / "a" / odd)
    names, _ = usable(tmp_path / "groups")
    assert names == {"link \x1b[31m": ["0.png", "1.png", odd]}


def test_pixels_are_decoded_once_and_changes_are_seen(tmp_path: Path) -> None:
    make_groups(tmp_path / "groups", {"a": 3})
    index = PictureIndex(tmp_path / "index.json")
    usable(tmp_path / "groups", index)
    index.save()
    again = PictureIndex(tmp_path / "index.json")
    path = tmp_path / "groups" / "a" / "1.png"
    os.utime(path, (1, 1))  # decoded again, but the same
    usable(tmp_path / "groups", again)
    assert again.changed == []
    picture(path, 99)
    usable(tmp_path / "groups", again)
    assert again.changed == [f"the picture {path}"]


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}'])
def test_a_damaged_index_is_made_again(tmp_path: Path, content: str) -> None:
    make_groups(tmp_path / "groups", {"a": 3})
    (tmp_path / "index.json").write_text(content)
    index = PictureIndex(tmp_path / "index.json")
    assert len(usable(tmp_path / "groups", index)[0]["a"]) == 3


def test_a_folder_without_groups_says_what_is_expected_and_where_it_is(tmp_path: Path) -> None:
    for name, said in (
        ("mrbench", "not published: name any folder of groups; easyref build-groups"),
        ("coco", "cocodataset.org"),
        ("dreambooth", "google/dreambooth on GitHub"),
        ("multibanana", "kohsei/MultiBanana-Benchmark"),
        ("group-size", "expects DIR/GROUP"),
    ):
        for folder in (tmp_path, tmp_path / "missing"):
            with pytest.raises(EasyRefError, match=said):
                read_preset_groups(name, folder, [])
