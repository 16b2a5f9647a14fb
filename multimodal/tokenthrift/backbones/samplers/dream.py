"""Dream's sampler: a time schedule from all masked to none, the most confident first or by chance.

Source: Dream-7B and its `diffusion_generate` (arXiv 2508.15487; Apache-2.0). The share of slots that a step commits
follows t from 1 to `epsilon`; `remasking` names what Dream calls `alg`: "low_confidence" (maskgit_plus), "margin"
(topk_margin), "entropy", or "origin", where every slot is decided with the same probability.

Differs from the published code: the quota is of each row, not of the batch's mean; noise is Gumbel's, which draws from
the same distributions; nucleus and top-k cuts are left out; MASK is no candidate; a step whose share is no slot costs
no call (`empty_steps`), which of 512 steps for ten slots leaves ten. Logits are not shifted here: the
backbone does that. No traces of it were at hand to compare with.

Why it ends: the steps are fixed and the last one commits everything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenthrift.backbones.samplers.blocks import BlockRun, BlockSampler, Chosen
from tokenthrift.backbones.samplers.rules import by_quota, time_quotas
from tokenthrift.backbones.samplers.scores import uniform

__all__ = ["DreamSampler"]


@dataclass(frozen=True, kw_only=True)
class DreamSampler(BlockSampler):
    """Commits slots by a time schedule.

    Attributes:
        steps: calls for a block.
        epsilon: where time ends.
        order: "confidence" takes the surest (see `remasking`), "origin" throws a coin for each slot.
        order_temperature: of the noise on the confidence (Dream's `alg_temp`); 0 takes the surest.
        empty_steps: steps whose share is no slot run all the same, as published.
    """

    steps: int = 512
    epsilon: float = 1e-3
    order: Literal["confidence", "origin"] = "confidence"
    order_temperature: float = 0.0
    empty_steps: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or not 0 < self.epsilon < 1 or not 0 <= self.order_temperature < math.inf:
            raise ValueError("steps must be at least 1, epsilon within (0, 1), order_temperature finite and from 0")
        self.default(mask_token="renormalize", lockstep=False, empty_blocks=False)

    def steps_in_blocks(self, run: BlockRun, row: int) -> list[int]:
        """The steps of each block in which a slot is committed; all where chance says which those are."""
        blocks = int(run.blocks[row])
        if self.order == "origin":
            return [self.steps] * blocks
        undecided = (run.ids[row] == run.tokens.mask) & run.mask[row]
        firsts = [max(run.start, run.origin + block * run.block_length) for block in range(blocks)]
        if firsts and self.mask_token == "renormalize":
            firsts[0] = 0  # it decides what the prompt leaves open, too
        stops = [*firsts[1:], int(run.ends[row])]
        return [len(self._plan(int(undecided[a:b].sum()))) for a, b in zip(firsts, stops, strict=True)]

    def _plan(self, masked: int) -> list[int]:
        """Slots to commit in each step of a block that has so many."""
        counts = time_quotas(masked, self.steps, self.epsilon)
        return counts if self.empty_steps else [count for count in counts if count] or [0]

    def choose(self, run: BlockRun, found: Chosen) -> Tensor:
        """The share of this step, for each row."""
        steps, sure, shape = run.step_in_block[found.rows], found.confidence.double(), found.open_slots.shape
        if self.order == "origin" or self.order_temperature:
            lengths = run.ends[found.rows].clamp(max=shape[1])
            draw = uniform(run.generators, found.rows, lengths, shape, torch.float64, sure.device)
            if self.order == "origin":
                times = torch.linspace(1, self.epsilon, self.steps + 1, device=sure.device).double()
                share = torch.where(steps == self.steps - 1, 1.0, 1 - times[steps + 1] / times[steps])
                return found.open_slots & (draw < share[:, None])
            sure = sure / self.order_temperature - (-draw.log()).log()
        plans = [self._plan(masked) for masked in run.masked_at_entry[found.rows].tolist()]
        counts = [plan[step] for plan, step in zip(plans, steps.tolist(), strict=True)]
        return by_quota(sure, found.open_slots, torch.tensor(counts, device=sure.device))
