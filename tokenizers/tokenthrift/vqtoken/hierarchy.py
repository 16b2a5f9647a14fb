"""Merging clusters pairwise by least loss: every K from one clustering.

Source: Ward's criterion (1963) with counts, applied to the clusters of a clip. Two clusters with sums s and counts n
cost |s1|^2 / n1 + |s2|^2 / n2 - |s1 + s2|^2 / (n1 + n2) of explained variance when they become one, so sums, counts and
inner products are all that is needed: no token is read again. Merging down to one gives the exact loss for every K, and
the partitions are nested.

The published code (VQToken, arXiv 2503.16980, adaptive mode) runs an independent random k-means for each of 21 values
of K instead, whose losses need not even fall with K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Tree", "compact", "merge_all"]

# Costs are compared on this grid, so that equal ones are equal on every device and the lowest numbers merge first.
_GRID = 2.0**30


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """All partitions between the clusters given and a single one.

    Attributes:
        maps: (B, M, M) int64; `maps[b, s, k]` is the slot that cluster k is part of after s merges.
        losses: (B, M) float64; the loss that the first s merges of each item added.
        clusters: (B,) int64, how many clusters each item began with; it has one merge fewer.
    """

    maps: Tensor
    losses: Tensor
    clusters: Tensor

    def at(self, clusters: Tensor) -> Tensor:
        """Where each cluster belongs when (B,) `clusters` are left: (B, M) int64, numbered without gaps from 0."""
        merges = (self.clusters - clusters).clamp(min=0)
        return compact(self.maps[torch.arange(len(merges), device=merges.device), merges])

    def curve(self) -> Tensor:
        """(B, M) float64: the loss added when k + 1 clusters are left, for k from 0; zero from the first count on."""
        left = torch.arange(self.maps.shape[1], device=self.maps.device) + 1
        merges = (self.clusters[:, None] - left).clamp(min=0)
        return self.losses.gather(1, merges)


def compact(maps: Tensor) -> Tensor:
    """Renumbers slots (B, M) by rank: those that occur become 0, 1, 2, ... in the same order."""
    present = torch.zeros_like(maps).scatter(1, maps, 1)
    return (present.cumsum(1) - 1).gather(1, maps)


def merge_all(sums: Tensor, counts: Tensor, live: Tensor) -> Tree:
    """Merges the cheapest pair again and again until one cluster is left of every item.

    Args:
        sums: (B, M, D) float64 sums of the members.
        counts: (B, M) numbers of members; an empty cluster merges first, at no cost.
        live: (B, M) bool, which slots are clusters; the first ones of every item.
    """
    batch, slots, _ = sums.shape
    rows = torch.arange(batch, device=sums.device)
    gram = sums @ sums.transpose(1, 2)
    mass = counts.to(gram.dtype)
    live = live.clone()
    maps = torch.arange(slots, device=sums.device).expand(batch, slots)
    clusters = live.sum(1)
    history, losses = [maps], [gram.new_zeros(batch)]
    costs = _costs(gram, mass, live)
    for _ in range(slots - 1):
        flat = costs.flatten(1).argmin(1)
        first, second = flat // slots, flat % slots
        cheapest = costs[rows, first, second]
        more = cheapest.isfinite()
        losses.append(losses[-1] + cheapest.where(more, 0.0))
        # An item that is down to one cluster has no finite cost: its slot 0 merges with itself, which changes nothing.
        maps = torch.where(maps == second[:, None], first[:, None], maps)
        history.append(maps)
        moved = more[:, None].to(gram.dtype)
        gram[rows, first] += gram[rows, second] * moved
        gram[rows, :, first] += gram[rows, :, second] * moved
        mass[rows, first] += mass[rows, second] * moved[:, 0]
        live[rows, second] &= ~more
        _recost(costs, gram, mass, live, rows, first, second)
    return Tree(torch.stack(history, 1), torch.stack(losses, 1), clusters)


def _costs(gram: Tensor, mass: Tensor, live: Tensor) -> Tensor:
    """(B, M, M): the cost of every pair, infinite below and on the diagonal and where a slot is no cluster."""
    own = gram.diagonal(dim1=1, dim2=2)
    cost = _loss(own[:, :, None], own[:, None], gram, mass[:, :, None], mass[:, None])
    pairs = live[:, :, None] & live[:, None]
    return cost.masked_fill(~pairs.triu(1), torch.inf)


def _recost(
    costs: Tensor, gram: Tensor, mass: Tensor, live: Tensor, rows: Tensor, first: Tensor, second: Tensor
) -> None:
    """Brings the pairs of `first`, which grew, and of `second`, which may be gone, up to date."""
    own = gram.diagonal(dim1=1, dim2=2)
    for slot in (second, first):
        cost = _loss(own, own[rows, slot][:, None], gram[rows, slot], mass, mass[rows, slot][:, None])
        cost = cost.masked_fill(~(live & live[rows, slot][:, None]), torch.inf)
        column = torch.arange(costs.shape[1], device=costs.device)
        costs[rows, slot] = cost.masked_fill(column <= slot[:, None], torch.inf)
        costs[rows, :, slot] = cost.masked_fill(column >= slot[:, None], torch.inf)


def _loss(own: Tensor, other: Tensor, product: Tensor, mass: Tensor, more: Tensor) -> Tensor:
    joint = (own + other + 2 * product) / (mass + more).clamp(min=1)
    loss = own / mass.clamp(min=1) + other / more.clamp(min=1) - joint
    return (loss.clamp(min=0) * _GRID).round() / _GRID
