"""One training step over several processes whose batches, streams and scales may differ.

Source: torch's DistributedDataParallel averages gradients in every backward pass. A step of Llama-MTSK has a backward
pass per scale, each of which reaches the adapters and projectors of its own scale only, so here gradients are summed
locally and averaged once, by `average_gradients`. The losses and gradients of a step are those of one process with the
global batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from tokenthrift.training.processes import rank_and_world

__all__ = ["average_gradients", "common_streams", "local_gradients", "total"]


def total(values: Tensor) -> Tensor:
    """The sum over all processes."""
    if rank_and_world()[1] > 1:
        values = values.clone()
        distributed.all_reduce(values)
    return values


def common_streams(audio: bool, video: bool, device: torch.device) -> tuple[bool, bool]:
    """The streams that the batches of all processes have."""
    if rank_and_world()[1] == 1:
        return audio, video
    flags = torch.tensor([audio, video], dtype=torch.int64, device=device)
    distributed.all_reduce(flags, distributed.ReduceOp.MIN)
    return bool(flags[0]), bool(flags[1])


def local_gradients(model: Any) -> AbstractContextManager[None]:
    """A context in which backward passes of a DistributedDataParallel model stay local."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def average_gradients(model: Any, weights: Iterable[nn.Parameter]) -> None:
    """Averages the gradients of a DistributedDataParallel model; a weight that no process reached keeps none."""
    if not isinstance(model, DistributedDataParallel):
        return
    trained = [weight for weight in weights if weight.requires_grad]
    reached = torch.tensor([weight.grad is not None for weight in trained], device=trained[0].device).long()
    distributed.all_reduce(reached, distributed.ReduceOp.MAX)
    for weight, flag in zip(trained, reached.tolist(), strict=True):
        if flag and weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for weight in trained:
        if weight.grad is not None:
            kinds.setdefault(weight.grad.dtype, []).append(weight.grad)
    for gradients in kinds.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients]) / rank_and_world()[1]
        distributed.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
