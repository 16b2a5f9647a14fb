"""Commit rules: which undecided slots become tokens after a forward pass. Pure functions of confidences.

Sources: LLaDA (arXiv 2502.09992, section 2.4) for quotas; Fast-dLLM (arXiv 2505.22618, section 3.3) for threshold and
factor; dInfer (arXiv 2510.08666) for the threshold that follows the row; the entropy bound of arXiv 2505.24857, as in
DiffusionGemma; Dream (its `diffusion_generate`) for the quotas of a time schedule.

Differs from the published code: equally sure slots are taken from the left, where `torch.topk` promises no order, and
every rule but a quota of 0 commits at least one slot of a row that has an open one, NaN or not, so no loop runs dry.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "best",
    "by_entropy",
    "by_factor",
    "by_quota",
    "by_row_threshold",
    "by_threshold",
    "first_index",
    "quotas",
    "time_quotas",
]


def quotas(masked: Tensor, steps: int) -> Tensor:
    """Spreads slots evenly over steps, the surplus over the first steps.

    Args:
        masked: (B,) int64, undecided slots.
        steps: forward passes for them; more steps than slots leave zeros at the end.

    Returns:
        (B, steps) int64, slots to commit in each.
    """
    step = torch.arange(steps, device=masked.device)
    return (masked // steps)[:, None] + (step < (masked % steps)[:, None])


def time_quotas(masked: int, steps: int, epsilon: float = 1e-3) -> list[int]:
    """Slots to commit in each step of a linear time schedule from 1 to `epsilon`, the rest in the last (Dream)."""
    times = torch.linspace(1, epsilon, steps + 1)
    counts = []
    for step in range(steps):
        share = 1 - float(times[step + 1] / times[step])
        counts.append(masked if step == steps - 1 else int(masked * share))
        masked -= counts[-1]
    return counts


def best(confidence: Tensor, open_slots: Tensor) -> Tensor:
    """The surest open slot of each row, (B, L) bool; none where a row has no open slot."""
    return by_quota(confidence, open_slots, torch.ones(len(open_slots), dtype=torch.int64, device=open_slots.device))


def by_quota(confidence: Tensor, open_slots: Tensor, count: Tensor) -> Tensor:
    """The `count` surest open slots of each row.

    Args:
        confidence: (B, L) float.
        open_slots: (B, L) bool.
        count: (B,) int64.
    """
    return open_slots & (_ranks(-confidence, open_slots) < count[:, None])


def by_threshold(confidence: Tensor, open_slots: Tensor, threshold: float, *, strict: bool = False) -> Tensor:
    """Every open slot that reaches the threshold (exceeds it where `strict`), and always the surest."""
    reached = confidence > threshold if strict else confidence >= threshold
    return open_slots & (reached | best(confidence, open_slots))


def by_row_threshold(confidence: Tensor, open_slots: Tensor, threshold: float, margin: float = 1e-5) -> Tensor:
    """As `by_threshold`, where a row whose surest slot stays below is satisfied with `margin` less than that slot."""
    highest = confidence.masked_fill(~open_slots, -torch.inf).amax(1, keepdim=True)
    return open_slots & ((confidence >= (highest - margin).clamp(max=threshold)) | best(confidence, open_slots))


def by_factor(confidence: Tensor, open_slots: Tensor, factor: float, *, last_rank: bool = False) -> Tensor:
    """The longest run of surest slots in which the n-th is at least 1 - factor / (n + 1) sure; the first always.

    Args:
        confidence: (B, L) float.
        open_slots: (B, L) bool.
        factor: larger commits more.
        last_rank: commit also the last open slot where it is the first to fail, as the published scan does.
    """
    rank = _ranks(-confidence, open_slots)
    passes = (confidence >= 1 - factor / (rank + 2)) | (rank == 0)
    count = open_slots.sum(1, keepdim=True)
    failed = torch.where(open_slots & ~passes, rank, count).amin(1, keepdim=True)
    if last_rank:
        failed = torch.where(failed == count - 1, count, failed)
    return open_slots & (rank < failed)


def by_entropy(entropy: Tensor, open_slots: Tensor, bound: float, order_by: Tensor | None = None) -> Tensor:
    """The surest slots as long as the entropies of those before them sum to at most `bound`; the first always.

    The sum bounds the mutual information of what is committed together (arXiv 2505.24857).

    Args:
        entropy: (B, L) nats.
        open_slots: (B, L) bool.
        bound: nats.
        order_by: (B, L) in whose rising order slots are taken, instead of `entropy`.
    """
    rank = _ranks(entropy if order_by is None else order_by, open_slots)
    order = rank.argsort(1)
    spent = entropy.masked_fill(~open_slots, 0.0).gather(1, order).cumsum(1)
    before = torch.cat([torch.zeros_like(spent[:, :1]), spent[:, :-1]], 1)
    return open_slots & ((before <= bound).gather(1, rank) | (rank == 0))


def first_index(where: Tensor) -> Tensor:
    """First True of each row of (B, L) bool as (B,) int64; L where there is none."""
    return torch.where(where.any(1), where.int().argmax(1), where.shape[1])


def _ranks(key: Tensor, open_slots: Tensor) -> Tensor:
    """Place of each slot when open slots are sorted by rising key, (B, L); NaN after all others, closed ones last."""
    placed = key.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    order = placed.argsort(dim=1, stable=True)
    closed = (~open_slots).gather(1, order).int().argsort(dim=1, stable=True)
    return order.gather(1, closed).argsort(1)
