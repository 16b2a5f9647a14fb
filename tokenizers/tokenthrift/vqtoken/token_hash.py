"""The token hash: which cluster every cell of a clip belongs to, and what follows from it for every code.

Source: VQToken (arXiv 2503.16980, section 3.3): the map of cluster numbers M over (T, H, W) is the "token hash", from
which attention learns motion. Two things differ from the published code.

* Order. The published code numbers clusters in the order of its random seeds, or (2026) by first occurrence, where one
  patch at the start of a clip decides. Here the cell in the middle of a cluster decides: mean time in whole frames,
  then mean row, then mean column. These are integers, so the order is the same on every device.
* Features. The published code feeds the rows of M, integers as they are, into a linear layer of 729 inputs.
  Relabeling the same partition then changes the output of a fresh model by 72 %, bf16 cannot tell numbers above 256
  apart, and only one grid size fits. Here moments of the cells that it covers describe each cluster. New numbers
  renumber the descriptions and change nothing else, and any T, H and W fit.

Sums are integers, so descriptions are the same on every device and in every batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = [
    "FEATURES",
    "Grid",
    "Layout",
    "central_cells",
    "describe",
    "first_tokens",
    "increasing",
    "layout_of",
    "ranks",
    "with_time",
]


OCTAVES = 6
TIMES = 8
SIDE = 4
FEATURES = 2 + 3 + 6 * OCTAVES + 3 + 3 + 4 + TIMES + 2 * TIMES + SIDE * SIDE

Grid: TypeAlias = tuple[int, int, int]
"""Frames, rows and columns of a clip; its tokens fill it in raster order, frame after frame."""


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where the tokens of B clips lie.

    Attributes:
        cells: (B, N, 3) int64 frame, row and column of every token, zero in padding.
        sides: (B, 3) int64 frames, rows and columns of every clip, at least 1.
    """

    cells: Tensor
    sides: Tensor


def layout_of(mask: Tensor, grids: Sequence[Grid] | None) -> Layout:
    """The layout of clips.

    Args:
        mask: (B, N) bool, True where a token is real.
        grids: Of every clip; one token a frame if not given.

    Raises:
        ValueError: A grid has not as many cells as its clip has tokens.
    """
    sizes = mask.sum(1).tolist()
    if grids is None:
        grids = [(n, 1, 1) for n in sizes]
    for grid, n in zip(grids, sizes, strict=True):
        if grid[0] * grid[1] * grid[2] != n:
            raise ValueError(f"a grid of {' x '.join(map(str, grid))} cells does not hold {n} tokens")
    sides = torch.tensor(grids, dtype=torch.long, device=mask.device).view(-1, 3).clamp(min=1)
    index = (mask.long().cumsum(1) - 1).masked_fill(~mask, 0)
    height, width = sides[:, 1:2], sides[:, 2:3]
    cells = torch.stack([index // (height * width), index // width % height, index % width], 2)
    return Layout(cells, sides)


def with_time(unit: Tensor, mask: Tensor, layout: Layout, share: float) -> Tensor:
    """Unit tokens that also say when they are: (B, N, D + 2), on the same grid of 2^-26.

    Their inner product is `1 - share` times that of the tokens, and `share` times the cosine of their distance in time,
    where the length of the clip is half a turn: from 1 in the same frame to nearly -1 between the first and the last.
    So everything that clusters unit vectors serves as it is, and a cluster becomes a part of the clip.

    Args:
        unit: (B, N, D) float32 as from `clustering.unit_tokens`.
        mask: (B, N) bool.
        layout: Of the same clips.
        share: From 0 to 1.
    """
    # On the CPU, as sines of other devices differ in their last bits.
    angle = math.pi * layout.cells[..., 0].cpu().double() / layout.sides[:, :1].cpu()
    when = torch.stack([angle.cos(), angle.sin()], 2).to(unit.device) * share**0.5 * mask[..., None]
    joined = torch.cat([unit.double() * (1 - share) ** 0.5, when], 2)
    return (joined * 2.0**26).round_().mul_(2.0**-26).float()


def central_cells(labels: Tensor, layout: Layout, slots: int) -> Tensor:
    """The cell in the middle of every cluster, as its index in the raster of the clip: (B, slots) int64.

    Args:
        labels: (B, N) int64, -1 in padding.
        layout: Of the same clips.
        slots: Number of clusters; an empty one lies at index 0.
    """
    batch = len(labels)
    slot = labels.where(labels >= 0, slots)
    counts = slot.new_zeros(batch, slots + 1).scatter_add(1, slot, torch.ones_like(slot))[:, :slots, None]
    sums = slot.new_zeros(batch, slots + 1, 3).scatter_add(1, slot[..., None].expand(-1, -1, 3), layout.cells)
    middle = (2 * sums[:, :slots] + counts) // (2 * counts).clamp(min=1)
    height, width = layout.sides[:, 1:2], layout.sides[:, 2:3]
    return (middle[..., 0] * height + middle[..., 1]) * width + middle[..., 2]


def first_tokens(labels: Tensor, slots: int) -> Tensor:
    """The first column of every cluster: (B, slots) int64, N for an empty one."""
    column = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    first = labels.new_full((len(labels), slots + 1), labels.shape[1])
    return first.scatter_reduce(1, labels.where(labels >= 0, slots), column, "amin")[:, :slots]


def ranks(keys: Sequence[Tensor]) -> Tensor:
    """The rank of every slot in the order by several (B, slots) keys, the first the weightiest: (B, slots) int64."""
    order = torch.arange(keys[0].shape[1], device=keys[0].device).expand_as(keys[0])
    for key in reversed(keys):
        order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    return order.argsort(dim=1)


def increasing(cells: Tensor, sizes: Tensor, counts: Tensor) -> Tensor:
    """Moves ascending cells as little as needed to be distinct: (B, slots) int64, strictly increasing below `sizes`.

    Args:
        cells: (B, slots) int64, not descending over the slots in use.
        sizes: (B,) cells of every clip.
        counts: (B,) slots in use, the first ones, at most `sizes`.
    """
    slot = torch.arange(cells.shape[1], device=cells.device)
    risen = (cells - slot).cummax(1).values + slot
    return risen.minimum((sizes - counts)[:, None] + slot)


def describe(labels: Tensor, layout: Layout, slots: int) -> Tensor:
    """Position, extent, lifetime and motion of every cluster, in units of the clip.

    In this order: share of the tokens, plain and logarithmic (2); mean time, row and column (3), and sines and cosines
    of them at six octaves (36); their standard deviations (3); first and last time and the share of frames in which it
    is seen (3); drift of row and column over its lifetime and their correlation with time (4); the share of its
    tokens in each eighth of the clip (8), and how far its mean row and column are from its center there (16); the share
    of its tokens in each cell of a 4 x 4 grid over the frame (16).

    Args:
        labels: (B, N) int64, -1 in padding.
        layout: Of the same clips.
        slots: Number of clusters; an empty one is described by zeros.

    Returns:
        (B, slots, FEATURES) float32.
    """
    batch = len(labels)
    slot = labels.where(labels >= 0, slots)
    time, row, column = cells = layout.cells.unbind(2)
    ones = torch.ones_like(time)
    products = (ones, *cells, time * time, row * row, column * column, time * row, time * column)
    sums = slot.new_zeros(batch, slots + 1, len(products))
    sums = sums.scatter_add(1, slot[..., None].expand(-1, -1, len(products)), torch.stack(products, 2))[:, :slots]
    count = sums[..., 0].double()
    some, one = count > 0, count.clamp(min=1)
    sides = layout.sides[:, None].double()
    mean = sums[..., 1:4] / one[..., None]
    center = (mean + 0.5) / sides
    variance = (sums[..., 4:7] / one[..., None] - mean.square()).clamp(min=0)
    with_time = sums[..., 7:9] / one[..., None] - mean[..., :1] * mean[..., 1:]
    spread = variance.sqrt() / sides

    frames = int(layout.sides[:, 0].max())
    seen = _count(slot * frames + time, (slots + 1) * frames).view(batch, slots + 1, frames)[:, :slots] > 0
    duration = sides[..., 0]
    first = seen.long().argmax(2)
    last = frames - 1 - seen.flip(2).long().argmax(2)
    life = [first / duration, (last + 1) / duration, seen.sum(2) / duration]

    drift = with_time / variance[..., :1].clamp(min=1e-9) * (last - first)[..., None] / sides[..., 1:]
    correlation = with_time / (variance[..., :1] * variance[..., 1:]).sqrt().clamp(min=1e-9)
    still = variance[..., :1] < 1e-9
    drift, correlation = (motion.masked_fill(still, 0.0).clamp(-2, 2) for motion in (drift, correlation))

    eighth = slot * TIMES + time * TIMES // layout.sides[:, :1]
    when = [
        _count(eighth, (slots + 1) * TIMES, values).view(batch, slots + 1, TIMES)[:, :slots]
        for values in (ones, row, column)
    ]
    there = when[0] > 0
    path = [
        ((position / when[0].clamp(min=1) + 0.5) / sides[..., axis : axis + 1] - center[..., axis : axis + 1]) * there
        for axis, position in ((1, when[1]), (2, when[2]))
    ]
    height, width = layout.sides[:, 1:2], layout.sides[:, 2:3]
    part = (slot * SIDE + row * SIDE // height) * SIDE + column * SIDE // width
    where = _count(part, (slots + 1) * SIDE * SIDE).view(batch, slots + 1, -1)[:, :slots]

    share = count / count.sum(1, keepdim=True).clamp(min=1)
    logarithmic = count.clamp(min=1).log() / count.sum(1, keepdim=True).clamp(min=2).log()
    waves = center[..., None] * (math.pi * 2.0 ** torch.arange(OCTAVES, device=labels.device))
    features = torch.cat(
        [
            torch.stack([share, logarithmic], 2),
            center,
            waves.sin().flatten(2),
            waves.cos().flatten(2),
            spread,
            torch.stack(life, 2),
            drift,
            correlation,
            when[0] / one[..., None],
            *path,
            where / one[..., None],
        ],
        2,
    )
    return features.masked_fill(~some[..., None], 0.0).float()


def _count(indices: Tensor, size: int, values: Tensor | None = None) -> Tensor:
    """(B, size) int64: how often each index occurs, or the sum of values there."""
    values = torch.ones_like(indices) if values is None else values
    return indices.new_zeros(len(indices), size).scatter_add(1, indices, values)
