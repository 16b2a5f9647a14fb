"""The optimizer and schedule of every training stage.

Source: KARL (arXiv 2507.07995), appendix: AdamW with betas (0.9, 0.95), weight decay 0.05 on everything but vectors, a
linear warm-up and half a cosine down to nothing, both by the step.

What differs: each optimizer is given its parameters by name. The published one takes every parameter of the module that
also owns the discriminators, so that generator steps push these towards rating fakes as real.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

__all__ = ["adamw"]


def adamw(parameters: Iterable[nn.Parameter], rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over those parameters that want a gradient; vectors and single numbers do not decay."""
    weights = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], rate, betas=(0.9, 0.95))
