"""Synthetic clips whose clusters are known."""

from __future__ import annotations

import torch
from torch import Tensor


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixture(
    clusters: int, tokens: int, *, width: int = 24, spread: float = 0.1, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(tokens, width) around `clusters` random directions, every one of which occurs, and (tokens,) which one it is."""
    truth = torch.randint(0, clusters, (tokens,), generator=torch.Generator().manual_seed(seed))
    truth[:clusters] = torch.arange(clusters)
    return noise(seed + 1, clusters, width)[truth] + spread * noise(seed + 2, tokens, width), truth


def same_partition(a: Tensor, b: Tensor) -> bool:
    pairs = set(zip(a.tolist(), b.tolist(), strict=True))
    return len(pairs) == len({p for p, _ in pairs}) == len({q for _, q in pairs})
