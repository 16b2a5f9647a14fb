"""Learning rates over a run: linear warm-up, then half a cosine, as KARL (arXiv 2507.07995) trains, by the step."""

from __future__ import annotations

import torch

__all__ = ["warmup_cosine"]


def warmup_cosine(
    optimizer: torch.optim.Optimizer, steps: int, warmup: int, floor: float = 1e-6
) -> torch.optim.lr_scheduler.SequentialLR:
    """Linear up for `warmup` steps, then half a cosine down to a rate of `floor` at `steps`."""
    first = max(1, warmup)  # with none, torch's schedule would stay at its first, tiny rate
    up = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, 1.0, first)
    down = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - first), floor)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [up, down], [first])
