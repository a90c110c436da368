"""Damaged and hostile lists and shards are refused in a sentence, soon and in little memory."""

from __future__ import annotations

import io
import os
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from easyref_core.errors import EasyRefError
from easyref_core.training import shards
from easyref_core.training.records import PictureSource, read_records

GIGABYTES = 20 * 10**9


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 30), "red").save(buffer, "PNG")
    return buffer.getvalue()


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, len(content), kind) + content + bytes(-len(content) % 512)


GOOD = member("good.0.png", png()) + member("good.target.png", png())


def write(path: Path, content: bytes, size: int | None = None) -> Path:
    """A file, made longer by zeros that take no room on the disk."""
    path.write_bytes(content)
    if size is not None:
        os.truncate(path, size)
    return path


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("before", [b"", GOOD], ids=["first", "later"])
def test_a_header_of_gigabytes_is_not_read(tmp_path: Path, kind: bytes, before: bytes) -> None:
    path = write(tmp_path / "s.tar", before + header("x", GIGABYTES, kind), GIGABYTES)
    with pytest.raises(EasyRefError, match=r"s\.tar"):
        read_records([path], tmp_path)


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("bad.0.png", GIGABYTES, r"has a 0\.png of 20,000,000,000 bytes"),
        ("bad.json", 5_000_000, r"has a json of 5,000,000 bytes"),
    ],
)
def test_a_member_of_gigabytes_makes_its_record_unusable(
    tmp_path: Path, name: str, size: int, reason: str
) -> None:
    content = GOOD + member("bad.target.png", png()) + header(name, size)
    path = write(tmp_path / "s.tar", content, len(content) + size // 512 * 512 + 2048)
    good, bad = read_records([path], tmp_path)
    assert good.broken == ""
    assert good.target.open().size == (20, 30)
    with pytest.raises(EasyRefError, match=reason):
        bad.check()


def test_a_picture_with_holes_makes_its_record_unusable(tmp_path: Path) -> None:
    info = tarfile.TarInfo("bad.0.png")
    info.pax_headers = {
        "GNU.sparse.map": "0,10,1000000,10",
        "GNU.sparse.size": "100000000",
        "GNU.sparse.name": "bad.0.png",
    }
    info.size = 20
    holes = info.tobuf(tarfile.PAX_FORMAT) + bytes(512)
    path = write(tmp_path / "s.tar", GOOD + member("bad.target.png", png()) + holes + bytes(1024))
    good, bad = read_records([path], tmp_path)
    assert (good.broken, bad.broken) == ("", "has a 0.png that is cut off or has holes")


@pytest.mark.parametrize("content", [GOOD[:-600], GOOD[:-512], GOOD + b"x" * 512 + GOOD])
def test_records_after_a_damaged_place_are_not_silently_left_out(
    tmp_path: Path, content: bytes
) -> None:
    path = write(tmp_path / "s.tar", content)
    with pytest.raises(EasyRefError, match=r"s\.tar cannot be read as a plain tar shard"):
        read_records([path], tmp_path)


def test_headers_that_lead_in_a_circle_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own readers have followed negative sizes backwards for ever."""
    path = write(tmp_path / "s.tar", GOOD + bytes(1024))
    following = tarfile.TarFile.next

    def circle(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
        tar.offset = min(tar.offset, 1024)
        return following(tar)

    monkeypatch.setattr(shards.tarfile.TarFile, "next", circle)
    with pytest.raises(EasyRefError, match="lead in a circle"):
        read_records([path], tmp_path)


@pytest.mark.parametrize(
    ("content", "size", "said"),
    [
        (b"[" * 100_000, None, "nested more than"),
        (b'[{"target": ', GIGABYTES, "larger than the 256,000,000 bytes"),
        (b"\x00\x01\x02", None, "cannot be read as JSON"),
        (b"\x1f\x8b\x08", None, "must not be compressed"),
        (b"3", None, "holds a number, not a list of records"),
        (b"", None, "cannot be read as JSON"),
    ],
)
def test_what_is_neither_list_nor_shard_is_refused(
    tmp_path: Path, content: bytes, size: int | None, said: str
) -> None:
    with pytest.raises(EasyRefError, match=said):
        read_records([write(tmp_path / "data", content, size)], tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EasyRefError, match="pipe or a device"):
        read_records([tmp_path / "pipe"], tmp_path)
    with pytest.raises(EasyRefError, match="pipe or a device"):
        PictureSource(tmp_path / "pipe", 0, 10, "x").open()
    with pytest.raises(EasyRefError, match="no data file"):
        read_records([tmp_path / "nothing"], tmp_path)


@pytest.mark.parametrize(
    "face",
    [
        *("[NaN, 0, 1, 1]", "[1e999, 0, 1, 1]", "[1e9, 0, 1, 1]", '["1", 0, 1, 1]'),
        *("[true, 0, 1, 1]", "[null]", "[{}, {}, {}, {}]", "[[[[[]]]]]", "{}", '"face"', "3"),
    ],
)
def test_a_face_is_four_plain_numbers(tmp_path: Path, face: str) -> None:
    text = f'[{{"target": "a.png", "face": {face}}}]'
    with pytest.raises(EasyRefError, match=r"has a face that is not \[\["):
        read_records([write(tmp_path / "data", text.encode())], tmp_path)


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: write(folder / "s.tar", member("a\x1b[2Jb.0.png", png()) + bytes(1024)),
        lambda folder: write(folder / "a\x1b[2Jb", b'[{"target": null}]'),
    ],
)
def test_names_of_records_have_no_control_characters(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    with pytest.raises(EasyRefError) as raised:
        read_records([make(tmp_path)], tmp_path)
    assert r"a\x1b[2Jb" in str(raised.value)
    assert str(raised.value).isprintable()
