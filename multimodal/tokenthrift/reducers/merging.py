"""Bipartite merging of similar tokens: ToMe (arXiv 2210.09461, section 3 and appendix D), as a reducer.

Tokens alternate between two sets; every token of the first finds its most similar one in the second; the most similar
pairs are merged into averages weighted by size, which leaves one token per pair. As in the published code some tokens
can be protected (a class token), what became of every token is tracked, and `unmerge` copies the merged tokens back to
where their members were.

Differs from the published code: similarity is the cosine of the tokens themselves (no attention keys are at hand after
an encoder); rounds of at most one token in eight repeat until exactly the planned count is left, instead of a fixed
number per layer, because a round that merges half of them also joins pairs that are not alike; any number of leading
tokens is protected, not one; the result keeps the order of the source (a token has the position of its first member),
where the published merge puts all unmerged tokens first; the earlier of equals wins, in float32 whatever the dtype;
`unmerge` reads a map from native to merged tokens instead of the closures of every layer. The sizes come out with the
tokens: attention that adds log(size) to its scores is ToMe's proportional attention.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokenthrift.reducers.base import Item, ItemReducer

__all__ = ["BipartiteMerging", "match", "merge", "unmerge"]


def match(embeddings: Tensor, merges: int, protected: int = 0) -> Tensor:
    """Which token each token becomes part of.

    Args:
        embeddings: (N, D), at least float32.
        merges: How many tokens to give up, at most half of those that are not protected.
        protected: How many of the first tokens take no part.

    Returns:
        (N,) int64: its own index for a token that stays, that of a partner for each of the `merges` that do not.
    """
    with torch.no_grad():
        unit = normalize(embeddings[protected:], dim=-1)
        best, partner = (unit[0::2] @ unit[1::2].T).max(dim=-1)
        chosen = best.argsort(descending=True, stable=True)[:merges]
        target = torch.arange(len(embeddings), device=embeddings.device)
        target[protected + 2 * chosen] = protected + 2 * partner[chosen] + 1
    return target


def merge(
    embeddings: Tensor, sizes: Tensor, positions: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Averages the tokens that share a target, weighted by size, in the order of their first members.

    Args:
        embeddings: (N, D).
        sizes: (N,) weights in the dtype of the embeddings.
        positions: (N,) int64 indices in the source.
        target: (N,) int64 as from `match`.

    Returns:
        (n, D) embeddings, (n,) sizes and (n,) positions, with n the number of tokens that stay, and (N,) int64 which
        of these n each token went into.
    """
    stays = target == torch.arange(len(target), device=target.device)
    group = (stays.cumsum(0) - 1)[target]
    n = int(stays.sum())
    mass = sizes.new_zeros(n).index_add(0, group, sizes)
    sums = embeddings.new_zeros(n, embeddings.shape[1]).index_add(0, group, embeddings * sizes[:, None])
    first = positions.new_zeros(n).scatter_reduce(0, group, positions, "amin", include_self=False)
    order = first.argsort()
    return (sums / mass[:, None])[order], mass[order], first[order], order.argsort()[group]


def unmerge(embeddings: Tensor, sources: Tensor) -> Tensor:
    """Merged tokens at the positions of their members again.

    Args:
        embeddings: (..., n, D).
        sources: (M,) int64, which of the n stands for each native token; -1 for none.

    Returns:
        (..., M, D), zero where nothing stands for a token.
    """
    return embeddings[..., sources, :].masked_fill((sources < 0)[:, None], 0)


class BipartiteMerging(ItemReducer):
    """Merges the most similar tokens, round after round, until the cap is met (ToMe).

    Args:
        protected: How many of the first tokens of an item are never merged, such as a class token. A cap below it
            keeps the first of them.
    """

    between_layers: ClassVar[bool] = True
    """`attach(..., at="encoder")` merges before every layer, as ToMe does, instead of once before the first."""

    def __init__(self, protected: int = 0) -> None:
        if protected < 0:
            raise ValueError(f"a count of protected tokens is at least 0, not {protected}")
        self.protected = protected

    def shrink(self, item: Item, cap: int) -> Item:
        """See `ItemReducer.shrink`."""
        alone = min(self.protected, len(item.positions))
        if cap <= alone:
            return item.select(torch.arange(cap, device=item.positions.device))
        precise = torch.promote_types(item.embeddings.dtype, torch.float32)
        embeddings, sizes, positions = item.embeddings.to(precise), item.weights().to(precise), item.positions
        sources = torch.arange(len(positions), device=positions.device)
        while (n := len(positions)) > cap:
            target = match(embeddings, min(n - cap, max((n - alone) // 8, 1)), alone)
            embeddings, sizes, positions, group = merge(embeddings, sizes, positions, target)
            sources = group[sources]
        return item.merged(embeddings.to(item.embeddings.dtype), positions, sizes.float(), sources)
