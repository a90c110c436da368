"""The gallery's text: what is read, and the sentence for what is not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from easyref_core.errors import EasyRefError
from easyref_core.pictures.gallery import GalleryPicture, crop_pixels, parse_gallery


def gallery(*pictures: Any, version: Any = 1) -> str:
    return json.dumps({"version": version, "pictures": list(pictures)})


def refusal(text: str) -> str:
    with pytest.raises(EasyRefError) as caught:
        parse_gallery(text)
    message = str(caught.value)
    assert message.endswith(".")
    return message


def test_file_weight_and_crop_are_read_in_order() -> None:
    name = "people/ann 'the 1st' \"x\" ü 图.png"
    text = gallery(
        {"file": name, "weight": 0.5, "crop": [0.25, 0, 0.5, 1]},
        {"file": "b.png"},
        {"file": "b.png", "weight": 0},
    )
    assert parse_gallery(text) == (
        GalleryPicture(name, 0.5, (0.25, 0.0, 0.5, 1.0)),
        GalleryPicture("b.png"),
        GalleryPicture("b.png", 0.0),
    )


@pytest.mark.parametrize("text", ["", " \n ", gallery()])
def test_no_pictures(text: str) -> None:
    assert parse_gallery(text) == ()


def test_weight_and_crop_have_defaults_and_more_is_ignored() -> None:
    text = gallery({"file": "a.png", "note": "later"}, {"file": "b.png", "crop": [0, 0, 1, 1]})
    assert parse_gallery(text) == (GalleryPicture("a.png"), GalleryPicture("b.png"))


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("a\\b.png", "a/b.png"),
        ("./a//b.png", "a/b.png"),
        ("a..b.png", "a..b.png"),
        ("a.png [input]", "a.png"),
        ("a\\b.png [output]", "a/b.png [output]"),
        ("a.png[temp]", "a.png [temp]"),
        ("[output].png", "[output].png"),
    ],
)
def test_file_names_are_tidied(file: str, wanted: str) -> None:
    (picture,) = parse_gallery(gallery({"file": file}))
    assert picture.file == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "The gallery's text cannot be read as JSON"),
        ("[" * 100_000, "is nested more than 200 levels deep"),
        ('{"version": 1} x', "cannot be read as JSON"),
        ("[]", "holds a list where an object"),
        ("null", "holds nothing where an object"),
        ("3", "holds a number where an object"),
        ('{"pictures": []}', "version is nothing"),
        (gallery(version="1"), "version is '1'"),
        (gallery(version=True), "version is true"),
        (gallery(version=0), "version is 0"),
        (gallery(version=2), "saved by a newer EasyRef (version 2"),
        ('{"version": 1}', "pictures are nothing where a list is needed"),
        ('{"version": 1, "pictures": {}}', "pictures are an object where a list is needed"),
    ],
)
def test_what_is_no_gallery_is_refused(text: str, said: str) -> None:
    assert said in refusal(text)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("a.png", "Picture 2 of the gallery is a text"),
        ({}, "has nothing as its file"),
        ({"file": " "}, "has ' ' as its file"),
        ({"file": 5}, "has 5 as its file"),
        ({"file": "../a.png"}, "leads out of ComfyUI's input folder"),
        ({"file": "a/../../b.png"}, "leads out of ComfyUI's input folder"),
        ({"file": "..\\a.png"}, "leads out of ComfyUI's input folder"),
        ({"file": "/etc/a.png"}, "leads out of ComfyUI's input folder"),
        ({"file": "\\\\server\\a.png"}, "leads out of ComfyUI's input folder"),
        ({"file": "C:\\a.png"}, "leads out of ComfyUI's input folder"),
        ({"file": "a\0.png"}, "leads out of ComfyUI's input folder"),
        ({"file": "./"}, "names a folder"),
        ({"file": "a" * 5000}, "a name of 5,000 characters"),
        ({"file": "../a.png [output]"}, "leads out of ComfyUI's output folder"),
        ({"file": " [temp]"}, "names a folder"),
        ({"file": "a\x1b.png/.."}, "'a\\x1b.png/..'"),
        (
            {"file": "a.png", "weight": -0.1},
            "('a.png'): weight is -0.1; it must be a number of 0 or more",
        ),
        ({"file": "a.png", "weight": "1"}, "('a.png'): weight is '1'"),
        ({"file": "a.png", "weight": True}, "('a.png'): weight is true"),
        ({"file": "a.png", "weight": None}, "('a.png'): weight is nothing"),
        ({"file": "a.png", "weight": float("nan")}, "('a.png'): weight is nan"),
        ({"file": "a.png", "weight": 10**400}, "('a.png'): weight is 1000"),
        ({"file": "a.png", "crop": 1}, "crop is 1; it must be four numbers"),
        ({"file": "a.png", "crop": [0, 0, 1]}, "it must be four numbers"),
        (
            {"file": "a.png", "crop": [0, 0, 1, "1"]},
            "height of crop is '1'; it must be a finite number",
        ),
        ({"file": "a.png", "crop": [0, 0, 0, 1]}, "is not a part of the picture"),
        ({"file": "a.png", "crop": [0, 0, 1, -1]}, "is not a part of the picture"),
        ({"file": "a.png", "crop": [-0.1, 0, 1, 1]}, "is not a part of the picture"),
        ({"file": "a.png", "crop": [0.5, 0, 0.6, 1]}, "is not a part of the picture"),
    ],
)
def test_what_is_no_picture_is_refused_with_its_number(entry: Any, said: str) -> None:
    message = refusal(gallery({"file": "first.png"}, entry))
    assert said in message
    assert "icture 2 of the gallery" in message


def test_a_long_value_is_shown_in_part() -> None:
    message = refusal(gallery({"file": "a.png", "crop": "x" * 10_000}))
    assert len(message) < 400


@pytest.mark.parametrize(
    ("text", "said"), [(5, "gallery is 5"), (" " * 9 + "x" * 5_000_000, "long")]
)
def test_what_is_no_text_of_usual_length_is_refused(text: Any, said: str) -> None:
    assert said in refusal(text)


def test_rounding_at_the_edge_is_no_mistake() -> None:
    (picture,) = parse_gallery(gallery({"file": "a.png", "crop": [0.7, 0, 0.3000001, 1]}))
    assert picture.crop is not None
    x, _, w, _ = picture.crop
    assert x + w <= 1


@pytest.mark.parametrize(
    ("crop", "wanted"),
    [
        ((0.25, 0.5, 0.5, 0.5), (25, 100, 75, 200)),
        ((0.0, 0.0, 1e-6, 1e-6), (0, 0, 1, 1)),
        ((0.999999, 0.999999, 1e-6, 1e-6), (99, 199, 100, 200)),
    ],
)
def test_a_crop_in_pixels_is_never_empty(crop: Any, wanted: Any) -> None:
    assert crop_pixels(crop, 100, 200) == wanted
