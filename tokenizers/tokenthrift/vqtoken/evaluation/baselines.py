"""Baselines of VQToken: training-free reducers by their names in tables, and the counts and errors of comparisons.

The published comparison does not implement its baselines as their papers do ("ToMe" keeps the mean of the twelve most
similar pairs of a frame and drops everything else). These are the shared ones of `tokenthrift.reducers`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d

from tokenthrift.reducers import BipartiteMerging, ItemReducer, NormPruning, RandomSubset, TokenReducer, Uniform
from tokenthrift.reducers.base import Item
from tokenthrift.vqtoken.token_hash import Grid

__all__ = ["ADAPTIVE", "BASELINES", "COUNTS", "ERRORS", "OURS", "FramePooling", "baseline"]

OURS: Final = "VQToken"
ADAPTIVE: Final = "VQToken, adaptive"
BASELINES: Final = ("uniform", "random", "norm pruning", "merging (ToMe)", "frame pooling")
COUNTS: Final = (8, 16, 32, 64)
ERRORS: Final = (0.5, 0.4, 0.3, 0.2, 0.1)


def baseline(name: str, grid: Grid, seed: int = 0) -> TokenReducer:
    """A reducer by its name in `BASELINES`.

    Args:
        name: one of them.
        grid: frames, rows and columns of every clip.
        seed: of the one that draws at random.

    Raises:
        ValueError: no baseline has this name.
    """
    if name not in BASELINES:
        raise ValueError(f"no baseline is called {name!r}; known: {', '.join(BASELINES)}")
    reducers = (Uniform(), RandomSubset(seed), NormPruning(), BipartiteMerging(), FramePooling(grid))
    return dict(zip(BASELINES, reducers, strict=True))[name]


class FramePooling(ItemReducer):
    """Means over equal blocks of every frame, and of neighboring frames where there are fewer tokens than frames.

    Keeps as many frames as it can, then as many rows, then columns, all by halves; so counts are products of those.

    Args:
        grid: frames, rows and columns of every clip.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.shapes = {frames * rows * columns: (frames, rows, columns) for frames, rows, columns in _halvings(grid)}
        whole = grid[0] * grid[1] * grid[2]
        self.support = replace(ItemReducer.support, choices=tuple(n for n in sorted(self.shapes) if n < whole))

    def shrink(self, item: Item, cap: int) -> Item:
        """See `ItemReducer.shrink`."""
        if len(item.positions) != self.grid[0] * self.grid[1] * self.grid[2]:
            raise ValueError(f"a clip of {len(item.positions)} tokens is not of the grid {self.grid}")
        shape = self.shapes[cap]
        weights = item.weights()[:, None]
        pooled, mass = (self._mean(values, shape) for values in (item.embeddings * weights, weights))
        starts = [torch.arange(few) * many // few for few, many in zip(shape, self.grid, strict=True)]
        frame, row, column = (at.flatten() for at in torch.meshgrid(*starts, indexing="ij"))
        positions = ((frame * self.grid[1] + row) * self.grid[2] + column).to(item.positions.device)
        cells = len(item.positions) / cap
        return Item((pooled / mass).to(item.embeddings.dtype), item.positions[positions], None, mass[:, 0] * cells)

    def _mean(self, values: Tensor, shape: Grid) -> Tensor:
        volume = values.float().T.reshape(1, -1, *self.grid)
        return adaptive_avg_pool3d(volume, shape).flatten(2)[0].T


def _halvings(grid: Grid) -> list[Grid]:
    """Grids of divisors of each side; later ones of one size are the better: more frames, then squarer."""
    sides = [[n for n in range(1, side + 1) if side % n == 0] for side in grid]
    found: list[Grid] = [(t, h, w) for t, h, w in product(*sides)]
    return sorted(found, key=lambda shape: (shape[0], -abs(shape[1] - shape[2]), shape[1]))
