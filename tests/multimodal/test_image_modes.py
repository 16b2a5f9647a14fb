"""One stated result for every mode, depth, orientation and profile, against Pillow or plain arithmetic."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from tokenthrift.media.image import image_size, read_image


def grey_of(path: Path) -> np.ndarray:
    image = read_image(path)
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])
    return image[0].numpy()


@pytest.mark.parametrize("suffix", ["tif", "jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_and_pixels_agree_in_every_orientation(suffix: str, orientation: int, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (20, 12), "red").save(path, exif=exif)
    size = (20, 12) if orientation > 4 else (12, 20)
    assert image_size(path) == size
    assert tuple(read_image(path).shape[1:]) == size


def twelve_bits(values: list[int], width: int, height: int) -> bytes:
    """A TIFF of one strip with 12 bits a pixel."""
    bits = "".join(f"{value:012b}" for value in values)
    data = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))
    fields = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 0, 277: 1, 278: height, 279: len(data), 339: 1}
    fields[273] = 8 + 2 + 12 * len(fields) + 4
    rows = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, v) for tag, v in fields.items())
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + rows + bytes(4) + data


def test_twelve_bits_use_their_own_range(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(twelve_bits([0, 1024, 2048, 4095], 2, 2))
    assert np.allclose(grey_of(tmp_path / "a.tif").ravel(), np.array([0, 1024, 2048, 4095]) / 4095, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([0.0, 0.25, 0.5, 1.0], [0, 0.25, 0.5, 1]),
        ([0.0, 51.0, 102.0, 255.0], [0, 0.2, 0.4, 1]),
        ([0.0, 20.0, 100.0, 200.0], [0, 20 / 255, 100 / 255, 200 / 255]),
        ([0.0, 13107.0, 65535.0, 0.0], [0, 0.2, 1, 0]),
        ([0.0, 1.0, 2.0, 4.0], [0, 0.25, 0.5, 1]),
        ([-1.0, 0.0, 1.0, 1.0], [0, 0.5, 1, 1]),
        ([np.nan, 0.0, 0.5, np.inf], [0, 0, 0.5, 1]),
        ([7e8, 7e8, 7e8, 7e8], [0, 0, 0, 0]),
    ],
)
def test_floats_have_one_stated_range(values: list[float], wanted: list[float], tmp_path: Path) -> None:
    Image.fromarray(np.array(values, dtype=np.float32).reshape(2, 2)).save(tmp_path / "a.tif")
    assert np.allclose(grey_of(tmp_path / "a.tif").ravel(), wanted, atol=1e-5)


def test_wide_integers_are_stretched(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1 << 20], [1 << 21, 1 << 22]], dtype=np.int32)).save(tmp_path / "a.tif")
    assert np.allclose(grey_of(tmp_path / "a.tif").ravel(), [0, 0.25, 0.5, 1], atol=1e-5)


def test_the_transparent_value_of_sixteen_bits_is_white(tmp_path: Path) -> None:
    values = np.array([[0, 4000], [30000, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "grey.png", transparency=4000)
    assert np.allclose(grey_of(tmp_path / "grey.png").ravel(), [0, 1, 30000 / 65535, 1], atol=1e-5)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = np.array([[[1000, 2000, 3000], [60000, 100, 100]]], dtype=">u2")
    body = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)) + chunk(b"tRNS", pixels[0, 0].tobytes())
    body += chunk(b"IDAT", zlib.compress(b"\0" + pixels.tobytes())) + chunk(b"IEND", b"")
    (tmp_path / "color.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    image = read_image(tmp_path / "color.png")
    assert (image[:, 0, 0] == 1).all()
    assert torch.allclose(image[:, 0, 1], torch.tensor([60000, 100, 100]) / 65535, atol=0.005)


def swapped_profile() -> bytes:
    """An sRGB profile whose red and green are exchanged, under another name."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", data[128:132])[0]
    places = {bytes(data[132 + 12 * k : 136 + 12 * k]): 132 + 12 * k for k in range(count)}
    red, green = places[b"rXYZ"], places[b"gXYZ"]
    data[red + 4 : red + 12], data[green + 4 : green + 12] = data[green + 4 : green + 12], data[red + 4 : red + 12]
    for at in range(len(data) - 8):
        for text in (b"sRGB", "sRGB".encode("utf-16-be")):
            if data[at : at + len(text)] == text:
                data[at : at + len(text)] = b"Swap" if len(text) == 4 else "Swap".encode("utf-16-be")
    return bytes(data)


def test_a_profile_is_converted_from(tmp_path: Path) -> None:
    profile = swapped_profile()
    for name, mode in (("rgb", "RGB"), ("rgba", "RGBA"), ("p", "P")):
        Image.new("RGB", (4, 4), "red").convert(mode).save(tmp_path / f"{name}.png", icc_profile=profile)
        image = read_image(tmp_path / f"{name}.png")
        assert torch.allclose(image[:, 0, 0], torch.tensor([0.0, 1.0, 0.0]), atol=0.02)
    with Image.open(tmp_path / "rgb.png") as picture:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        plain = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert plain is not None
    ours = read_image(tmp_path / "rgb.png").permute(1, 2, 0).mul(255).round().numpy()
    assert np.array_equal(ours, np.asarray(plain))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, data in (("srgb", srgb), ("broken", b"no profile")):
        Image.new("RGB", (4, 4), (200, 60, 30)).save(tmp_path / f"{name}.png", icc_profile=data)
        assert read_image(tmp_path / f"{name}.png")[:, 0, 0].mul(255).tolist() == pytest.approx([200, 60, 30])


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_several_frames_the_first_is_read_and_the_log_says_so(
    suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with caplog.at_level(logging.WARNING):
        image = read_image(path)
        read_image(path)
    assert image[0].mean() > 0.9
    assert image[2].mean() < 0.1
    assert caplog.text.count("the first one is read") == 1
    frames[0].save(tmp_path / f"one.{suffix}")
    caplog.clear()
    read_image(tmp_path / f"one.{suffix}")
    assert not caplog.text
