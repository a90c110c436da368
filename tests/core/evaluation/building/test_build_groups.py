"""From a folder of tagged pictures to groups on the disk."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from score_models import write_clip

from easyref_core.cli import main
from easyref_core.errors import EasyRefError
from easyref_core.evaluation.building import group_files
from easyref_core.evaluation.building.build_groups import BuildOptions, BuildReport, build_groups
from easyref_core.evaluation.read_groups import read_groups
from workshop.demo.dataset.files import DatasetOptions, draw_group

COLOURS = {"red": (1.0, 0, 0), "green": (0, 1.0, 0), "blue": (0, 0, 1.0)}


class ColourEncoder:
    """Embeds a picture as its mean colour, and the name of a colour as that colour."""

    def picture(self, image: Image.Image) -> torch.Tensor:
        pixel = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
        return torch.nn.functional.normalize(torch.tensor(pixel).float(), dim=0)

    def text(self, text: str) -> torch.Tensor:
        return torch.tensor(COLOURS[text])


class CornerFaces:
    """Takes the colour of the upper left corner for a face, unless it is white."""

    same_person = 0.6

    def embed_face(self, picture: Image.Image) -> torch.Tensor | None:
        corner = torch.tensor(picture.getpixel((0, 0))) / 255
        return None if corner.min() > 0.9 else corner


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of each of eight drawn characters and styles, with captions of the scenes."""
    folder = tmp_path_factory.mktemp("drawn")
    for number in range(8):
        kind, images = draw_group(DatasetOptions(side=64, pictures=5), "held_out", number)
        place = folder / f"{'style' if kind == 'style' else 'character'}: number {number}"
        place.mkdir()
        for index, image in enumerate(images):
            image.picture.save(place / f"{index}.png")
            (place / f"{index}.txt").write_text(image.caption)
    return folder


def gradient(path: Path, colour: Sequence[float], number: int, corner: Any = None) -> None:
    """A picture of nearly one colour, each number with another stroke."""
    picture = Image.new("RGB", (64, 64), tuple(round(255 * value) for value in colour))
    picture.paste("black", (4 * number, 40, 4 * number + 4, 60))
    if corner is not None:
        picture.paste(corner, (0, 0, 8, 8))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def colours(folder: Path) -> Path:
    for name, colour in COLOURS.items():
        for number in range(5):
            gradient(folder / name / f"{number}.png", colour, number)
    return folder


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def reasons(report: BuildReport) -> dict[str, str]:
    return {out.picture: out.reason for out in report.left_out}


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_drawn_characters_and_styles_become_groups_of_both_splits(
    drawn: Path, tmp_path: Path
) -> None:
    report = build_groups(BuildOptions(drawn, tmp_path / "out", licence="CC0-1.0"))
    rows = table(tmp_path / "out" / "groups.csv")
    assert report.left_out == []
    assert {(row["kind"], row["split"]) for row in rows} == {
        *(("character", "held_in"), ("character", "held_out"), ("style", "held_in"))
    }
    for row in rows:
        folder = tmp_path / "out" / row["split"] / row["group"]
        lines = (folder / "metadata.jsonl").read_text().splitlines()
        assert (row["pictures"], row["licences"], row["left_out"]) == ("5", "CC0-1.0", "0")
        for line in map(json.loads, lines):
            original = drawn / line["original"]
            assert line["text"] == original.with_suffix(".txt").read_text()
            assert (line["licence"], line["kind"]) == ("CC0-1.0", row["kind"])
            assert (folder / line["file_name"]).read_bytes() == original.read_bytes()


def test_a_benchmark_reads_the_groups(drawn: Path, tmp_path: Path) -> None:
    report = build_groups(BuildOptions(drawn, tmp_path / "out", licence="CC0-1.0"))
    notes: list[str] = []
    groups = read_groups(tmp_path / "out", notes)
    assert notes == []
    assert len(groups) == len(report.groups)
    for group, built in zip(
        sorted(groups, key=lambda group: group.name),
        sorted(report.groups, key=lambda built: built.tag.name),
        strict=True,
    ):
        assert (group.split, group.kind) == (built.split, built.tag.kind)
        found = [(picture.caption, picture.licence) for picture in group.pictures]
        assert found == [(picture.text, "CC0-1.0") for picture in built.pictures]


@pytest.mark.slow
def test_the_command_builds_with_clip(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = write_clip(tmp_path / "clip")
    command = ["build-groups", str(drawn), "--out", str(tmp_path / "out"), "--like-tag", "-1"]
    command += ["--duplicate", "1.01", "--like-group", "-1", "--licence", "CC0-1.0"]
    assert main([*command, "--clip", str(clip)]) == 0
    said = capsys.readouterr()
    assert "held_out: 2 groups, 10 pictures" in said.out
    assert "No CLIP" not in said.out
    rows = table(tmp_path / "out" / "groups.csv")
    assert all(0 < float(row["similarity"]) < 1 for row in rows)
    assert len({row["similarity"] for row in rows}) == len(rows)
    assert main(command) == 1
    assert "not empty" in capsys.readouterr().err


def test_a_clip_that_is_missing_is_named_before_pictures_are_read(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build-groups", str(drawn), "--out", str(tmp_path / "out"), "--offline"]
    for option in ("--clip", "--faces"):
        assert main([*command, option, str(tmp_path / "none")]) == 1
        assert "There is no" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_same_pictures_give_the_same_files(drawn: Path, tmp_path: Path) -> None:
    options = BuildOptions(drawn, tmp_path / "a", seed=3)
    build_groups(options)
    build_groups(replace(options, out=tmp_path / "b"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    build_groups(replace(options, out=tmp_path / "c", seed=4))
    assert contents(tmp_path / "a").keys() != contents(tmp_path / "c").keys()


def test_copies_are_left_out_and_counted_also_those_of_other_groups(tmp_path: Path) -> None:
    folder = colours(tmp_path / "in")
    with Image.open(folder / "red" / "0.png") as picture:
        picture.save(folder / "red" / "smaller.jpg")
        picture.resize((200, 200)).save(folder / "green" / "larger.png")
    report = build_groups(BuildOptions(folder, tmp_path / "out"))
    # The larger one stays, in the group where it is.
    assert reasons(report) == {
        "red/0.png": "nearly the same pixels as another",
        "red/smaller.jpg": "nearly the same pixels as another",
    }
    assert {row["detail"] for row in table(tmp_path / "out" / "left_out.csv")} == {
        "green/larger.png"
    }
    assert "left out: 2 nearly the same pixels as another" in str(report)
    counts = {row["group"]: row["left_out"] for row in table(tmp_path / "out" / "groups.csv")}
    assert counts == {"red": "2", "green": "0", "blue": "0"}


def test_an_encoder_leaves_out_what_is_unlike_its_tag_or_its_group(tmp_path: Path) -> None:
    folder = colours(tmp_path / "in")
    gradient(folder / "red" / "blue.png", COLOURS["blue"], 9)
    gradient(folder / "red" / "yellow.png", (1, 1, 0), 9)
    options = BuildOptions(folder, tmp_path / "out", duplicate=1.01, like_group=0.9)
    report = build_groups(options, ColourEncoder())
    assert reasons(report) == {
        "red/blue.png": "unlike its tag",
        "red/yellow.png": "unlike its group",
    }
    rows = {row["group"]: row for row in table(tmp_path / "out" / "groups.csv")}
    assert float(rows["red"]["similarity"]) > 0.999
    assert "No CLIP" not in str(report)


def test_what_an_encoder_takes_for_the_same_is_left_out(tmp_path: Path) -> None:
    folder = colours(tmp_path / "in")
    with pytest.raises(EasyRefError, match="left out: 12 nearly the same as another") as error:
        build_groups(BuildOptions(folder, tmp_path / "out", duplicate=0.999), ColourEncoder())
    assert "No group of 4 or more" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_strangers_are_left_out_where_most_pictures_show_a_face(tmp_path: Path) -> None:
    folder = colours(tmp_path / "in")
    for number in range(5):
        gradient(folder / "ana" / f"{number}.png", (1, 1, 1), number, corner=(200, 150, 5 * number))
    gradient(folder / "ana" / "bo.png", (1, 1, 1), 8, corner=(0, 10, 200))
    gradient(folder / "ana" / "tree.png", (1, 1, 1), 9)
    for number in range(4):  # a style, of which one picture shows a face
        gradient(folder / "style: ink" / f"{number}.png", (0.95, 1, 1), number + 4)
    gradient(folder / "style: ink" / "face.png", (0.95, 1, 1), 9, corner=(0, 0, 0))
    report = build_groups(BuildOptions(folder, tmp_path / "out"), faces=CornerFaces())
    assert reasons(report) == {
        "ana/bo.png": "with another face",
        "ana/tree.png": "without a face",
    }


def test_what_cannot_be_read_or_has_no_tag_is_left_out(tmp_path: Path) -> None:
    folder = colours(tmp_path / "in")
    damaged = (folder / "red" / "0.png").read_bytes()[:60]
    (folder / "red" / "damaged.png").write_bytes(damaged)
    gradient(folder / "alone.png", (0, 0, 0), 0)
    for number in range(2):
        gradient(folder / "pair" / f"{number}.png", (0.5, 0.5, 0.5), number)
    report = build_groups(BuildOptions(folder, tmp_path / "out"))
    assert reasons(report) == {
        "alone.png": "without a tag that makes a group",
        "pair/0.png": "of too small a group",
        "pair/1.png": "of too small a group",
        "red/damaged.png": "unreadable",
    }
    assert "No CLIP was named" in str(report)


def test_captions_are_the_tags_that_are_not_common_where_there_is_no_text(tmp_path: Path) -> None:
    for number, place in enumerate(("beach", "forest", "town", "cave", "hall", "moon", "sea")):
        gradient(tmp_path / "in" / f"{number}.png", (1, 1, 0), number)
        name = "character:ana" if number < 4 else "character:bo"
        (tmp_path / "in" / f"{number}.txt").write_text(f"{name}, smile, {place}")
    build_groups(BuildOptions(tmp_path / "in", tmp_path / "out", held_out=0, least=3))
    lines = (tmp_path / "out" / "held_in" / "ana" / "metadata.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["text"] == "smile, forest"


def test_names_of_folders_are_plain_and_apart(tmp_path: Path) -> None:
    for number, name in enumerate(("a/b", "a b", "../..", "日本", "con:")):
        rows = []
        for index in range(4):
            gradient(tmp_path / "in" / f"{number}{index}.png", (number / 5, 0, 1), index)
            rows.append({"file_name": f"{number}{index}.png", "group": name})
        with (tmp_path / "in" / "metadata.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    build_groups(BuildOptions(tmp_path / "in", tmp_path / "out", held_out=0))
    found = {path.name for path in (tmp_path / "out" / "held_in").iterdir()}
    assert found == {"a_b", "a_b_2", "group", "日本", "con"}


def test_a_full_disk_leaves_no_groups(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(group_files, "sync_tree", full)
    with pytest.raises(EasyRefError, match="No space left"):
        build_groups(BuildOptions(drawn, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"least": 1}, "--least is 1"),
        ({"held_out": 1.5}, "--held-out is 1.5"),
        ({"like_group": float("nan")}, "--like-group"),
        ({"duplicate": 7.0}, "--duplicate is 7"),
    ],
)
def test_numbers_out_of_range_are_refused(
    drawn: Path, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(EasyRefError, match=said):
        build_groups(replace(BuildOptions(drawn, tmp_path / "out"), **changed))


def test_a_place_that_holds_something_or_is_read_is_refused(drawn: Path, tmp_path: Path) -> None:
    with pytest.raises(EasyRefError, match="which is read"):
        build_groups(BuildOptions(drawn, drawn / "out"))
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(EasyRefError, match="not empty"):
        build_groups(BuildOptions(drawn, tmp_path))
    with pytest.raises(EasyRefError, match="cannot be written"):
        build_groups(BuildOptions(drawn, tmp_path / "notes.txt"))
