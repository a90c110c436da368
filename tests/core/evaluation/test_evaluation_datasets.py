"""Published data sets in their own layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_fakes import make_groups, picture

from easyref_core.errors import EasyRefError
from easyref_core.evaluation.protocols import read_preset_groups
from easyref_core.evaluation.read_datasets import read_coco, read_dreambooth, read_multibanana

PROMPTS = """Classes

subject_name,class
backpack,backpack
bear_plushie,stuffed animal
dog2,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token)
]
"""


def test_dreambooths_prompts_are_those_of_the_subjects_class(tmp_path: Path) -> None:
    make_groups(tmp_path / "dataset", {"bear_plushie": 2, "dog2": 3, "unknown": 2})
    (tmp_path / "dataset" / "prompts_and_classes.txt").write_text(PROMPTS)
    notes: list[str] = []
    bear, dog = read_dreambooth(tmp_path, notes)  # the repository, or its folder
    assert bear.prompts == ("a stuffed animal in the jungle", "a cube shaped stuffed animal")
    assert (dog.prompts, dog.kind) == (("a dog wearing a red hat",), "live")
    assert (bear.kind, bear.target, len(dog.pictures)) == ("object", None, 3)
    assert notes == ["prompts_and_classes.txt names no class for 'unknown'; it is left out."]


@pytest.mark.parametrize("text", ["", "Classes", PROMPTS.partition("Live")[0]])
def test_a_list_without_classes_or_prompts_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "prompts_and_classes.txt").write_text(text)
    with pytest.raises(EasyRefError, match="names no classes, or no prompts"):
        read_dreambooth(tmp_path, [])


def make_coco(folder: Path) -> None:
    picture(folder / "val2017" / "000000000007.jpg", 7)
    picture(folder / "val2017" / "000000000003.jpg", 3)
    content = {
        "licenses": [{"id": 4, "name": "Attribution License"}],
        "images": [
            {"id": 7, "file_name": "000000000007.jpg", "license": 4},
            {"id": 3, "file_name": "000000000003.jpg", "license": 9},
            {"id": 5, "file_name": "000000000005.jpg", "license": 4},
        ],
        "annotations": [
            {"image_id": 7, "caption": "A cat. "},
            {"image_id": 7, "caption": "Another text."},
            {"image_id": 3, "caption": "A dog."},
            {"image_id": 5, "caption": "Its picture is missing."},
        ],
    }
    (folder / "annotations").mkdir()
    (folder / "annotations" / "captions_val2017.json").write_text(json.dumps(content))


def test_coco_is_a_group_for_each_picture_which_is_its_own_target(tmp_path: Path) -> None:
    make_coco(tmp_path)
    notes: list[str] = []
    groups = read_coco(tmp_path, notes)
    assert [(g.name, g.target) for g in groups] == [("000000000003", 0), ("000000000007", 0)]
    assert [p.caption for g in groups for p in g.pictures] == ["A dog.", "A cat."]
    assert [p.licence for g in groups for p in g.pictures] == ["", "Attribution License"]
    assert notes[0].startswith("1 pictures of ")


def test_any_folder_of_captioned_pictures_serves_as_coco(tmp_path: Path) -> None:
    make_groups(tmp_path, {"flat": 2})
    groups = read_coco(tmp_path / "flat", [])
    assert [(g.name, g.pictures[0].caption) for g in groups] == [
        ("0.png", "picture 0 of flat"),
        ("1.png", "picture 1 of flat"),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "holds no annotations"),
        ('{"images": 5}', "There are no groups"),
        ('{"images": [1, {"id": [], "file_name": "../x"}]}', "outside the folder"),
    ],
)
def test_annotations_of_other_content_are_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "captions_val2017.json").write_text(content)
    with pytest.raises(EasyRefError, match=said):
        read_preset_groups("coco", tmp_path, [])


def test_multibananas_sets_are_groups_with_their_instruction(tmp_path: Path) -> None:
    for name in ("006_0", "006_1", "006_10", "006_2", "014_0", "020_0"):
        picture(tmp_path / "data" / "3_back" / f"{name}.jpg", len(name))
    (tmp_path / "data" / "3_back" / "006_prompt.txt").write_text("put them together\n")
    (tmp_path / "data" / "3_back" / "014_prompt.txt").write_bytes(b"\xff\xfe")
    picture(tmp_path / "data" / "3_back" / "006_generated.jpg", 1)
    notes: list[str] = []
    (group,) = read_multibanana(tmp_path, notes)
    assert (group.name, group.kind, group.prompts) == (
        "3_back/006",
        "3_back",
        ("put them together",),
    )
    names = [p.source.path.stem for p in group.pictures]
    assert names == ["006_0", "006_1", "006_2", "006_10"]
    assert [note.partition(" is left")[0] for note in notes] == [
        "The set '3_back/014'",
        "The set '3_back/020'",
    ]
