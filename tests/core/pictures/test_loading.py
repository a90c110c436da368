"""Pictures in any mode, from files or tensors, become plain 8-bit RGB."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import goldens
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from easyref_core.errors import EasyRefError
from easyref_core.pictures.loading import named, open_picture, to_rgb
from easyref_core.pictures.tensors import tensor_to_picture

COLOUR = (200, 100, 50)


def colours(image: Image.Image) -> set[tuple[int, ...]]:
    assert image.mode == "RGB"
    return {colour for _, colour in image.getcolors(1 << 16)}


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"]
)
def test_every_mode_becomes_rgb(mode: str) -> None:
    source = Image.new("RGB", (6, 4), COLOUR)
    source.putpixel((1, 2), (255, 255, 255))
    image = source.convert(mode)
    found = to_rgb(image, "it")
    assert found.mode == "RGB"
    assert found.size == (6, 4)
    assert found.getpixel((1, 2)) == (255, 255, 255)
    if mode in ("P", "PA"):
        near = 40  # a palette of 216 colours
    else:
        near = 2
    grey = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    wanted = (grey,) * 3 if mode in ("L", "LA") else COLOUR
    if mode != "1":
        assert all(abs(a - b) <= near for a, b in zip(found.getpixel((0, 0)), wanted, strict=True))


def test_alpha_is_dropped_not_composited() -> None:
    image = Image.new("RGBA", (2, 2), (*COLOUR, 0))
    assert colours(to_rgb(image, "it")) == {COLOUR}
    grey = Image.new("LA", (2, 2), (90, 0))
    assert colours(to_rgb(grey, "it")) == {(90, 90, 90)}


def test_transparency_of_a_palette_is_dropped(tmp_path: Path) -> None:
    image = Image.new("P", (3, 2), 1)
    image.putpalette([0, 0, 0, *COLOUR])
    path = tmp_path / "palette.png"
    image.save(path, transparency=1)
    with Image.open(path) as again:
        assert "transparency" in again.info
    assert colours(open_picture(path)) == {COLOUR}


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bit_grey_is_scaled_not_clipped(mode: str) -> None:
    levels = np.array([[0, 257 * 100], [257 * 200, 65535]])
    kind = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    image = Image.frombytes(mode, (2, 2), levels.astype(kind).tobytes())
    grey = np.asarray(to_rgb(image, "it"))
    assert grey[..., 0].tolist() == [[0, 100], [200, 255]]
    assert (grey == grey[..., :1]).all()


def test_dark_sixteen_bit_grey_stays_dark() -> None:
    image = Image.frombytes("I;16", (2, 1), np.array([0, 200], "<u2").tobytes())
    assert colours(to_rgb(image, "it")) <= {(0, 0, 0), (1, 1, 1)}


def test_sixteen_bit_png_file(tmp_path: Path) -> None:
    levels = np.array([[0, 65535, 128 * 257]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    found = np.asarray(open_picture(tmp_path / "deep.png"))[0, :, 0]
    assert found.tolist() == [0, 255, 128]


def test_eight_bit_levels_in_a_wide_integer_mode_are_kept() -> None:
    image = Image.fromarray(np.array([[0, 7, 255]], np.int32))
    assert image.mode == "I"
    assert np.asarray(to_rgb(image, "it"))[0, :, 1].tolist() == [0, 7, 255]


def test_negative_integers_are_black() -> None:
    image = Image.fromarray(np.array([[-5, 0, 255]], np.int32))
    assert np.asarray(to_rgb(image, "it"))[0, :, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_float_grey(top: float) -> None:
    image = Image.fromarray(np.array([[0, 0.5, 1]], np.float32) * top)
    assert image.mode == "F"
    assert np.asarray(to_rgb(image, "it"))[0, :, 2].tolist() == [0, 128, 255]


def test_float_grey_with_nan_is_refused() -> None:
    image = Image.fromarray(np.array([[0, float("nan")]], np.float32))
    with goldens.refused("it", "not numbers"):
        to_rgb(image, "it")


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_first_frame_of_an_animation(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ((255, 0, 0), (0, 255, 0))]
    path = tmp_path / f"moving.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    with Image.open(path) as image:
        assert image.n_frames == 2
    red, green, _ = open_picture(path).getpixel((4, 4))
    assert (red, green) == (255, 0) or (red > 250 and green < 5)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_photographs_stand_upright(tmp_path: Path, orientation: int) -> None:
    upright = Image.new("RGB", (32, 16), "black")
    upright.paste("white", (0, 0, 8, 8))  # the corner that must end at the top left
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    found = open_picture(tmp_path / "photo.jpg")
    assert found.size == (32, 16)
    difference = np.abs(np.asarray(found, int) - np.asarray(upright, int))
    assert difference.max() < 40


def broken_exif() -> dict[str, bytes]:
    """EXIF as some programs write it: a resolution that is a text, and none that can be read."""
    entries = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), (0x011A, 2, 4, b"abc\0")]
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    odd = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)
    return {"odd": odd, "noise": b"Exif\0\0noise", "cut": odd[:20]}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["odd", "noise", "cut"])
def test_broken_exif_is_no_reason_to_refuse_a_picture(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (32, 16), "red").save(path, exif=broken_exif()[kind])
    assert open_picture(path).size == ((16, 32) if kind == "odd" else (32, 16))


@pytest.mark.parametrize("error", [RuntimeError, TypeError, struct.error, EOFError])
def test_whatever_a_decoder_raises_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    path = tmp_path / "damaged.png"
    Image.new("RGB", (8, 8)).save(path)

    def fail(*_: object) -> None:
        raise error("frame 0: bad data")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with goldens.refused(path, "cannot be decoded", "frame 0: bad data", "truncated"):
        open_picture(path)


@pytest.mark.parametrize("step", ["open", "load"])
def test_a_file_that_may_not_be_read_is_not_called_truncated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "locked.png"
    Image.new("RGB", (8, 8)).save(path)

    def locked(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    owner = os if step == "open" else ImageFile.ImageFile
    monkeypatch.setattr(owner, step, locked)
    with pytest.raises(EasyRefError, match=r"cannot be read \(Permission denied\)") as raised:
        open_picture(path)
    assert "truncated" not in str(raised.value)


def test_lack_of_memory_is_not_blamed_on_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: object) -> None:
        raise MemoryError

    Image.new("RGB", (8, 8)).save(tmp_path / "large.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", run_out)
    with pytest.raises(MemoryError):
        open_picture(tmp_path / "large.png")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut.{suffix}"
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with goldens.refused(path, "cannot be decoded", "truncated"):
        open_picture(path)


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    path = tmp_path / "note.png"
    for content in (b"", b"hello", b"\x89PNG\r\n\x1a\n"):
        path.write_bytes(content)
        with goldens.refused(path, "is not a picture that can be read"):
            open_picture(path)
    with goldens.refused("There is no picture", tmp_path / "nothing.png"):
        open_picture(tmp_path / "nothing.png")
    with goldens.refused(tmp_path, "is a folder"):
        open_picture(tmp_path)


def test_an_open_file_is_read_under_the_name_given() -> None:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), COLOUR).save(file, "PNG")
    assert colours(open_picture(io.BytesIO(file.getvalue()), "upload 1")) == {COLOUR}
    with goldens.refused("upload 2 is not a picture"):
        open_picture(io.BytesIO(b"nothing"), "upload 2")


def test_a_picture_without_pixels_is_refused() -> None:
    with goldens.refused("it has no pixels (0x3)"):
        to_rgb(Image.new("RGB", (0, 3)), "it")


def test_all_levels_survive_the_way_through_a_tensor() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = np.stack((levels, levels.T, 255 - levels), axis=-1)
    tensor = torch.from_numpy(pixels.astype(np.float32) / 255.0)
    assert np.array_equal(np.asarray(tensor_to_picture(tensor, "it")), pixels)
    half = tensor_to_picture(tensor.half(), "it")
    assert np.array_equal(np.asarray(half), pixels)


def test_levels_outside_0_to_1_are_clamped() -> None:
    tensor = torch.tensor([-0.5, 0.0, 1.7]).view(1, 3, 1)
    assert np.asarray(tensor_to_picture(tensor, "it"))[0, :, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    ("channels", "wanted"), [(1, (51, 51, 51)), (2, (51, 51, 51)), (3, (51, 102, 153))]
)
def test_channels_of_a_tensor(channels: int, wanted: tuple[int, int, int]) -> None:
    tensor = torch.tensor([0.2, 0.4, 0.6, 0.0])[:channels].expand(3, 5, channels)
    picture = tensor_to_picture(tensor, "it")
    assert picture.size == (5, 3)
    assert colours(picture) == {wanted}


def test_alpha_of_a_tensor_is_dropped() -> None:
    tensor = torch.tensor([0.2, 0.4, 0.6, 0.0]).expand(3, 5, 4)
    assert colours(tensor_to_picture(tensor, "it")) == {(51, 102, 153)}


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (5, 5, 0), (5, 5), (1, 5, 5, 3)])
def test_tensors_without_pixels_or_of_other_rank_are_refused(shape: tuple[int, ...]) -> None:
    with goldens.refused("it has shape", list(shape)):
        tensor_to_picture(torch.zeros(shape), "it")


@pytest.mark.parametrize("channels", [5, 16])
def test_other_channel_counts_are_refused(channels: int) -> None:
    with goldens.refused("it", f"{channels} channels", [8, 8, channels]):
        tensor_to_picture(torch.zeros(8, 8, channels), "it")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensor_that_holds_no_numbers_is_refused(value: float) -> None:
    tensor = torch.zeros(4, 4, 3)
    tensor[1, 2, 0] = tensor[0, 0, 1] = value
    with goldens.refused("reference 3", "2 values", "VAE"):
        tensor_to_picture(tensor, "reference 3")


def test_named_puts_the_name_first() -> None:
    with pytest.raises(EasyRefError, match=r"^this: is wrong$"), named("this"):
        raise EasyRefError("is wrong")
