"""Groups of pictures that nobody here made: families of emoji are styles, avatars characters."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from open_pictures import FAMILIES, STYLES, avatars, emoji, rasterised
from PIL import Image

from easyref_core.evaluation.building.build_groups import BuildOptions, build_groups

pytestmark = pytest.mark.slow
NAMES = ("cat-face", "dog-face", "lion", "bear", "frog", "penguin", "tulip", "cactus", "pizza")
CHARACTERS = ("ana", "bo", "cy")
FACES = (  # mouth, eyes, ground
    ("happy01", "variant01", "b6e3f4"),
    ("happy05", "variant05", "ffd5dc"),
    ("sad01", "variant10", "d1d4f9"),
    ("sad05", "variant08", "ffdfbf"),
)


@dataclass(frozen=True)
class Drawing:
    """An emoji or avatar on white, as its makers describe it."""

    picture: Image.Image
    tags: list[str]
    text: str
    licence: str
    source: str


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> list[Drawing]:
    found = []
    for family in FAMILIES:
        svgs, licence = emoji(family, NAMES)
        for svg, name in zip(svgs, NAMES, strict=True):
            shown = name.replace("-", " ")
            found.append((svg, [f"style: {family}", f"object: {shown}"], shown, licence, family))
    faces = [(character, face) for character in CHARACTERS for face in FACES]
    for style in STYLES:
        options = [
            {"seed": character, "mouth": [mouth], "eyes": [eyes], "backgroundColor": [ground]}
            for character, (mouth, eyes, ground) in faces
        ]
        svgs, licence = avatars(style, options, tmp_path_factory.mktemp(style))
        for svg, (character, face) in zip(svgs, faces, strict=True):
            tags = [f"character: {character} by {style}", "avatar"]
            found.append((svg, tags, f"a {face[0][:-2]} face", licence, style))
    pictures = rasterised([svg for svg, *_ in found])
    return [Drawing(p, *rest) for p, (_, *rest) in zip(pictures, found, strict=True)]


@pytest.fixture
def folder(drawings: Sequence[Drawing], tmp_path: Path) -> Path:
    """All of them in one folder, described by metadata alone."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for number, each in enumerate(drawings):
        each.picture.save(folder / f"{number:03}.png")
        row = {"file_name": f"{number:03}.png", "text": each.text, "tags": each.tags}
        lines.append(json.dumps(row | {"license": each.licence, "source": each.source}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


class PaletteEncoder:
    """Embeds a picture by how much of it has which colour: enough to tell flat styles apart."""

    def picture(self, image: Image.Image) -> torch.Tensor:
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        red, green, blue = (pixels.view(-1, 3) // 64).long().T
        counts = torch.bincount(16 * red + 4 * green + blue, minlength=64).float()
        return counts.sqrt() / counts.sum().sqrt()

    def text(self, text: str) -> torch.Tensor:
        return torch.full((64,), 0.125)


def table(file: Path) -> dict[str, dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return {row["tag"]: row for row in csv.DictReader(lines)}


def test_families_are_style_groups_and_avatars_character_groups(
    folder: Path, tmp_path: Path
) -> None:
    tags = tmp_path / "tags.txt"
    names = [f"style: {family}" for family in FAMILIES]
    names += [f"character: {name} by {style}" for name in CHARACTERS for style in STYLES]
    tags.write_text("\n".join(names))
    report = build_groups(BuildOptions(folder, tmp_path / "out", tags))
    assert report.left_out == []
    rows = table(tmp_path / "out" / "groups.csv")
    found = {tag: (row["kind"], row["pictures"], row["licences"]) for tag, row in rows.items()}
    licences = ("Apache-2.0", "CC-BY-4.0", "CC-BY-SA-4.0", "MIT")
    families = zip(FAMILIES, licences, strict=True)
    assert found == {family: ("style", "9", licence) for family, licence in families} | {
        f"{name} by {style}": ("character", "4", "CC0 1.0")
        for name in CHARACTERS
        for style in STYLES
    }
    splits = {(row["kind"], row["split"]) for row in rows.values()}
    assert len(splits) == 4  # each kind in both splits
    noto = tmp_path / "out" / rows["noto"]["split"] / "noto" / "metadata.jsonl"
    lines = [json.loads(line) for line in noto.read_text().splitlines()]
    assert [line["text"] for line in lines] == [name.replace("-", " ") for name in NAMES]
    assert {(line["licence"], line["source"]) for line in lines} == {("Apache-2.0", "noto")}


def test_without_a_list_the_rarest_tag_decides(folder: Path, tmp_path: Path) -> None:
    """Four pictures show each object, nine each style: the objects are the groups."""
    build_groups(BuildOptions(folder, tmp_path / "out"))
    rows = table(tmp_path / "out" / "groups.csv")
    objects = {tag: row for tag, row in rows.items() if row["kind"] == "object"}
    assert {row["pictures"] for row in objects.values()} == {"4"}
    assert objects["lion"]["licences"] == "Apache-2.0; CC-BY-4.0; CC-BY-SA-4.0; MIT"
    assert not {row["kind"] for row in rows.values()} & {"style"}


def test_copies_of_another_size_and_compression_are_found_among_them(
    folder: Path, drawings: Sequence[Drawing], tmp_path: Path
) -> None:
    lines = []
    for number, each in enumerate(drawings):
        name = f"copy_{number}.png"
        file = io.BytesIO()
        small = each.picture.resize((80, 80), Image.Resampling.LANCZOS) if number % 2 else None
        (small or each.picture).save(file, "JPEG", quality=80)
        (folder / name).write_bytes(file.getvalue())
        lines.append(json.dumps({"file_name": name, "tags": each.tags}))
    with (folder / "metadata.jsonl").open("a") as file:
        file.write("\n" + "\n".join(lines))
    report = build_groups(BuildOptions(folder, tmp_path / "out"))
    found = {out.picture: out.detail for out in report.left_out}
    assert found == {f"copy_{n}.png": f"{n:03}.png" for n in range(len(drawings))}


def test_an_encoder_leaves_out_an_avatar_among_emoji(folder: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    stray = next(line for line in lines if line["source"] == "pixel-art")
    stray["tags"] = ["style: openmoji"]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tags = tmp_path / "tags.txt"
    tags.write_text("\n".join(f"style: {family}" for family in FAMILIES))
    options = BuildOptions(folder, tmp_path / "out", tags, duplicate=1.01, like_group=0.35)
    report = build_groups(options, PaletteEncoder())
    unlike = [out.picture for out in report.left_out if out.reason == "unlike its group"]
    assert unlike == [stray["file_name"]]
    similar = {
        tag: float(row["similarity"]) for tag, row in table(options.out / "groups.csv").items()
    }
    assert similar.keys() == set(FAMILIES)
    assert max(similar, key=similar.__getitem__) == "openmoji"  # thin lines: much white
