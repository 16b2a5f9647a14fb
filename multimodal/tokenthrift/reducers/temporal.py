"""Merging of static patches over time: EVS (arXiv 2510.14624) and DyCoke (arXiv 2411.15024), as a reducer of videos.

A patch that looks as it did one frame before says little new. Every token is compared with the token of its cell in the
frame before; the most similar ones are joined to it, until the planned count is left. Tokens of a run of static frames
so become one, which has the position of the first, and its size says how many frames it stands for.

Differs from the published code: EVS drops static patches and DyCoke those of every second frame in groups of four, each
by a rate for the whole clip; here they are averaged, weighted by size, the count is exact for each clip, the similarity
is that of the tokens (EVS compares pixels before the encoder; `attach(..., at="encoder")` is the place for that), and
DyCoke's second part, which prunes the cache while decoding, is not done. A budget below one token for each cell is met
by bipartite merging of what is left. Tokens behind the grid (a newline) are of no frame and stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from tokenthrift.budget import BudgetLike
from tokenthrift.reducers.base import Item, ItemReducer
from tokenthrift.reducers.diversity import unit_rows
from tokenthrift.reducers.merging import BipartiteMerging, merge
from tokenthrift.tokens import TokenBatch

__all__ = ["TemporalMerging", "static_groups"]


def static_groups(embeddings: Tensor, grid: tuple[int, int, int], merges: int) -> Tensor:
    """Which token each token becomes part of: itself, or the first of its run of static frames.

    Args:
        embeddings: (N, D), the first T * H * W of them the cells of the frames in raster order.
        grid: T, H, W.
        merges: How many tokens to give up, at most (T - 1) * H * W.

    Returns:
        (N,) int64.
    """
    frames, cells = grid[0], grid[1] * grid[2]
    unit = unit_rows(embeddings[: frames * cells]).unflatten(0, (frames, cells))
    alike = (unit[1:] * unit[:-1]).sum(-1).flatten()
    static = alike.argsort(descending=True, stable=True)[:merges] + cells
    joined = torch.zeros(frames * cells, dtype=torch.bool, device=embeddings.device)
    joined[static] = True
    index = torch.arange(frames * cells, device=embeddings.device)
    # The first of a run is the latest token of the cell that was not joined.
    first = torch.where(joined, -1, index).view(frames, cells).cummax(0).values.flatten()
    rest = torch.arange(frames * cells, len(embeddings), device=embeddings.device)
    return torch.cat([first, rest])


class TemporalMerging(ItemReducer):
    """Joins patches that do not change from one frame to the next (EVS, DyCoke).

    It needs the `grids` of the clips; without them every token is a frame of its own. A picture is a clip of one frame.
    """

    modalities: ClassVar[tuple[str, ...]] = ("video",)
    """What `attach` reduces if its caller names nothing else; pictures stay whole."""

    def reduce(self, tokens: TokenBatch, budget: BudgetLike | Sequence[BudgetLike]) -> TokenBatch:
        """See `TokenReducer.reduce`.

        Raises:
            ValueError: Besides the reasons there, a grid has more cells than its item has tokens.
        """
        counts = tokens.mask.sum(1).tolist()
        grids = [(n, 1, 1) for n in counts] if tokens.grids is None else list(tokens.grids)
        for i, ((t, h, w), n) in enumerate(zip(grids, counts, strict=True)):
            if t * h * w > n:
                raise ValueError(f"item {i} has {n} tokens, which do not fill its grid of {t} x {h} x {w}")
        return self.reduce_each(tokens, budget, [partial(self.shrink, grid=grid) for grid in grids])

    def shrink(self, item: Item, cap: int, grid: tuple[int, int, int] | None = None) -> Item:
        """See `ItemReducer.shrink`."""
        if cap == 0:
            return item.select(item.positions[:0])
        frames, height, width = grid or (len(item.positions), 1, 1)
        surplus = len(item.positions) - cap
        merges = min(surplus, max(frames - 1, 0) * height * width)
        if merges:
            precise = item.embeddings.to(torch.promote_types(item.embeddings.dtype, torch.float32))
            target = static_groups(precise, (frames, height, width), merges)
            embeddings, sizes, positions, group = merge(precise, item.weights().to(precise), item.positions, target)
            item = item.merged(embeddings.to(item.embeddings.dtype), positions, sizes.float(), group)
        return item if merges == surplus else BipartiteMerging().shrink(item, cap)
