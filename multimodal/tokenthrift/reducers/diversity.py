"""Reducers that keep tokens unlike each other: max-min diversity (DivPrune) and the determinant behind CDPruner.

DivPrune (arXiv 2503.02175, section 3): tokens are chosen one after another, each the one whose most similar chosen
token is least similar to it; the first is the one farthest from its nearest neighbor. Greedy selection by a
determinantal point process is in `query.py`, where a question weighs the tokens; `greedy_determinant` is the fast exact
form of Chen et al. (arXiv 1709.05135, algorithm 1).

Differs from the published code: the matrix of all distances is never held, so memory grows with N and not with its
square; similarity is computed in at least float32; the earlier of equals wins. A determinant of more tokens than the
embeddings have dimensions is zero; where the published code then picks by rounding errors, the selection starts anew
among the tokens that are left.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenthrift.reducers.base import Item, ItemReducer

__all__ = ["MaxMinDiversity", "greedy_determinant", "max_min_indices", "unit_rows"]

_ROWS_AT_ONCE = 512
_USED_UP = 1e-5
"""Share of a token's own weight below which nothing of it is new, in float32."""


def unit_rows(embeddings: Tensor) -> Tensor:
    """(N, D) rows of length one, in at least float32, without gradient; a zero row stays zero."""
    return normalize(embeddings.detach().to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)


def max_min_indices(embeddings: Tensor, cap: int) -> Tensor:
    """Positions chosen by max-min diversity of (N, D) tokens: (cap,) int64, increasing, for cap <= N."""
    unit = unit_rows(embeddings)
    if cap == 0 or len(unit) <= 1:
        return torch.arange(cap, device=unit.device)
    alike = []
    for start in range(0, len(unit), _ROWS_AT_ONCE):
        block = unit[start : start + _ROWS_AT_ONCE] @ unit.T
        own = torch.arange(len(block), device=unit.device)
        block[own, start + own] = -torch.inf
        alike.append(block.amax(1))
    chosen = [int(torch.cat(alike).argmin())]
    nearest = unit @ unit[chosen[0]]
    while len(chosen) < cap:
        nearest[chosen[-1]] = torch.inf
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, unit @ unit[chosen[-1]])
    return torch.tensor(chosen, device=unit.device).sort().values


def greedy_determinant(embeddings: Tensor, weights: Tensor, cap: int) -> Tensor:
    """Greedy choice of the tokens that span the largest volume, each stretched by its weight.

    Args:
        embeddings: (N, D); their directions alone count.
        weights: (N,) positive.
        cap: How many to choose, at most N.

    Returns:
        (cap,) int64 in the order of choice.
    """
    unit = unit_rows(embeddings)
    weights = weights.to(unit)
    own = weights.square() * unit.square().sum(-1)
    gain, left = own.clone(), torch.ones(len(unit), dtype=torch.bool, device=unit.device)
    basis, seen = unit.new_zeros(cap, len(unit)), 0
    chosen: list[int] = []
    while len(chosen) < cap:
        new = left & (gain > _USED_UP * own) if seen else left
        if not bool(new.any()):
            # Every token that is left lies in the span of those chosen: begin again with the others.
            gain, seen = own.clone(), 0
            continue
        best = int(gain.masked_fill(~new, -torch.inf).argmax())
        row = weights * weights[best] * (unit @ unit[best]) - basis[:seen, best] @ basis[:seen]
        row = row / gain[best].clamp_min(torch.finfo(row.dtype).tiny).sqrt()
        basis[seen] = row
        seen += 1
        gain = gain - row.square()
        left[best] = False
        chosen.append(best)
    return torch.tensor(chosen, dtype=torch.int64, device=unit.device)


class MaxMinDiversity(ItemReducer):
    """Keeps the tokens that are least alike (DivPrune), in their order."""

    def shrink(self, item: Item, cap: int) -> Item:
        """See `ItemReducer.shrink`."""
        return item.select(max_min_indices(item.embeddings, cap))
