"""EasyRef References with pictures of its gallery, read from ComfyUI's input folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyhost import Pack
from PIL import Image

COLOURS = ("red", "lime", "blue", "white")


@pytest.fixture
def folder(pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An input folder of its own, with four pictures of one colour each."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    (tmp_path / "input" / "sub").mkdir(parents=True)
    for name, colour in zip(("a.png", "b.png", "sub/c.png", "d.png"), COLOURS, strict=True):
        Image.new("RGB", (60, 40), colour).save(tmp_path / "input" / name)
    return tmp_path / "input"


def text(*pictures: Any, version: int = 1) -> str:
    entries = [{"file": p} if isinstance(p, str) else p for p in pictures]
    return json.dumps({"version": version, "pictures": entries})


def references(pack: Pack, gallery: str, **inputs: Any) -> Any:
    return pack.run("EasyRefReferences", gallery=gallery, **inputs)


def colours(group: Any) -> list[tuple[int, ...]]:
    return [r.picture.getpixel((0, 0)) for r in group]


RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)


def test_previous_then_gallery_then_images(pack: Pack, folder: Path) -> None:
    previous = references(pack, text("sub/c.png"))
    grey = torch.full((2, 8, 8, 3), 128 / 255)
    group = references(
        pack, text("b.png", "a.png"), previous=previous, images={"image_1": grey}, weight=2.0
    )
    assert colours(group) == [BLUE, GREEN, RED, GREY, GREY]
    assert [r.name for r in group[:3]] == ["sub/c.png", "b.png", "a.png"]
    assert [r.weight for r in group] == [1.0, 2.0, 2.0, 2.0, 2.0]


def test_each_picture_has_its_own_weight_times_the_nodes(pack: Pack, folder: Path) -> None:
    gallery = text({"file": "a.png", "weight": 0.5}, {"file": "a.png", "weight": 0}, "b.png")
    group = references(pack, gallery, weight=3.0)
    assert [r.weight for r in group] == [1.5, 0.0, 3.0]


def test_nothing_is_as_before(pack: Pack) -> None:
    grey = torch.full((1, 8, 8, 3), 128 / 255)
    for gallery in ("", " ", text()):
        assert colours(references(pack, gallery, images={"image_1": grey})) == [GREY]
    with pack.refused("EasyRef References has no picture", "image_1"):
        references(pack, "")
    previous = references(pack, "", images={"image_1": grey})
    assert references(pack, "", previous=previous) == previous


def test_connected_pictures_keep_the_order_of_their_inputs_and_gaps_are_allowed(
    pack: Pack,
) -> None:
    pictures = {f"image_{n}": torch.full((1, 8, 8, 3), n / 255) for n in (100, 9, 10, 2)}
    group = references(pack, "", images={**pictures, "image_3": None})
    assert [r.name for r in group] == ["image_2", "image_9", "image_10", "image_100"]
    assert colours(group) == [(n,) * 3 for n in (2, 9, 10, 100)]


def test_a_picture_on_the_growing_input_itself_is_refused(pack: Pack) -> None:
    with pack.refused("images.image_1"):
        references(pack, "", images=torch.zeros(1, 8, 8, 3))


def test_crops_are_shares_of_the_upright_picture(pack: Pack, folder: Path) -> None:
    picture = Image.new("RGB", (80, 40), "blue")
    picture.paste("red", (0, 0, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees: red above blue
    picture.save(folder / "turned.jpg", exif=exif, quality=100, subsampling=0)
    whole, part = references(
        pack, text("turned.jpg", {"file": "turned.jpg", "crop": [0, 0.75, 1, 0.25]})
    )
    assert whole.picture.size == (40, 80)
    assert part.picture.size == (40, 20)
    for at, expected in ((whole.picture.getpixel((20, 5)), 0), (part.picture.getpixel((20, 5)), 2)):
        assert at.index(max(at)) == expected


def test_alpha_is_dropped_and_other_modes_are_converted(pack: Pack, folder: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(folder / "clear.png")
    Image.new("P", (8, 8)).save(folder / "palette.gif")
    Image.new("I;16", (8, 8), 257 * 128).save(folder / "deep.png")
    group = references(pack, text("clear.png", "palette.gif", "deep.png"))
    assert colours(group) == [RED, (0, 0, 0), GREY]


@pytest.mark.parametrize("name", ["a b.png", 'it\'s "x".png', "ünï 图片.png", "100% #1 [x].png"])
def test_names_of_any_kind(pack: Pack, folder: Path, name: str) -> None:
    Image.new("RGB", (8, 8), "red").save(folder / name)
    assert colours(references(pack, text(name))) == [RED]
    assert pack.nodes["EasyRefReferences"].validate_inputs(gallery=text(name)) is True


def test_missing_files_are_all_named_at_once(pack: Pack, folder: Path) -> None:
    gallery = text("a.png", "x.png", "sub/y.png", "x.png", "sub")
    with pack.refused("3 of the gallery's pictures are missing", "'x.png', 'sub/y.png', 'sub'"):
        references(pack, gallery)
    refused = pack.nodes["EasyRefReferences"].validate_inputs(gallery=gallery)
    assert "'x.png', 'sub/y.png', 'sub'" in refused
    with pack.refused("12 of the gallery's", "and 2 more"):
        references(pack, text(*(f"{n}.png" for n in range(12))))


@pytest.mark.parametrize("file", ["../secret.png", "sub/../../secret.png", "link.png", "out/s.png"])
def test_nothing_outside_the_input_folder_is_read(
    pack: Pack, folder: Path, tmp_path: Path, file: str
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere" / "s.png")
    os.symlink(tmp_path / "secret.png", folder / "link.png")
    os.symlink(tmp_path / "elsewhere", folder / "out")
    with pack.refused("out of ComfyUI's input folder"):
        references(pack, text(file))
    with pack.refused("out of ComfyUI's input folder"):
        pack.part("nodes.gallery.gallery").thumbnail(file, 64)


def test_the_input_folder_may_be_a_link(
    pack: Pack, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import folder_paths

    os.symlink(folder, tmp_path / "linked")
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "linked"))
    assert colours(references(pack, text("a.png"))) == [RED]


def test_other_errors_are_shown(pack: Pack, folder: Path) -> None:
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:60])
    with pack.refused("broken.png"):
        references(pack, text("broken.png"))
    with pack.refused("newer EasyRef"):
        references(pack, text("a.png", version=2))
    validate = pack.nodes["EasyRefReferences"].validate_inputs
    assert "newer EasyRef" in validate(gallery=text(version=2))
    assert "[output]" in validate(gallery=text("a.png [output]"))
    assert validate() is validate(images={"image_1": None}) is True
    assert validate(gallery=None) is True


def test_a_huge_picture_is_reduced_in_its_aspect_ratio(pack: Pack, folder: Path) -> None:
    Image.new("L", (12_500, 8_000), 200).save(folder / "huge.png", compress_level=1)
    whole, part = references(
        pack, text("huge.png", {"file": "huge.png", "crop": [0.5, 0.5, 0.2, 0.2]})
    )
    assert whole.picture.size == (4096, 2621)
    assert part.picture.size == (2500, 1600), "a part is cut out before it is shrunk"
    assert whole.picture.getpixel((9, 9)) == (200, 200, 200)


def test_a_changed_file_is_read_again(pack: Pack, folder: Path) -> None:
    fingerprint = pack.nodes["EasyRefReferences"].fingerprint_inputs
    gallery = text("a.png", "b.png")
    before = fingerprint(gallery=gallery, weight=1.0)
    assert fingerprint(gallery=gallery, weight=1.0) == before
    Image.new("RGB", (61, 40), "blue").save(folder / "a.png")
    assert fingerprint(gallery=gallery, weight=1.0) != before
    (folder / "b.png").unlink()
    assert fingerprint(gallery=gallery, weight=1.0) == []
    assert fingerprint() == fingerprint(gallery=None) == []


def test_folders_and_pictures_are_listed_in_natural_order(
    pack: Pack, folder: Path, tmp_path: Path
) -> None:
    gallery = pack.part("nodes.gallery.gallery")
    for name in ("10.png", "9.jfif", "B", ".hidden.png"):
        Image.new("RGB", (8, 8)).save(folder / "sub" / name, "JPEG")
    for name in ("note.txt", "note.png", "empty.png"):
        (folder / "sub" / name).write_text("" if name == "empty.png" else "a note")
    (folder / "sub" / "drawing.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0")
    os.mkfifo(folder / "sub" / "pipe.png")
    os.symlink("loop.png", folder / "sub" / "loop.png")
    (folder / "empty").mkdir()
    os.symlink(tmp_path, folder / "outside")
    os.symlink(tmp_path / "any.png", folder / "sub" / "link.png")
    assert gallery.list_pictures("sub") == [
        "sub/9.jfif",
        "sub/10.png",
        "sub/B",
        "sub/c.png",
    ]
    assert gallery.list_pictures("") == ["a.png", "b.png", "d.png"]
    assert gallery.list_folders() == [("", 3), ("sub", 4)]
    for name, said in (
        ("empty", "The folder 'empty' holds no picture"),
        ("absent", "There is no folder 'absent'"),
        ("..", "out of ComfyUI's input folder"),
        ("outside", "out of ComfyUI's input folder"),
        ("sub [output]", "There is no folder"),
        ("x" * 500, "There is no folder"),
        ("x" * 5000, "a name of 5,000 characters"),
        ("\x1b", "'\\x1b'"),
    ):
        with pack.refused(said):
            gallery.list_pictures(name)


def test_a_file_that_becomes_a_picture_is_listed(pack: Pack, folder: Path) -> None:
    gallery = pack.part("nodes.gallery.gallery")
    (folder / "later").write_bytes(b"?")
    assert "later" not in gallery.list_pictures("")
    Image.new("RGB", (8, 8)).save(folder / "later", "PNG")
    assert "later" in gallery.list_pictures("")


def test_pictures_of_outputs_and_temp_are_named_as_load_image_names_them(
    pack: Pack, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import folder_paths

    for kind, colour in (("output", "white"), ("temp", "blue")):
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
        (tmp_path / kind / "sub").mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(tmp_path / kind / "sub" / "x.png")
    gallery = text("sub\\x.png [output]", "sub/x.png [temp]", "a.png [input]")
    assert colours(references(pack, gallery)) == [(255, 255, 255), BLUE, RED]
    assert len(pack.nodes["EasyRefReferences"].fingerprint_inputs(gallery=gallery)) == 3
    with pack.refused("missing in", tmp_path / "output", "'a.png [output]'"):
        references(pack, text("a.png [output]"))
    os.symlink(tmp_path / "input" / "a.png", tmp_path / "output" / "link.png")
    for file in ("../input/a.png [output]", "link.png [output]"):
        with pack.refused("out of ComfyUI's output folder"):
            references(pack, text(file))


def test_two_pipes_do_not_end_all_thumbnails(pack: Pack, folder: Path) -> None:
    part = pack.part("nodes.gallery.gallery")
    for name in ("p.png", "q.png"):
        os.mkfifo(folder / name)
        with pack.refused(name, "pipe"):
            part.thumbnail(name, 64)
        with pack.refused("missing", name):
            references(pack, text(name))
        assert part.stamp(name) == ""
    assert part.thumbnail("a.png", 64)


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"), (b"\0\0\0\x18ftypheic", "HEIC")],
)
def test_other_formats_are_refused_by_name(
    pack: Pack, folder: Path, content: bytes, kind: str
) -> None:
    (folder / "x.png").write_bytes(content)
    with pack.refused("x.png", kind, "Save the picture as PNG or JPEG"):
        references(pack, text("x.png"))
    with pack.refused("x.png", kind, "Save the picture as PNG or JPEG"):
        pack.part("nodes.gallery.gallery").thumbnail("x.png", 64)


def test_a_gallery_of_thousands_is_refused(pack: Pack, folder: Path) -> None:
    with pack.refused("1,001 pictures; 1,000 are the most"):
        references(pack, text(*["a.png"] * 1001))


@pytest.mark.parametrize("as_list", [False, True])
def test_connected_pictures_may_be_whole_numbers_or_a_list(pack: Pack, as_list: bool) -> None:
    levels = torch.full((2, 8, 8, 3), 128, dtype=torch.uint8)
    given = [levels[0], levels[1:].float() / 255] if as_list else levels
    group = references(pack, "", images={"image_1": given})
    assert colours(group) == [GREY, GREY]
    with pack.refused("image_1", "is a text where a picture"):
        references(pack, "", images={"image_1": "a.png"})


@pytest.mark.parametrize("crop", [None, (0.5, 0.0, 0.5, 1.0)])
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_thumbnails_are_small_and_upright(pack: Pack, folder: Path, ending: str, crop: Any) -> None:
    import io

    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (1600, 400), "red").save(folder / f"photo.{ending}", exif=exif)
    result = pack.part("nodes.gallery.gallery").thumbnail(f"photo.{ending}", 128, crop)
    with Image.open(io.BytesIO(result)) as picture:
        assert picture.format == "WEBP"
        assert picture.size == ((32, 128) if crop is None else (16, 128))
