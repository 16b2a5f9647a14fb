"""Whether tokens follow complexity: families of images from flat color to noise, and a measure of what is in them.

Source: KARL (arXiv 2507.07995), section 5, which reads the number of tokens as an estimate of Kolmogorov complexity and
looks at noise, a chessboard, fractals and shuffled images. It says that chessboard and noise both take all tokens,
while its table says otherwise. Here every family is drawn many times, and complexity has an independent measure: the
bytes of the image as a JPEG file of quality 75, a code that knows nothing of the model.

The paper's second reading is kept: *structure* is the error at few tokens minus that at all of them. It is near 0 for
noise, where no number of tokens helps, and for flat images, which need none.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenthrift import extras
from tokenthrift.evaluation.report import Cell, Table
from tokenthrift.karl.evaluation.metrics import spearman
from tokenthrift.karl.evaluation.sweeps import at_counts, at_errors, prepare
from tokenthrift.karl.latent.conditioning import pixel_error
from tokenthrift.karl.model import Karl

__all__ = ["FAMILIES", "Complexity", "complexity_of", "complexity_table", "families", "jpeg_bytes", "make", "shuffled"]

IMAGES = 40  # of each family


def _uniform(random: torch.Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=random)


def flat(size: int, random: torch.Generator) -> Tensor:
    """One color."""
    return _uniform(random, 3, 1, 1).expand(3, size, size)


def gradient(size: int, random: torch.Generator) -> Tensor:
    """One color fading into another, in any direction."""
    angle = 2 * torch.pi * _uniform(random, 1)
    line = torch.linspace(-0.7, 0.7, size)
    shade = (line[:, None] * angle.sin() + line * angle.cos() + 1).div(2).clamp(0, 1)
    first, second = _uniform(random, 2, 3, 1, 1).unbind()
    return first + (second - first) * shade


def chessboard(size: int, random: torch.Generator) -> Tensor:
    """Two colors in squares of an eighth of the side."""
    cell = torch.arange(size) * 8 // size
    dark = (cell[:, None] + cell) % 2
    first, second = _uniform(random, 3, 1, 1, high=0.4), _uniform(random, 3, 1, 1, low=0.6)
    return first + (second - first) * dark


def fractal(size: int, random: torch.Generator) -> Tensor:
    """A Julia set near the Mandelbrot set's edge, colored by the step at which points escape."""
    angle = 2 * torch.pi * _uniform(random, 1)
    # The edge of the main cardioid, slightly outside of it: detailed sets of every shape.
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
    """Images `(count, 3, size, size)` in [0, 1] of one of `FAMILIES`."""
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


@dataclass(frozen=True, slots=True)
class Complexity:
    """What a model gives to the images of one family."""

    bytes: list[int]
    """Of each image as a JPEG file."""
    tokens: list[int]
    """Of each image."""
    error: float
    structure: float
    examples: list[tuple[Tensor, Tensor, int, float]]
    """Original, reconstruction, tokens and error of a few images."""


def families(karl: Karl, test: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Images `(N, 3, H, W)` in [0, 1] by family: drawn ones, those of the test sets, and these shuffled."""
    height, width = karl.config.size
    drawn = {family: make(family, IMAGES, max(height, width), seed) for family in FAMILIES}
    found = {family: images[..., :height, :width] for family, images in drawn.items()}
    for name, images in test.items():
        found[name] = images[:IMAGES].float() / 255
        found[f"{name}, shuffled"] = shuffled(found[name], seed=seed)
    return found


def complexity_of(karl: Karl, images: Tensor, target: float) -> Complexity:
    """Measures one family.

    Args:
        karl: the model.
        images: `(N, 3, H, W)` in [0, 1].
        target: error.
    """
    (items,) = prepare(karl, images, len(images))
    tokens, made = at_errors(karl, items, target)
    most = karl.config.max_tokens
    few, whole = (pixel_error(m, items.images) for m in at_counts(karl, items, [max(1, most // 8), most]))
    errors = pixel_error(made, items.images)
    return Complexity(
        bytes=jpeg_bytes(items.images),
        tokens=tokens.tolist(),
        error=errors.mean().item(),
        structure=(few - whole).mean().item(),
        examples=list(zip(items.images[:6], made[:6], tokens[:6].tolist(), errors[:6].tolist(), strict=True)),
    )


def complexity_table(found: Mapping[str, Complexity]) -> Table:
    """All families, the simplest first."""
    rows: list[tuple[Cell, ...]] = []
    for family, one in sorted(found.items(), key=lambda item: sum(item[1].bytes)):
        count = len(one.tokens)
        rows.append((family, count, sum(one.bytes) / count, sum(one.tokens) / count, one.error, one.structure))
    sizes, tokens = (
        torch.tensor([value for one in found.values() for value in getattr(one, name)]) for name in ("bytes", "tokens")
    )
    return Table(
        title="Tokens against complexity",
        columns=("family", "images", "bytes as JPEG", "tokens", "L1", "structure"),
        rows=tuple(rows),
        note=f"Spearman of tokens and bytes over all {len(sizes)} images: {spearman(tokens, sizes):.3f}. Structure: L1 "
        "at an eighth of the tokens minus L1 at all of them.",
    )
