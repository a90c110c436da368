"""Files that are called pictures."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

from corpus import EITHER, USED, Case, Way
from homes import Home, pipe, replaced, sparse
from PIL import Image

WAYS = (
    Way("python_picture", name="Python"),
    Way("comfy_entry_points.graph", more={"name": "pictures"}, name="gallery"),
    Way("comfy_entry_points.thumbnail", name="thumbnail"),
    Way("command_encode", name="easyref encode"),
)
LIST = (Way("comfy_entry_points.folders", name="folders"),)
EVERYWHERE = (*WAYS, *LIST)


def content(given: bytes) -> Callable[[Home], None]:
    return lambda home: replaced(home.picture, given)


def saved(image: Callable[[], Image.Image], form: str, **options: object) -> Callable[[Home], None]:
    def make(home: Home) -> None:
        with replaced(home.picture).open("wb") as file:
            image().save(file, form, **options)

    return make


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2, rows: bool = True
) -> bytes:
    """A PNG of zeros; where not all its rows are needed, without them."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    bits = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] * depth
    line = bytes(1 + (width * bits + 7) // 8)
    compressor = zlib.compressobj(1)
    data = b""
    if rows:
        for _ in range(height):
            data += compressor.compress(line)
        data += compressor.flush()
    body = chunk(b"IHDR", head) + b"".join(chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@cache
def large(form: str, side: int) -> bytes:
    """A grey picture of this size, made once for all ways in."""
    options = {"PNG": {"compress_level": 1}, "TIFF": {"compression": "tiff_lzw"}}.get(form, {})
    buffer = io.BytesIO()
    Image.new("L", (side, side), 200).save(buffer, form, **options)
    return buffer.getvalue()


def large_picture(form: str, side: int = 13_300) -> Callable[[Home], None]:
    return lambda home: replaced(home.picture, large(form, side))


def large_bmp(home: Home) -> None:
    side = 13_300
    head = b"BM" + struct.pack("<IHHI", 54 + side * side * 3, 0, 0, 54)
    head += struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 2835, 2835, 0, 0)
    sparse(home.picture, 54 + side * side * 3, head)


def tiff(entries: dict[int, tuple[int, int]], data: bytes = b"") -> bytes:
    """A TIFF of these entries: tag to (type, value), each a value of its own."""
    table = struct.pack("<H", len(entries))
    for tag, (kind, value) in sorted(entries.items()):
        table += struct.pack("<HHII", tag, kind, 1, value)
    return b"II*\0" + struct.pack("<I", 8) + table + struct.pack("<I", 0) + data


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 64 64
%%EndComments
0 0 64 64 rectfill
showpage
"""


def postscript(home: Home) -> None:
    """PostScript called .png, with a program called gs that leaves a mark."""
    replaced(home.picture, EPS)
    programs = home.base / "programs"
    programs.mkdir()
    ghostscript = programs / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch '{home.base / 'marker'}'\n")
    ghostscript.chmod(0o755)


def heic(home: Home) -> None:
    replaced(home.picture, struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(2000))


def gif_of_frames(count: int) -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("P", (2, 2), n % 2) for n in range(50)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=20)
    whole = buffer.getvalue()
    start = whole.index(b"\x21\xf9")
    return whole[:start] + whole[start:-1] * (count // 50) + b";"


def gif_canvas(width: int, height: int) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\0"
    return head + frame + b";"


def pipes_among_them(home: Home) -> None:
    for name in ("a.png", "b.jpg", "c.png"):
        os.mkfifo(home.picture.parent / name)


def names_of_all_kinds(home: Home) -> None:
    for name in (b"\x1b[31m.png", b"new\nline.png", b"\xff\xfe.png", b"a" * 250 + b".png"):
        path = os.path.join(os.fsencode(home.picture.parent), name)
        Path(os.fsdecode(path)).write_bytes(home.picture.read_bytes())


def link(target: str) -> Callable[[Home], None]:
    return lambda home: replaced(home.picture).symlink_to(target)


def linked_outside(home: Home) -> None:
    outside = home.base / "outside.png"
    home.picture.rename(outside)
    home.picture.symlink_to(outside)


def cut(form: str, share: float) -> Callable[[Home], None]:
    def make(home: Home) -> None:
        buffer = io.BytesIO()
        Image.effect_noise((200, 200), 80).convert("RGB").save(buffer, form)
        whole = buffer.getvalue()
        replaced(home.picture, whole[: int(len(whole) * share)])

    return make


def large_jpeg_without_content(side: int) -> Callable[[Home], None]:
    """Its header claims the size; the scan is that of a small picture."""

    def make(home: Home) -> None:
        buffer = io.BytesIO()
        Image.new("L", (64, 64)).save(buffer, "JPEG")
        whole = bytearray(buffer.getvalue())
        at = whole.index(b"\xff\xc0") + 5
        whole[at : at + 4] = struct.pack(">HH", side, side)
        replaced(home.picture, bytes(whole))

    return make


FOREIGN = ("PPM", "TGA", "ICO", "PCX", "SGI", "DDS", "JPEG2000", "PDF", "ICNS", "IM", "MSP", "XBM")


def foreign(form: str) -> Callable[[Home], None]:
    mode = {"MSP": "1", "XBM": "1"}.get(form, "RGB")
    return saved(lambda: Image.new(mode, (64, 64)), form)


BOMB = zlib.compress(bytes(100_000_000), 9)

CASES = (
    Case("PostScript called .png", postscript, WAYS),
    Case("HEIC called .png", heic, WAYS, said="(?i)heic"),
    *(Case(f"{form} called .png", foreign(form), WAYS[:3], EITHER) for form in FOREIGN),
    # Sizes
    *(
        Case(f"13,300 x 13,300 pixels in {form}", large_picture(form), WAYS, EITHER)
        for form in ("PNG", "JPEG", "TIFF", "WEBP", "GIF")
    ),
    Case("13,300 x 13,300 pixels in BMP", large_bmp, WAYS, EITHER),
    Case(
        "60,000 x 60,000 pixels in JPEG without its content",
        large_jpeg_without_content(60_000),
        WAYS,
    ),
    Case(
        "a PNG that claims 2 to the 31 pixels a side",
        content(png(2**31 - 1, 2**31 - 1, rows=False)),
        WAYS,
    ),
    Case("a PNG that claims 100,000 x 100,000", content(png(100_000, 100_000, rows=False)), WAYS),
    Case("a PNG of 1 x 178,000,000", content(png(178_000_000, 1, rows=False)), WAYS),
    Case(
        "a PNG of 16 bits and 8,000 x 8,000",
        content(png(8_000, 8_000, depth=16, colour=6)),
        WAYS,
        EITHER,
        needs=256,
    ),
    Case("a GIF canvas of 65,535 x 65,535", content(gif_canvas(65_535, 65_535)), WAYS),
    Case("a GIF of 100,000 frames", content(gif_of_frames(100_000)), WAYS, USED),
    # Content
    Case(
        "a PNG whose text is 100 MB",
        content(png(8, 8, chunk(b"zTXt", b"a\0\0" + BOMB))),
        WAYS,
        EITHER,
    ),
    Case(
        "a PNG whose profile is 100 MB",
        content(png(8, 8, chunk(b"iCCP", b"a\0\0" + BOMB))),
        WAYS,
        EITHER,
    ),
    Case(
        "a PNG whose pixels are 100 MB",
        content(png(8, 8, chunk(b"IDAT", BOMB), rows=False)),
        WAYS,
        EITHER,
    ),
    Case("a PNG without pixels", content(png(8, 8, rows=False)), WAYS),
    Case("a PNG of no width", content(png(0, 8)), WAYS),
    Case(
        "a TIFF whose strips lie nowhere",
        content(
            tiff(
                {
                    256: (4, 64),
                    257: (4, 64),
                    258: (3, 8),
                    259: (3, 1),
                    262: (3, 1),
                    273: (4, 2**31),
                    278: (4, 64),
                    279: (4, 4096),
                }
            )
        ),
        WAYS,
    ),
    Case(
        "a TIFF that claims 2 to the 31",
        content(
            tiff(
                {
                    256: (4, 2**31),
                    257: (4, 2**31),
                    258: (3, 8),
                    259: (3, 1),
                    262: (3, 1),
                    273: (4, 8),
                    278: (4, 2**31),
                    279: (4, 2**31),
                }
            )
        ),
        WAYS,
    ),
    Case("a TIFF that follows itself", content(b"II*\0" + struct.pack("<IHI", 8, 0, 8)), WAYS),
    *(
        Case(f"a {form} cut off", cut(form, 0.5), WAYS[:3], EITHER)
        for form in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")
    ),
    Case("text", content(b"<svg onload=alert(1)>" * 1000), WAYS),
    Case("nothing", content(b""), WAYS),
    Case("20 GB of zeros", lambda home: sparse(home.picture, 20_000_000_000), WAYS),
    # What is no file
    Case("a pipe", lambda home: pipe(home.picture), WAYS),
    Case("a link to a device that never ends", link("/dev/zero"), WAYS),
    Case("a link to itself", link("picture.png"), WAYS),
    Case("a folder", lambda home: replaced(home.picture).mkdir(), WAYS),
    Case("a link out of the input folder", linked_outside, WAYS[1:3], said="input folder"),
    Case("pipes among the pictures", pipes_among_them, (*WAYS[1:3], *LIST), USED),
    Case("names of all kinds among the pictures", names_of_all_kinds, (*WAYS[1:3], *LIST), USED),
)
