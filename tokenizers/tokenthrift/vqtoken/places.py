"""Where clusters lie in their clip: cells of the (T, H, W) grid, and the order of clusters by them.

Ours: the published code numbers clusters as the random seeds fell, or (2026) by first occurrence, which puts a cluster
that lives at the end of a clip first if a single patch at the start belongs to it. Here the cell in the middle of a
cluster decides: mean time in whole frames, then mean row, then mean column, in integers, so the order is the same on
every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Grid", "Layout", "central_cells", "first_tokens", "increasing", "layout_of", "ranks"]

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
    place = (mask.long().cumsum(1) - 1).masked_fill(~mask, 0)
    height, width = sides[:, 1:2], sides[:, 2:3]
    cells = torch.stack([place // (height * width), place // width % height, place % width], 2)
    return Layout(cells, sides)


def central_cells(labels: Tensor, layout: Layout, slots: int) -> Tensor:
    """The cell in the middle of every cluster, as its place in the raster of the clip: (B, slots) int64.

    Args:
        labels: (B, N) int64, -1 in padding.
        layout: Of the same clips.
        slots: Number of clusters; an empty one lies at place 0.
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
    """The place of every slot in the order by several (B, slots) keys, the first the weightiest: (B, slots) int64."""
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
