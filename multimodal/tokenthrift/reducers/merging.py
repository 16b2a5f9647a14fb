"""Bipartite merging of similar tokens: ToMe (arXiv 2210.09461, section 3 and appendix D), as a reducer.

Tokens alternate between two sets; every token of the first finds its most similar one in the second; the most similar
pairs are merged into averages weighted by size, which leaves one token per pair.

Differs from the published code: similarity is the cosine of the tokens themselves (no attention keys are at hand after
an encoder); rounds of at most one token in eight repeat until exactly the planned count is left, instead of a fixed
number per layer, because a round that merges half of them also joins pairs that are not alike; no class token is
protected, as there is none; the result keeps the order of the source (a token has the position of its first member),
where the published merge puts all unmerged tokens first; the earlier of equals wins, in float32 whatever the dtype. The
sizes come out with the tokens: attention that adds log(size) to its scores is ToMe's proportional attention.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenthrift.reducers.base import Item, ItemReducer

__all__ = ["BipartiteMerging", "match", "merge"]


def match(embeddings: Tensor, merges: int) -> Tensor:
    """Which token each token becomes part of.

    Args:
        embeddings: (N, D), at least float32.
        merges: How many tokens to give up, at most N // 2.

    Returns:
        (N,) int64: its own index for a token that stays, an odd index for each of the `merges` even ones that do not.
    """
    with torch.no_grad():
        unit = normalize(embeddings, dim=-1)
        best, partner = (unit[0::2] @ unit[1::2].T).max(dim=-1)
        chosen = best.argsort(descending=True, stable=True)[:merges]
        target = torch.arange(len(embeddings), device=embeddings.device)
        target[2 * chosen] = 2 * partner[chosen] + 1
    return target


def merge(embeddings: Tensor, sizes: Tensor, positions: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Averages the tokens that share a target, weighted by size, in the order of their first members.

    Args:
        embeddings: (N, D).
        sizes: (N,) weights in the dtype of the embeddings.
        positions: (N,) int64 indices in the source.
        target: (N,) int64 as from `match`.

    Returns:
        (n, D) embeddings, (n,) sizes and (n,) positions, with n the number of tokens that stay.
    """
    stays = target == torch.arange(len(target), device=target.device)
    group = (stays.cumsum(0) - 1)[target]
    n = int(stays.sum())
    mass = sizes.new_zeros(n).index_add(0, group, sizes)
    sums = embeddings.new_zeros(n, embeddings.shape[1]).index_add(0, group, embeddings * sizes[:, None])
    first = positions.new_zeros(n).scatter_reduce(0, group, positions, "amin", include_self=False)
    order = first.argsort()
    return (sums / mass[:, None])[order], mass[order], first[order]


class BipartiteMerging(ItemReducer):
    """Merges the most similar tokens, round after round, until the cap is met (ToMe)."""

    def shrink(self, item: Item, cap: int) -> Item:
        """See `ItemReducer.shrink`."""
        if cap == 0:
            return item.select(item.positions[:0])
        precise = torch.promote_types(item.embeddings.dtype, torch.float32)
        embeddings, sizes, positions = item.embeddings.to(precise), item.weights().to(precise), item.positions
        while (n := len(positions)) > cap:
            target = match(embeddings, min(n - cap, max(n // 8, 1)))
            embeddings, sizes, positions = merge(embeddings, sizes, positions, target)
        return Item(embeddings.to(item.embeddings.dtype), positions, None, sizes.float())
