"""Reducers that keep some of the tokens as they are, in their order.

Uniform and random selection are the baselines that users ask for and papers leave out (Theia-4869/FasterVLM issue 4:
"worse than random"). Pruning by norm keeps the tokens with the largest L2 norm; note that large vision transformers
without registers store global information in a few high-norm background tokens (arXiv 2309.16588), which this rule
keeps first. Nothing here is copied: the rules are one line each.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tokenthrift.reducers.base import Item, ItemReducer

__all__ = ["NormPruning", "Prefix", "RandomSubset", "Uniform", "norm_indices", "random_indices", "uniform_indices"]


def uniform_indices(native: int, cap: int) -> Tensor:
    """The middles of `cap` equal stretches of `native` positions: (cap,) int64, increasing for cap <= native."""
    return (2 * torch.arange(cap) + 1) * native // max(2 * cap, 1)


def random_indices(native: int, cap: int, seed: int) -> Tensor:
    """`cap` of `native` positions drawn without replacement: (cap,) int64, increasing; reads no global state."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(native, generator=generator)[:cap].sort().values


def norm_indices(embeddings: Tensor, cap: int) -> Tensor:
    """Positions of the `cap` largest L2 norms of (N, D), earlier ones first among equals: (cap,) int64, increasing."""
    precise = torch.promote_types(embeddings.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(embeddings.detach().to(precise), dim=-1)
    return norms.argsort(descending=True, stable=True)[:cap].sort().values


class Uniform(ItemReducer):
    """Keeps evenly spaced tokens."""

    def shrink(self, item: Item, cap: int) -> Item:
        """See `ItemReducer.shrink`."""
        return item.select(uniform_indices(len(item.positions), cap).to(item.positions.device))


class RandomSubset(ItemReducer):
    """Keeps tokens drawn at random; items of one length keep the same positions, on every device.

    Args:
        seed: Of the draw.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def shrink(self, item: Item, cap: int) -> Item:
        """See `ItemReducer.shrink`."""
        return item.select(random_indices(len(item.positions), cap, self.seed).to(item.positions.device))


class Prefix(ItemReducer):
    """Keeps the first tokens: right for nested tokens, the plainest baseline for all others."""

    support = replace(ItemReducer.support, nested=True)

    def shrink(self, item: Item, cap: int) -> Item:
        """See `ItemReducer.shrink`."""
        return item.select(torch.arange(cap, device=item.positions.device))


class NormPruning(ItemReducer):
    """Keeps the tokens with the largest L2 norm, in their order."""

    def shrink(self, item: Item, cap: int) -> Item:
        """See `ItemReducer.shrink`."""
        return item.select(norm_indices(item.embeddings, cap))
