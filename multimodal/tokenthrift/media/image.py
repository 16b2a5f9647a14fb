"""Picture files to tensors: any common format and mode to (3, height, width) float32 in [0, 1].

What is promised of every file that is read, each with its test (`docs/media.md`):

- Turned as its EXIF or TIFF orientation says, in `image_size` and `read_image` alike.
- On white where it is transparent, in every mode that can be, the one transparent value of 16-bit PNG files included.
- In sRGB: a color profile is converted from, except of 16-bit grey; a broken profile is as good as none.
- In full range: integers by the bits that the file states (12-bit TIFF by 4095). Floats in [0, 1] stay; others are
  divided by 255 or 65535, the smaller that holds them, if their largest uses a sixteenth of it, else stretched from
  their least to their greatest. Signed or 32-bit integers beyond 65535 are stretched as well. NaN is black.
- Of an animation or a file of several pages, the first frame; the log says so, once a file.
- A file that is not whole, claims more than `MAX_PIXELS` or is no picture raises :class:`ImageError`; so does
  PostScript, which Pillow would run. `image_size` decodes nothing. Pictures are worked on in strips, so that memory is
  that of the result (12 bytes a pixel) and of the picture as Pillow holds it.

Differs from the usual `Image.open(path).convert("RGB")`: that ignores orientation and profiles, makes transparent
pixels whatever color hides under them (mostly black), cuts 16-bit grey and floats off at 255, and only warns about a
decompression bomb.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tokenthrift import extras
from tokenthrift.media.errors import MediaError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageError", "image_from", "image_size", "read_image", "read_image_bytes", "square"]

MAX_PIXELS: Final = 100_000_000
"""Most pixels of a picture; a few bytes can claim many gigabytes."""

_STRIP_PIXELS: Final = 250_000
_PROGRAMS: Final = ("EPS", "WMF")
_ORIENTATION: Final = 0x0112  # EXIF tag
_BITS_PER_SAMPLE: Final = 258  # TIFF tag
_SIDEWAYS: Final = (5, 6, 7, 8)
_WIDE_GREY: Final = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")


class ImageError(MediaError):
    """A file that gives no whole picture; `path` is the file and `reason` says why, fit for a report."""


def read_image(path: str | Path) -> Tensor:
    """Reads a picture as it is meant to be seen.

    Returns:
        (3, height, width) float32 in [0, 1].

    Raises:
        ImageError: The file cannot be read, is damaged, cut short, no picture, or larger than `MAX_PIXELS`.
        MissingExtraError: Pillow is not installed.
    """
    with _opened(Path(path)) as picture:
        return image_from(picture)


def read_image_bytes(data: bytes, name: str | Path) -> Tensor:
    """As `read_image`, of a file's bytes.

    Args:
        data: The bytes.
        name: What an `ImageError` calls them.
    """
    with _opened(Path(name), io.BytesIO(data)) as picture:
        return image_from(picture)


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width of a picture as it is meant to be seen, from its header alone.

    Raises:
        ImageError: The header cannot be read, or the picture is larger than `MAX_PIXELS`.
        MissingExtraError: Pillow is not installed.
    """
    with _opened(Path(path)) as picture:
        width, height = picture.size
        # Pillow gives the size of a TIFF as it is turned already.
        turned = picture.format != "TIFF" and _exif(picture).get(_ORIENTATION) in _SIDEWAYS
    return (width, height) if turned else (height, width)


def image_from(picture: Image) -> Tensor:
    """A Pillow image of any mode as (3, height, width) float32 in [0, 1]: turned, on white, in sRGB."""
    # Both are gone once the pixels are loaded.
    bits = int(getattr(picture, "tag_v2", {}).get(_BITS_PER_SAMPLE, (0,))[0])
    deep = any("16" in str(part[3]) for part in getattr(picture, "tile", ()) if len(part) > 3)
    if picture.getexif().get(_ORIENTATION, 1) != 1:  # without one, a copy would be made
        picture = extras.require("PIL.ImageOps").exif_transpose(picture)
    clear = picture.info.get("transparency")
    if picture.mode in _WIDE_GREY:
        grey = np.asarray(picture).astype(np.float32)
        scaled = _full_range(grey, bits if picture.mode.startswith("I;") else 0, is_float=picture.mode == "F")
        if isinstance(clear, int):
            scaled = np.where(grey == clear, np.float32(1), scaled)
        return torch.from_numpy(scaled).expand(3, -1, -1).contiguous()
    if picture.mode == "RGB" and deep and isinstance(clear, tuple):
        picture = picture.copy()
        picture.info["transparency"] = tuple(value >> 8 for value in clear)  # as Pillow does with the pixels
    picture.load()
    width, height = picture.size
    result = torch.empty(3, height, width)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = picture.crop((0, top, width, min(top + rows, height)))
        pixels = torch.from_numpy(np.array(_on_white(strip, picture.info.get("icc_profile"))))
        torch.div(pixels.permute(2, 0, 1), 255, out=result[:, top : top + rows])
    return result


def _on_white(picture: Any, profile: bytes | None) -> Any:
    """A picture of a mode of at most 8 bits a channel as RGB, in sRGB, and white where it is transparent."""
    if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        # Premultiplied modes lead to RGB only through their straight form.
        straight = {"La": "LA", "RGBa": "RGBA"}.get(picture.mode, picture.mode)
        grey_profile = straight in ("L", "LA")
        picture = picture.convert(straight).convert("RGBA")
        colors = _in_srgb(picture.convert("L" if grey_profile else "RGB"), profile).convert("RGBA")
        colors.putalpha(picture.getchannel("A"))
        white = extras.require("PIL.Image").new("RGBA", picture.size, "white")
        white.alpha_composite(colors)
        return white.convert("RGB")
    if picture.mode == "P":
        picture = picture.convert("RGB")
    return _in_srgb(picture, profile).convert("RGB")


def _exif(picture: Any) -> Any:
    """EXIF without decoding the picture, which Pillow does for PNG files, where it may stand behind the pixels."""
    if picture.format != "PNG" or _png_says_more_behind(picture.fp):
        return picture.getexif()
    return super(type(picture), picture).getexif()


def _png_says_more_behind(file: Any) -> bool:
    """Whether a chunk that may hold EXIF stands behind the first chunk of pixels; leaves the file where it was."""
    start, at, pixels = file.tell(), 8, False
    try:
        while file.seek(at) == at and len(head := file.read(8)) == 8 and head[4:] != b"IEND":
            pixels = pixels or head[4:] == b"IDAT"
            if pixels and head[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            at += 12 + int.from_bytes(head[:4], "big")
        return False
    finally:
        file.seek(start)


def _full_range(grey: NDArray[np.float32], bits: int, *, is_float: bool) -> NDArray[np.float32]:
    """Grey of any range in [0, 1]; see the file's docstring."""
    if bits or (not is_float and grey.max() <= 65535 and grey.min() >= 0):
        return np.asarray((grey / (2.0 ** (bits or 16) - 1)).clip(0, 1), dtype=np.float32)
    finite = grey[np.isfinite(grey)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    full = next((full for full in (1.0, 255.0, 65535.0) if high <= full), 0.0) if low >= 0 else 0.0
    if full > 1 and high < full / 16:
        full = 0.0
    scaled = grey / full if full else (grey - low) / max(high - low, 1e-12)
    return np.asarray(np.nan_to_num(scaled, nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1), dtype=np.float32)


def _in_srgb(picture: Any, profile: bytes | None) -> Any:
    """Converts from a color profile; the picture itself where there is none, it is sRGB or it makes no sense."""
    if not profile or picture.mode not in ("L", "RGB", "CMYK", "LAB"):
        return picture
    cms = extras.require("PIL.ImageCms")
    try:
        source = cms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in cms.getProfileDescription(source).lower():
            return picture
        return cms.profileToProfile(picture, source, cms.createProfile("sRGB"), outputMode="RGB")
    except (cms.PyCMSError, OSError, ValueError, TypeError):
        return picture


@lru_cache(maxsize=4096)
def _say_first_frame(path: Path) -> None:
    logging.getLogger("tokenthrift.media").warning("%s: it has several frames; the first one is read", path)


def square(image: Tensor, size: int) -> Tensor:
    """The middle square of a picture, scaled; the paper's own preparation (bicubic, then centre crop).

    Args:
        image: (3, height, width) in [0, 1].
        size: Side wanted, in pixels.

    Returns:
        (3, size, size) in [0, 1]; the picture itself where it has that size.
    """
    if image.shape[1:] == (size, size):
        return image
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    # Cropping first gives the same pixels away from the border and never makes the huge side of a thin strip.
    middle = image[None, :, top : top + side, left : left + side]
    scaled = F.interpolate(middle, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return scaled[0].clamp(0, 1)


@contextmanager
def _opened(path: Path, stream: io.BytesIO | None = None) -> Iterator[Any]:
    """An open picture of a sane size, of a path or else of bytes; what goes wrong inside becomes an ImageError."""
    pillow = extras.require("PIL.Image")
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures and of odd metadata; size is judged here and metadata is not used.
            warnings.simplefilter("ignore")
            with pillow.open(stream or path) as picture:
                if picture.format in _PROGRAMS:
                    raise ImageError(path, f"{picture.format} is a program that draws, not a picture")
                width, height = picture.size
                if width * height > MAX_PIXELS:
                    raise ImageError(path, f"{width} x {height} pixels; at most {MAX_PIXELS:,} are read")
                if not width * height:
                    raise ImageError(path, "empty: no pixels")
                # A phone's second picture (MPO) is a preview or the depth.
                if picture.format != "MPO" and getattr(picture, "is_animated", False):
                    _say_first_frame(path)
                yield picture
    except ImageError:
        raise
    except pillow.UnidentifiedImageError:
        size = path.stat().st_size if stream is None else len(stream.getbuffer())
        reason = "empty: a file of 0 bytes" if size == 0 else "not a picture of a known format"
        raise ImageError(path, reason) from None
    except OSError as error:
        if error.strerror:
            raise ImageError(path, f"cannot be read: {error.strerror}") from error
        raise ImageError(path, f"corrupt or cut short: {error}") from error
    except pillow.DecompressionBombError:
        raise ImageError(path, f"claims too many pixels; at most {MAX_PIXELS:,} are read") from None
    except Exception as error:  # Pillow's decoders raise SyntaxError, struct.error, IndexError ... on hostile bytes.
        raise ImageError(path, f"corrupt: {str(error) or type(error).__name__}") from error
