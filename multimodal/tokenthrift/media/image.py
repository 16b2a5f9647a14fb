"""Picture files to tensors: any common format and mode to (3, height, width) float32 in [0, 1].

A picture is turned as its EXIF orientation says, put on white where it is transparent, and brought from grey, palette,
16 bit, CMYK or whatever else to red, green and blue. Of an animation the first frame is taken. A file that is not
whole, claims an absurd size or is no picture raises :class:`ImageError`, which a batch job reports before it goes on.

Differs from the usual `Image.open(path).convert("RGB")`: that ignores orientation, makes transparent pixels whatever
colour hides under them (mostly black), cuts 16-bit grey off at 255, and only warns about a decompression bomb.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tokenthrift import extras
from tokenthrift.media.errors import MediaError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageError", "image_from", "image_size", "read_image", "read_image_bytes", "square"]

MAX_PIXELS: Final = 100_000_000
"""Most pixels of a picture; a few bytes can claim many gigabytes."""

_ORIENTATION: Final = 0x0112  # EXIF tag
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
        turned = picture.getexif().get(_ORIENTATION) in _SIDEWAYS
    return (width, height) if turned else (height, width)


def image_from(picture: Image) -> Tensor:
    """A Pillow image of any mode as (3, height, width) float32 in [0, 1]: turned, on white, in RGB."""
    picture = extras.require("PIL.ImageOps").exif_transpose(picture)
    if picture.mode in _WIDE_GREY:
        grey = np.asarray(picture).astype(np.float32)
        # Pillow gives 16-bit grey as 32-bit integers for some formats; floats are taken to be in [0, 1] already.
        full = 1.0 if picture.mode == "F" else 65535.0
        return torch.from_numpy(np.nan_to_num(grey / full).clip(0, 1)).expand(3, -1, -1).contiguous()
    if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        # Premultiplied modes lead to RGB only through their straight form.
        straight = {"La": "LA", "RGBa": "RGBA"}.get(picture.mode, picture.mode)
        picture = picture.convert(straight).convert("RGBA")
        white = extras.require("PIL.Image").new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        picture = white
    pixels = np.array(picture.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255


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
                width, height = picture.size
                if width * height > MAX_PIXELS:
                    raise ImageError(path, f"{width} x {height} pixels; at most {MAX_PIXELS:,} are read")
                if not width * height:
                    raise ImageError(path, "empty: no pixels")
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
