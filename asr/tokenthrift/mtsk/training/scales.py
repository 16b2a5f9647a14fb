"""Training on all scales of a step in the memory of one, with exactly the gradient of all.

Source: Llama-MTSK (arXiv 2503.06362), section 3: the loss of a step is the mean over all pairs of rates, computed from
one pass of the encoders. Differs from the published code, which keeps the graphs of all language-model passes until one
backward: here each scale runs forward and backward before the next. The gradient of a trained encoder is summed at its
output and goes back through it once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from tokenthrift.mtsk.sequence import Encoded

__all__ = ["backward_by_scale"]

Scale = TypeVar("Scale")


def backward_by_scale(
    loss: Callable[[Encoded, Scale], Tensor],
    encoded: Encoded,
    scales: Sequence[Scale],
    weights: Sequence[float] | None = None,
    backward: Callable[[Tensor], Any] = torch.Tensor.backward,
) -> Mapping[Scale, Tensor]:
    """Adds to every `.grad` what `sum(w * loss(encoded, scale)).backward()` would.

    Args:
        loss: of the batch at one scale, a scalar.
        encoded: states of the batch; their graph, if they have one, is run backward once at the end.
        scales: the scales of the step.
        weights: of each loss; the mean if not given.
        backward: how a scalar is run backward; Lightning's `manual_backward` where precision plugins matter.

    Returns:
        The loss of every scale, detached and without its weight.
    """
    if weights is None:
        weights = [1 / len(scales)] * len(scales)
    trained = {n: v for n, v in vars(encoded).items() if v is not None and v.requires_grad}
    leaves = {name: states.detach().requires_grad_() for name, states in trained.items()}
    detached = replace(encoded, **leaves)
    losses = {}
    for scale, weight in zip(scales, weights, strict=True):
        value = loss(detached, scale)
        backward(value * weight)
        losses[scale] = value.detach()
    reached = [(states, leaf.grad) for states, leaf in zip(trained.values(), leaves.values(), strict=True)]
    reached = [(states, grad) for states, grad in reached if grad is not None]
    if reached:
        # The gradients carry whatever factor `backward` put in, so they go back as they are.
        torch.autograd.backward([states for states, _ in reached], [grad for _, grad in reached])
    return losses
