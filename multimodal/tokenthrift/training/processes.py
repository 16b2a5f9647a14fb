"""Several processes that train one model: who this one is, and losses that do not depend on how many there are.

DistributedDataParallel averages the gradients of the processes, whatever their shares of the batch. The mean loss over
a global batch therefore needs each process's mean weighted by its share; `balanced` does that.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, distributed

__all__ = ["balanced", "gathered", "rank_and_world"]

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """The number of this process and how many there are; (0, 1) where torch.distributed is not in use."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def balanced(loss: Tensor, weight: float | Tensor) -> Tensor:
    """A mean over this process's share of a batch, scaled so that averaged gradients are those of the whole batch.

    Every process has to call it equally often. With one process the loss is returned as it is.

    Args:
        loss: a mean, of items or of tokens.
        weight: what it is a mean over: the number of items or of tokens; 0 where there is nothing to learn from.

    Returns:
        The loss times the share of the weight times the number of processes. Its average over the processes is the
        mean loss of the global batch.
    """
    _, world = rank_and_world()
    if world == 1:
        return loss
    own = torch.as_tensor(weight, dtype=torch.float32, device=loss.device).detach()
    total = own.clone()
    distributed.all_reduce(total)
    return loss * (own * world / total.clamp(min=torch.finfo(torch.float32).tiny))


def gathered(rows: list[T]) -> list[T]:
    """The rows of all processes, by process; for figures over a whole validation set, such as a word error rate."""
    _, world = rank_and_world()
    if world == 1:
        return rows
    parts: list[list[T]] = [[] for _ in range(world)]
    distributed.all_gather_object(parts, rows)
    return [row for part in parts for row in part]
