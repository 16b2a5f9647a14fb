"""Dream's sampler: a time schedule from all masked to none, the most confident first or by chance.

Source: Dream-7B and its `diffusion_generate` (arXiv 2508.15487; Apache-2.0). The share of slots that a step commits
follows t from 1 to `epsilon`; `remasking` names what Dream calls `alg`: "low_confidence" (maskgit_plus), "margin"
(topk_margin), "entropy", or "origin", where every slot is decided with the same probability.

Differs from the published code: the quota is of each row, not of the batch's mean; noise is Gumbel's, which draws from
the same distributions; nucleus and top-k cuts are left out; MASK is no candidate. Logits are not shifted here: the
backbone does that. No traces of it were at hand to compare with.

Why it ends: the steps are fixed and the last one commits everything.
"""

from __future__ import annotations

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
    """

    steps: int = 512
    epsilon: float = 1e-3
    order: Literal["confidence", "origin"] = "confidence"
    order_temperature: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or not 0 < self.epsilon < 1 or self.order_temperature < 0:
            raise ValueError("steps must be at least 1, epsilon within (0, 1) and order_temperature not negative")
        self.default(mask_token="renormalize", lockstep=False, empty_blocks=False)

    def steps_in_blocks(self, run: BlockRun, row: int) -> list[int]:
        """The same number for every block."""
        return [self.steps] * int(run.blocks[row])

    def choose(self, run: BlockRun, found: Chosen) -> Tensor:
        """The share of this step, for each row."""
        steps, sure, shape = run.step_in_block[found.rows], found.confidence.double(), found.open_slots.shape
        counts = []
        for row, step in zip(found.rows.tolist(), steps.tolist(), strict=True):
            counts.append(time_quotas(int(run.masked_at_entry[row]), self.steps, self.epsilon)[step])
        count = torch.tensor(counts, device=sure.device)
        if self.order == "origin" or self.order_temperature:
            lengths = run.ends[found.rows].clamp(max=shape[1])
            draw = uniform(run.generators, found.rows, lengths, shape, torch.float64, sure.device)
            if self.order == "origin":
                times = torch.linspace(1, self.epsilon, self.steps + 1, device=sure.device).double()
                share = torch.where(steps == self.steps - 1, 1.0, 1 - times[steps + 1] / times[steps])
                return found.open_slots & (draw < share[:, None])
            sure = sure / self.order_temperature - (-draw.log()).log()
        return by_quota(sure, found.open_slots, count)
