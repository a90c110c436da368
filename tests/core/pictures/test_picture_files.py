"""What is no picture is refused by its content, and large or damaged ones cost little."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import goldens
import numpy as np
import pytest
from PIL import Image, ImageFile, TiffImagePlugin, features

from easyref_core.pictures import loading
from easyref_core.pictures.formats import HEAD_BYTES, READERS, Format, is_picture, recognise
from easyref_core.pictures.loading import open_picture

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
LARGE = 13_300  # pixels a side; 177 million, just below what Pillow itself refuses


def box(kind: bytes, *brands: bytes) -> bytes:
    content = b"ftyp" + kind + bytes(4) + b"".join(brands)
    return struct.pack(">I", len(content) + 4) + content


def encoded(kind: str, size: tuple[int, int] = (32, 16), **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, rows: bytes = b"", chunks: bytes = b"", depth: int = 8) -> bytes:
    """A PNG in grey whose header may promise more than its rows hold."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunks + chunk(b"IDAT", zlib.compress(rows, 1))


def chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
@pytest.mark.parametrize("name", ["x", "x.jfif", "x.jpe", "x.apng", "x.heic", "x.txt"])
def test_what_a_file_holds_decides_not_its_name(tmp_path: Path, kind: str, name: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    (tmp_path / name).write_bytes(encoded(kind))
    assert is_picture(tmp_path / name)
    assert open_picture(tmp_path / name).size == (32, 16)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (box(b"heic", b"mif1", b"heic"), "HEIC"),
        (box(b"mif1", b"heic"), "HEIC"),
        (box(b"isom", b"mp42"), "video"),
        (box(b"crx "), "Canon raw"),
        (b"\xff\x0a" + bytes(20), "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"8BPS\0\1", "Photoshop"),
        (b"%PDF-1.7", "PDF"),
        (POSTSCRIPT, "PostScript"),
        (b"\xc5\xd0\xd3\xc6" + bytes(28), "PostScript"),
        (b"\0\0\1\0\1\0" + bytes(16), "icon"),
        (b'<?xml version="1.0"?>\n<svg xmlns="...">', "SVG"),
        (b"<!DOCTYPE html><html>", "web page"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, content: bytes, kind: str) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    assert recognise(content) == Format(kind, False)
    assert not is_picture(path)
    with goldens.refused(path, kind, "Save the picture as PNG or JPEG"):
        open_picture(path)


def test_avif_is_told_by_any_of_its_brands() -> None:
    for content in (box(b"avif"), box(b"mif1", b"miaf", b"avif"), box(b"avis", b"msf1")):
        found = recognise(content)
        assert found is not None
        assert (found.name, found.readable) == ("AVIF", "AVIF" in READERS)


@pytest.mark.parametrize(
    "text", [b"BM, a car maker\n" * 9, b"P1 is a plan", b"RIFFWAVE", b"", b"x"]
)
def test_texts_are_no_pictures(tmp_path: Path, text: bytes) -> None:
    assert recognise(text) is None
    (tmp_path / "x.png").write_bytes(text)
    with goldens.refused("is not a picture that can be read"):
        open_picture(tmp_path / "x.png")


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.eps", "x"])
def test_no_picture_starts_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def started(*given: object, **_: object) -> None:
        pytest.fail(f"started {given}")

    for owner, call in ((subprocess, "Popen"), (os, "system"), (os, "popen")):
        monkeypatch.setattr(owner, call, started)
    (tmp_path / name).write_bytes(POSTSCRIPT)
    with goldens.refused("PostScript"):
        open_picture(tmp_path / name)


def test_no_other_code_lets_pillow_choose_the_format() -> None:
    root = Path(loading.__file__).parents[2]
    shipped = [*root.glob("easyref_core/**/*.py"), *root.glob("nodes/**/*.py")]
    assert len(shipped) > 50
    for path in shipped:
        assert "Image.open(" not in path.read_text(encoding="utf-8"), path


def test_a_cameras_raw_file_is_not_read_as_its_preview(tmp_path: Path) -> None:
    path = tmp_path / "photo.dng"
    for tags in ({254: 1}, {50706: b"\1\4\0\0"}):
        Image.new("RGB", (16, 8)).save(path, "TIFF", tiffinfo=tags)
        with goldens.refused(path, "raw file"):
            open_picture(path)
    Image.new("RGB", (16, 8)).save(path, "TIFF", tiffinfo={254: 0})
    assert open_picture(path).size == (16, 8)


def test_names_are_shown_without_control_characters(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[2J\n.png"
    path.write_bytes(b"?")
    with goldens.refused("a\\x1b[2J\\n.png"):
        open_picture(path)
    with goldens.refused("b\\x07"):
        open_picture(io.BytesIO(b"?"), "b\x07")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with goldens.refused("x.png is a pipe"):
        open_picture(tmp_path / "x.png")
    assert not is_picture(tmp_path / "x.png")


# Sizes


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.png", png(LARGE, LARGE)),
        ("x.gif", b"GIF89a\xff\xff\xff\xff" + encoded("GIF")[10:]),
        ("x.bmp", encoded("BMP")[:18] + struct.pack("<ii", LARGE, LARGE) + encoded("BMP")[26:]),
    ],
)
@pytest.mark.parametrize("limit", [None, 100])
def test_too_many_pixels_are_refused_whatever_pillows_own_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, limit: int | None
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    (tmp_path / name).write_bytes(content)
    with goldens.refused(name, "million; at most 134 million can be decoded", "Save it smaller"):
        open_picture(tmp_path / name)
    (tmp_path / name).write_bytes(encoded("PNG"))
    assert open_picture(tmp_path / name).size == (32, 16)


def test_a_photograph_of_50_million_pixels_may_be_a_webp(tmp_path: Path) -> None:
    path = tmp_path / "x.webp"
    path.write_bytes(encoded("WEBP", (8192, 6144), method=0))
    image = loading._opened(io.BytesIO(path.read_bytes()), "it")  # its pixels are not decoded
    assert image.size == (8192, 6144)


def test_a_jpeg_is_reduced_while_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "MAX_PIXELS", 10_000)
    decoded: list[tuple[int, int]] = []
    load = ImageFile.ImageFile.load

    def noted(image: ImageFile.ImageFile) -> object:
        decoded.append(image.size)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", noted)
    (tmp_path / "x.jpg").write_bytes(encoded("JPEG", (160, 120)))
    assert open_picture(tmp_path / "x.jpg").size == (80, 60)
    assert open_picture(tmp_path / "x.jpg", longest=20).size == (20, 15)
    assert decoded[0] == (80, 60)
    assert (20, 15) in decoded


@pytest.mark.parametrize("kind", ["progressive", "colours apart", "plain"])
def test_a_jpeg_in_several_scans_may_be_less_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(loading, "_MOST_PIXELS_IN_SCANS", 10_000)
    content = encoded("JPEG", (160, 120), progressive=kind == "progressive")
    if kind == "colours apart":  # a first scan of the brightness alone
        start = content.index(b"\xff\xda")
        scan = b"\xff\xda\0\x08\1" + content[start + 5 : start + 7] + b"\0\x3f\0"
        content = content[:start] + scan + content[start + 14 :]
    (tmp_path / "x.jpg").write_bytes(content)
    if kind == "plain":
        assert open_picture(tmp_path / "x.jpg").size == (160, 120)
        return
    with goldens.refused("x.jpg", "160 x 120 pixels"):
        open_picture(tmp_path / "x.jpg")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16", "I", "F"])
def test_large_pictures_of_any_mode_are_reduced(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setattr(loading, "_BAND", 1000)
    ramp = np.linspace(0, 250, 90).round()[:, None].repeat(70, 1)
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        source = Image.fromarray((ramp * (257 if mode != "F" else 1)).astype(kind))
    else:
        source = Image.fromarray(ramp.astype(np.uint8), "L").convert("RGB").convert(mode)
    assert source.mode == mode
    file = io.BytesIO()
    source.save(file, "TIFF")
    whole = open_picture(file)
    assert np.array_equal(np.asarray(whole), np.asarray(loading.to_rgb(source, "it")))
    reduced = open_picture(file, longest=30)
    assert reduced.size == (23, 30)
    wanted = whole.resize((23, 30), Image.Resampling.LANCZOS, reducing_gap=1)
    difference = np.abs(np.asarray(reduced, int) - np.asarray(wanted, int))
    assert difference.max() <= {"1": 130, "P": 20}.get(mode, 4)


def test_a_line_of_pixels_keeps_one_pixel_of_height(tmp_path: Path) -> None:
    for kind in ("JPEG", "PNG"):
        (tmp_path / "x").write_bytes(encoded(kind, (9000, 1)))
        assert open_picture(tmp_path / "x", longest=100).size == (100, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_part_is_one_of_the_upright_picture(orientation: int) -> None:
    pixels = np.arange(24 * 16 * 3).reshape(16, 24, 3) % 251
    stored = Image.fromarray(pixels.astype(np.uint8), "RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    stored.save(file, "PNG", exif=exif)
    whole = open_picture(file)
    assert whole.size == ((24, 16) if orientation < 5 else (16, 24))
    part = open_picture(file, crop=(0.125, 0.25, 0.5, 0.5))
    width, height = whole.size
    wanted = whole.crop((width // 8, height // 4, width // 8 + width // 2, height * 3 // 4))
    assert np.array_equal(np.asarray(part), np.asarray(wanted))


# Decoders that are led to read or work for ever


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.png", png(8, 8, chunks=struct.pack(">I", 2**31 - 1) + b"tEXt")),
        ("x.webp", b"RIFF\xff\xff\xff\x7fWEBPVP8 "),
        ("x.avif", box(b"avif", b"mif1")),
        ("x.tif", b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 700, 1, 2**31, 8) + bytes(4)),
        ("x.jpg", b"\xff\xd8" + (b"\xff\xe5\xff\xff" + bytes(65_533)) * 300),
    ],
)
def test_a_file_that_promises_gigabytes_is_refused_early(
    tmp_path: Path, name: str, content: bytes
) -> None:
    if name == "x.avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    path = tmp_path / name
    path.write_bytes(content)
    os.truncate(path, 20_000_000_000)
    start = time.process_time()
    with goldens.refused(name):
        open_picture(path)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("strips", [150_000, 950_000, 4_000_000])
def test_a_tiff_in_a_million_pieces_is_refused_early(tmp_path: Path, strips: int) -> None:
    tags = [(256, 8), (257, 4_000_000), (258, 8), (259, 1), (262, 1), (277, 1), (278, 1)]
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags]
    entries.insert(5, struct.pack("<HHII", 273, 4, strips, 200))
    header = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4)
    path = tmp_path / "x.tif"
    path.write_bytes(header.ljust(200, b"\0") + struct.pack("<I", 300) * strips)
    start = time.process_time()
    with goldens.refused(path, "too many pieces"):
        open_picture(path)
    assert time.process_time() - start < 2


def test_a_tiff_may_hold_a_printers_profile_and_an_editors_layers(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    for form in ("TIFF", "BigTIFF"):
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags.tagtype.update({34675: 7, 37724: 7})  # the profile, Photoshop's layers
        tags[34675], tags[37724] = bytes(2_700_000), bytes(12_000_000)
        options = {"tiffinfo": tags, "compression": "tiff_lzw", "big_tiff": form == "BigTIFF"}
        Image.new("RGB", (1500, 1000), "red").save(path, "TIFF", **options)
        assert open_picture(path).getpixel((9, 9)) == (255, 0, 0)


def test_a_decoder_that_works_for_ever_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_SECONDS", 0.05)
    monkeypatch.setattr(loading, "_SECONDS_PER_PIXEL", 0)
    path = tmp_path / "x.ppm"
    path.write_bytes(b"P3 2000 2000 255\n" + b"1 2 3 " * 4_000_000)
    with goldens.refused(path, "takes too long"):
        open_picture(path)


def test_exif_that_refers_to_itself_is_ignored(tmp_path: Path) -> None:
    entries = 60_000
    body = b"".join(struct.pack("<HHII", n, 7, 2_000_000, 8) for n in range(entries))
    exif = b"II*\0" + struct.pack("<IH", 8, entries) + body + bytes(2_000_000)
    path = tmp_path / "x.png"
    path.write_bytes(png(8, 8, bytes(72), chunk(b"eXIf", exif)) + chunk(b"IEND", b""))
    assert open_picture(path).size == (8, 8)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exif_with_much_behind_it_tells_how_the_picture_lies(tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x9286] = bytes(100_000)  # the camera's notes
    path = tmp_path / "x"
    path.write_bytes(encoded(kind, (32, 16), exif=exif))
    assert open_picture(path).size == (16, 32)


MEASURE = """
import pathlib, re, sys
from easyref_core.pictures.loading import open_picture
def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) // 1000
before = peak()
print(*open_picture(sys.argv[1], longest=int(sys.argv[2])).size, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_a_jpeg_of_177_million_pixels_costs_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    Image.new("L", (LARGE, LARGE), 90).save(path)
    for longest, most in ((256, 60), (4096, 120)):
        run = subprocess.run(
            [sys.executable, "-c", MEASURE, str(path), str(longest)],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        width, height, megabytes = map(int, run.stdout.split())
        assert (width, height) == ((3325, 3325) if longest == 4096 else (256, 256))
        assert megabytes < most


def test_as_much_of_a_file_is_enough_to_recognise_it() -> None:
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        content = encoded(kind, (200, 200))
        assert recognise(content[:HEAD_BYTES]) == recognise(content) is not None
