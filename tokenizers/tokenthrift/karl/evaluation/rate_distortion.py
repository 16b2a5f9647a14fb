"""Bytes against quality, beside the image formats that everybody has: JPEG, WebP and AVIF by Pillow.

KARL (arXiv 2507.07995) counts tokens and compares with other tokenizers. A byte count is comparable with anything: of a
format that of the whole file, without color profile or metadata, at its lowest quality the smallest file that it can
write; of KARL that of `Karl.to_bytes` for the image alone, its frame of four bytes and checksum included. JPEG's tables
alone take some 600 bytes, so at 64 pixels its header is most of the file; this is said in the note of the table.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from tokenthrift import extras
from tokenthrift.evaluation.report import Table
from tokenthrift.karl.bits import BitFormat
from tokenthrift.karl.evaluation.metrics import psnr, ssim
from tokenthrift.karl.evaluation.sweeps import at_counts, prepare
from tokenthrift.karl.latent.conditioning import pixel_error
from tokenthrift.karl.model import Karl

__all__ = ["FORMATS", "Point", "coded", "format_points", "karl_points", "rate_table"]

FORMATS: Final[dict[str, dict[str, Any]]] = {
    "JPEG": {"format": "JPEG", "optimize": True, "subsampling": 2},
    "WebP": {"format": "WEBP", "method": 4},
    "AVIF": {"format": "AVIF", "speed": 8, "subsampling": "4:2:0"},
}
"""What Pillow's `save` is told besides the quality: each format's means of writing small files."""
QUALITIES: Final = (0, 5, 10, 20, 35, 50, 65, 80)


class Point(NamedTuple):
    """Means over a set of images."""

    way: str
    setting: str
    bytes: float
    l1: float
    psnr: float
    ssim: float


def coded(image: Tensor, name: str, quality: int) -> tuple[int, Tensor]:
    """Size in bytes of an image `(3, H, W)` uint8 in a format, and what is read back, uint8."""
    pil = extras.require("PIL.Image")
    file = io.BytesIO()
    pil.fromarray(image.permute(1, 2, 0).numpy()).save(file, quality=quality, **FORMATS[name])
    with pil.open(file) as read:
        made = torch.frombuffer(bytearray(read.convert("RGB").tobytes()), dtype=torch.uint8)
    return len(file.getvalue()), made.view(image.shape[1], image.shape[2], 3).permute(2, 0, 1)


def format_points(images: Tensor, qualities: Sequence[int] = QUALITIES) -> Iterator[Point]:
    """Every format at every quality, over images `(N, 3, H, W)` uint8."""
    exact = images.float() / 255
    for name in FORMATS:
        for quality in qualities:
            sizes, made = zip(*(coded(image, name, quality) for image in images), strict=True)
            yield _point(name, f"quality {quality}", sum(sizes) / len(sizes), torch.stack(made).float() / 255, exact)


def karl_points(karl: Karl, images: Tensor, counts: Sequence[int], batch: int = 64) -> Iterator[Point]:
    """A model at every number of tokens, over images `(N, 3, H, W)` uint8."""
    layout, exact = BitFormat.of(karl.config), images.float() / 255
    made: list[list[Tensor]] = [[] for _ in counts]
    for items in prepare(karl, images, batch):
        for found, one in zip(made, at_counts(karl, items, counts), strict=True):
            found.append(one.cpu())
    for count, parts in zip(counts, made, strict=True):
        yield _point("KARL", f"{count} tokens", layout.string_bits([count]) / 8, torch.cat(parts), exact)


def rate_table(name: str, points: Sequence[Point]) -> Table:
    """All points of a set of images, a row each."""
    return Table(
        title=f"{name}: bytes against quality",
        columns=("way", "setting", "bytes", "L1", "PSNR (dB)", "SSIM"),
        rows=tuple(points),
        note="Whole files and whole byte strings of one image. The first quality of a format is its smallest file.",
    )


def _point(way: str, setting: str, size: float, made: Tensor, images: Tensor) -> Point:
    figures = (metric(made, images).double().mean().item() for metric in (pixel_error, psnr, ssim))
    return Point(way, setting, size, *figures)
