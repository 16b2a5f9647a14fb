"""Picture files of every mode, and files that are none."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tokenthrift.media.image import MAX_PIXELS, ImageError, image_size, read_image, square


def photo(height: int = 12, width: int = 20) -> Image.Image:
    """Red grows to the right, green downwards, blue is constant."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    pixels[..., 2] = 64
    return Image.fromarray(pixels)


def expected(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def test_colours_and_axes(tmp_path: Path) -> None:
    photo().save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.shape == (3, 12, 20)
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, expected(photo()))
    assert image_size(tmp_path / "a.png") == (12, 20)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_undone(tmp_path: Path, orientation: int) -> None:
    turn = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = photo() if turn is None else photo().transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    torch.testing.assert_close(read_image(tmp_path / "a.png"), expected(photo()))
    assert image_size(tmp_path / "a.png") == (12, 20)


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    rgba = photo().convert("RGBA")
    rgba.putalpha(Image.fromarray(np.repeat([[0, 255]], 10, axis=1).repeat(12, axis=0).astype(np.uint8)))
    palette = Image.new("P", (20, 12), 1)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    rgba.save(tmp_path / "rgba.png")
    palette.save(tmp_path / "palette.png", transparency=1)
    Image.new("LA", (20, 12), (100, 128)).save(tmp_path / "la.png")
    image = read_image(tmp_path / "rgba.png")
    assert (image[:, :, :10] == 1).all()
    torch.testing.assert_close(image[:, :, 10:], expected(photo())[:, :, 10:])
    assert (read_image(tmp_path / "palette.png") == 1).all()
    grey = (100 * 128 + 255 * 127) / 255 / 255
    torch.testing.assert_close(read_image(tmp_path / "la.png"), torch.full((3, 12, 20), grey), atol=0.005, rtol=0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB", "RGB"])
def test_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    name = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr", "LAB") else "a.png")
    grey = Image.new("RGB", (8, 8), "white")
    stored = grey.convert("RGB" if mode in ("HSV", "LAB") else mode)
    stored.save(name)
    torch.testing.assert_close(read_image(name), torch.ones(3, 8, 8), atol=0.01, rtol=0)


def test_sixteen_bits_keep_their_range(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    for suffix in ("png", "tif"):
        Image.fromarray(values).save(tmp_path / f"a.{suffix}")
        image = read_image(tmp_path / f"a.{suffix}")
        torch.testing.assert_close(
            image, torch.linspace(0, 1, 64).reshape(1, 8, 8).expand(3, -1, -1), atol=1e-4, rtol=0
        )


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif")[0].mean() == 1


def bomb() -> bytes:
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_what_is_no_picture_says_why(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    photo(200, 300).save(buffer, "JPEG")
    files = {
        "empty.png": b"",
        "text.jpg": b"this is no picture",
        "cut.jpg": buffer.getvalue()[:2000],
        "header.png": b"\x89PNG\r\n\x1a\n" + b"\0" * 40,
        "bomb.png": bomb(),
    }
    reasons = {}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError) as caught:
            read_image(tmp_path / name)
        assert caught.value.path == tmp_path / name
        reasons[name] = caught.value.reason
    assert reasons["empty.png"] == "empty: a file of 0 bytes"
    assert reasons["text.jpg"] == "not a picture of a known format"
    assert "cut short" in reasons["cut.jpg"]
    assert f"{MAX_PIXELS:,}" in reasons["bomb.png"]
    with pytest.raises(ImageError, match=f"{MAX_PIXELS:,}"):
        image_size(tmp_path / "bomb.png")
    with pytest.raises(ImageError, match="No such file"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match="directory"):
        read_image(tmp_path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_is_an_image_error_or_a_picture(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"]))
    buffer = io.BytesIO()
    photo().save(buffer, form)
    broken = bytearray(buffer.getvalue())
    for place in data.draw(st.lists(st.integers(0, len(broken) - 1), min_size=1, max_size=8)):
        broken[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "broken"
    path.write_bytes(broken[: data.draw(st.integers(1, len(broken)))])
    try:
        image = read_image(path)
    except ImageError:
        return
    assert image.shape[0] == 3
    assert torch.isfinite(image).all()


def test_square_takes_the_middle() -> None:
    image = torch.zeros(3, 40, 100)
    image[:, :, 30:70] = 0.5
    assert torch.allclose(square(image, 20), torch.full((3, 20, 20), 0.5), atol=1e-5)
    assert square(image, 64).shape == (3, 64, 64)
    assert square(torch.rand(3, 1, 5000), 16).shape == (3, 16, 16)
    same = torch.rand(3, 16, 16)
    assert square(same, 16) is same
