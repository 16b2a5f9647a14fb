"""Do tokens follow complexity? Pictures from nothing to noise, and a measure of what is in them.

Source: KARL (arXiv 2507.07995), section 5, which reads the number of tokens as an estimate of Kolmogorov complexity and
looks at noise, a chessboard, fractals and shuffled images. It says that chessboard and noise both take all tokens,
while its table says otherwise; here every family is drawn many times, and complexity has an independent measure: the
bytes of the picture as a JPEG file of quality 75, a code that knows nothing of the model.

The paper's second reading is kept: *structure* is what tokens buy, the error at few tokens minus that at all of them.
It is near 0 for noise, where no number of tokens helps, and for flat pictures, which need none.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenthrift import extras

__all__ = ["FAMILIES", "jpeg_bytes", "make", "shuffled"]


def _uniform(random: torch.Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=random)


def flat(size: int, random: torch.Generator) -> Tensor:
    """One color."""
    return _uniform(random, 3, 1, 1).expand(3, size, size)


def gradient(size: int, random: torch.Generator) -> Tensor:
    """One color fading into another, in any direction."""
    angle = 2 * torch.pi * _uniform(random, 1)
    line = torch.linspace(-0.7, 0.7, size)
    place = (line[:, None] * angle.sin() + line * angle.cos() + 1).div(2).clamp(0, 1)
    first, second = _uniform(random, 2, 3, 1, 1).unbind()
    return first + (second - first) * place


def chessboard(size: int, random: torch.Generator) -> Tensor:
    """Two colors in squares of an eighth of the side."""
    cell = torch.arange(size) * 8 // size
    dark = (cell[:, None] + cell) % 2
    first, second = _uniform(random, 3, 1, 1, high=0.4), _uniform(random, 3, 1, 1, low=0.6)
    return first + (second - first) * dark


def fractal(size: int, random: torch.Generator) -> Tensor:
    """A Julia set near the Mandelbrot set's edge, colored by the step at which points escape."""
    angle = 2 * torch.pi * _uniform(random, 1)
    # The edge of the main cardioid, a hair outside of it: rich sets of every shape.
    turn = torch.polar(torch.ones(1), angle)
    c = 1.02 * (turn / 2 - turn**2 / 4)
    line = torch.linspace(-1.4, 1.4, size)
    z = torch.complex(line.expand(size, size).clone(), line[:, None].expand(size, size).clone())
    step = torch.zeros(size, size)
    for _ in range(40):
        inside = z.abs() <= 2
        step += inside
        z = torch.where(inside, z * z + c, z)
    shade = step / 40
    phases = _uniform(random, 3, 1, 1)
    return 0.5 + 0.5 * (2 * torch.pi * (1.5 * shade + phases)).cos()


def noise(size: int, random: torch.Generator) -> Tensor:
    """Every pixel and channel at random."""
    return _uniform(random, 3, size, size)


FAMILIES: Mapping[str, Callable[[int, torch.Generator], Tensor]] = MappingProxyType(
    {"flat": flat, "gradient": gradient, "chessboard": chessboard, "fractal": fractal, "noise": noise}
)
"""Drawn families, from the size in pixels and a generator to `(3, size, size)` in [0, 1]."""


def make(family: str, count: int, size: int, seed: int = 0) -> Tensor:
    """Pictures `(count, 3, size, size)` in [0, 1] of one of `FAMILIES`."""
    random = torch.Generator().manual_seed(seed)
    return torch.stack([FAMILIES[family](size, random) for _ in range(count)])


def shuffled(images: Tensor, cells: int = 8, seed: int = 0) -> Tensor:
    """Images `(N, 3, H, W)` cut into `cells` x `cells` patches, in another order each."""
    random = torch.Generator().manual_seed(seed)
    height, width = images.shape[2] // cells, images.shape[3] // cells
    patches = F.unfold(images, (height, width), stride=(height, width))
    order = torch.stack([torch.randperm(patches.shape[2], generator=random) for _ in images])
    mixed = patches.gather(2, order[:, None].expand_as(patches))
    return F.fold(mixed, (height * cells, width * cells), (height, width), stride=(height, width))


def jpeg_bytes(images: Tensor) -> list[int]:
    """Size of each image `(N, 3, H, W)` in [0, 1] as a JPEG file of quality 75, without its fixed tables."""
    pillow = extras.require("PIL.Image")

    def size(image: Tensor) -> int:
        file = io.BytesIO()
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        pillow.fromarray(pixels).save(file, "JPEG", quality=75)
        return file.tell()

    return [size(image) - size(torch.full_like(image, 0.5)) for image in images]
