"""Fast-dLLM's sampler: as many slots as are sure enough in each call, with cached keys and values.

Source: Fast-dLLM (arXiv 2505.22618, sections 3.2 and 3.3) and its `generate.py` (Apache-2.0); the row rule is dInfer's
(arXiv 2510.08666). The rule is a threshold on the confidence, a factor that asks for more of each further slot, LLaDA's
quota, or one slot a call.

Differs from the published code, unless `compat="released"`:
- MASK is no candidate (`mask_token`); published, a slot that predicts MASK repeats the same call for ever, which here
  ends in a commit of the surest other token in both modes;
- the factor rule stops before the last open slot where that is the first to fail (`last_rank=False`);
- with noise, the prefix cache draws once a call (`spare_noise=False`);
- a threshold above 1, which commits one slot a call, is refused: ask for `rule="single"`; published, it may be;
- rows of a batch decode apart, except with a cache, which a block refreshes for all rows together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenthrift.backbones.samplers.blocks import BlockRun, BlockSampler, Chosen
from tokenthrift.backbones.samplers.loop import Canvas, Compat, Generators, TokenIds
from tokenthrift.backbones.samplers.rules import best, by_factor, by_quota, by_row_threshold, by_threshold, quotas
from tokenthrift.backbones.samplers.scores import uniform

__all__ = ["FastDllmSampler", "Rule"]

Rule = Literal["threshold", "row_threshold", "factor", "quota", "single"]


@dataclass(frozen=True, kw_only=True)
class FastDllmSampler(BlockSampler):
    """Commits every slot that the rule finds sure enough, and always the surest.

    Attributes:
        rule: which; "quota" ends a block with its last MASK.
        threshold: of the rules named after it, in (0, 1]; above 1 only as released.
        factor: of the rule named after it, above 0.
        steps: of the quota, for a whole response.
        compat: which defaults the options left at None have.
        last_rank: see `by_factor`.
        spare_noise: with the prefix cache, draw the noise of a call twice and use the second, as published.
    """

    rule: Rule = "threshold"
    threshold: float = 0.9
    factor: float = 1.0
    steps: int = 128
    compat: Compat = "corrected"
    last_rank: bool | None = None
    spare_noise: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        released = self.compat == "released"
        if not 0 < self.threshold < math.inf or (self.threshold > 1 and not released):
            raise ValueError(f'threshold must lie in (0, 1], not {self.threshold}; rule "single" commits one a call')
        if not 0 < self.factor < math.inf or self.steps < 1:
            raise ValueError(f"factor and steps must be above 0, not {self.factor} and {self.steps}")
        self.default(mask_token="allow" if released else "renormalize", lockstep=released, empty_blocks=released)
        self.default(last_rank=released, spare_noise=released)

    def choose(self, run: BlockRun, found: Chosen) -> Tensor:
        """Applies the rule."""
        sure, open_slots = found.confidence, found.open_slots
        if self.rule == "threshold":
            return by_threshold(sure, open_slots, self.threshold)
        if self.rule == "row_threshold":
            return by_row_threshold(sure, open_slots, self.threshold)
        if self.rule == "factor":
            return by_factor(sure, open_slots, self.factor, last_rank=bool(self.last_rank))
        if self.rule == "single":
            return best(sure, open_slots)
        counts = []
        for row in found.rows.tolist():
            blocks, block = int(run.blocks[row]), int(run.block[row])
            steps = max(1, int(quotas(torch.tensor([self.steps]), blocks)[0, block]))
            plan, step = quotas(run.masked_at_entry[row : row + 1], steps)[0].tolist(), int(run.step_in_block[row])
            counts.append(max(1, plan[step] if step < steps else 1))
        return by_quota(sure, open_slots, torch.tensor(counts, device=sure.device))

    def begin(self, canvas: Canvas, tokens: TokenIds, generators: Generators) -> BlockRun:
        """See `Sampler.begin`."""
        return FastDllmRun(self, canvas, tokens, generators)


class FastDllmRun(BlockRun):
    """A decoding in blocks in which the prefix cache may waste random numbers as published."""

    def candidates(self, logits: Tensor, rows: Tensor, open_slots: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """See `BlockRun.candidates`."""
        sampler, later = self.sampler, bool(self.step_in_block[rows].any())
        assert isinstance(sampler, FastDllmSampler)
        if sampler.spare_noise and sampler.cache == "prefix" and sampler.temperature and later:
            lengths = (self.ends[rows] - first).clamp(0, logits.shape[1])
            uniform(self.generators, rows, lengths, logits.shape, torch.float64, logits.device)
        return super().candidates(logits, rows, open_slots, first)
