"""AdamW with linear warm-up and half a cosine, as all four systems train.

Source: KARL (arXiv 2507.07995), VQToken (arXiv 2503.16980), Llama-MTSK (arXiv 2503.06362): AdamW, weight decay on
matrices only, a cosine by the step. The schedule is transformers' `get_cosine_with_min_lr_schedule_with_warmup`. The
rule for weight decay is that of timm's `param_groups_weight_decay`; it stands here because groups with several learning
rates need it on named parameters, and because timm is an extra.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

__all__ = ["OptimConfig", "adamw", "cosine_schedule", "optimizer_and_schedule", "parameter_groups"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How weights are trained.

    Args:
        learning_rate: at its highest.
        weight_decay: of everything but vectors and single numbers.
        betas: of AdamW.
        eps: of AdamW.
        warmup_steps: steps of linear warm-up; below 1, a share of all steps.
        min_lr: learning rate after the last step.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    warmup_steps: float = 0
    min_lr: float = 0.0


def parameter_groups(
    named: nn.Module | Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    *,
    learning_rate: float | None = None,
    no_decay: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Groups for an optimizer, of those parameters that are trained: with weight decay and without.

    Args:
        named: a module, or names and parameters.
        config: says the learning rate and the weight decay.
        learning_rate: another one for these parameters.
        no_decay: patterns of further names without weight decay, as "*.positions".

    Returns:
        At most two groups; none is empty.
    """
    pairs = named.named_parameters() if isinstance(named, nn.Module) else named
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in pairs:
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or any(fnmatch(name, pattern) for pattern in no_decay)
            (others if exempt else decaying).append(parameter)
    rate = config.learning_rate if learning_rate is None else learning_rate
    groups = ((decaying, config.weight_decay), (others, 0.0))
    return [{"params": params, "lr": rate, "weight_decay": decay} for params, decay in groups if params]


def adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over groups of `parameter_groups`."""
    return torch.optim.AdamW(groups, config.learning_rate, config.betas, config.eps, config.weight_decay)


def cosine_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> Any:
    """The schedule over so many steps, each group by its own learning rate."""
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    warmup = config.warmup_steps * steps if config.warmup_steps < 1 else config.warmup_steps
    floor = config.min_lr / config.learning_rate if config.min_lr else 0.0
    return get_cosine_with_min_lr_schedule_with_warmup(optimizer, round(warmup), max(1, steps), min_lr_rate=floor)


def optimizer_and_schedule(groups: list[dict[str, Any]], config: OptimConfig, steps: int) -> dict[str, Any]:
    """What `configure_optimizers` returns.

    Args:
        groups: of `parameter_groups`.
        config: the rest.
        steps: of the whole run, `int(self.trainer.estimated_stepping_batches)`.
    """
    optimizer = adamw(groups, config)
    schedule = cosine_schedule(optimizer, config, steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
