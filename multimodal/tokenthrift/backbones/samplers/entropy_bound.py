"""The entropy-bounded sampler: commit together what is nearly independent.

Source: arXiv 2505.24857 (EB-Sampler) and DiffusionGemma's `EntropyBoundSampler`, whose acceptance rule this is: slots
by rising entropy, as long as the entropies of those before sum to at most the bound. `position_decay` orders them by
confidence x exp(-decay x i) instead, i counting undecided slots from the left, after MDM-ASR (arXiv 2602.18952).

Differs from DiffusionGemma, which starts from random tokens and draws the rejected ones anew: here slots start as MASK
and what is not accepted stays MASK. MASK is no candidate. There is no published code of MDM-ASR to compare with.

Why it ends: every call commits at least the surest slot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenthrift.backbones.samplers.blocks import BlockRun, BlockSampler, Chosen
from tokenthrift.backbones.samplers.rules import by_entropy
from tokenthrift.backbones.samplers.scores import entropy

__all__ = ["EntropyBoundSampler"]


@dataclass(frozen=True, kw_only=True)
class EntropyBoundSampler(BlockSampler):
    """Commits slots whose entropies sum to at most a bound.

    Attributes:
        bound: nats; 0 commits one slot a call unless others are certain.
        position_decay: 0 for the published rule.
    """

    bound: float = 0.1
    position_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.bound < math.inf and 0 <= self.position_decay < math.inf):
            raise ValueError("bound and position_decay must be finite and not negative")
        self.default(mask_token="renormalize", lockstep=False, empty_blocks=False)

    def choose(self, run: BlockRun, found: Chosen) -> Tensor:
        """Applies the rule."""
        logits = found.logits[found.open_slots].double()
        if self.mask_token == "renormalize":
            logits[:, run.tokens.mask] = -torch.inf
        nats = torch.zeros(found.open_slots.shape, dtype=torch.float64, device=logits.device)
        nats[found.open_slots] = entropy(logits)
        order = None
        if self.position_decay:
            position = (found.open_slots.cumsum(1) - 1).clamp(min=0)
            order = -found.confidence.double() * torch.exp(-self.position_decay * position)
        return by_entropy(nats, found.open_slots, self.bound, order)
