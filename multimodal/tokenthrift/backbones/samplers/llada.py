"""LLaDA's sampler: a fixed number of steps, a quota of slots for each, the most confident first.

Source: LLaDA (arXiv 2502.09992, section 2.4 and appendix B) and its `generate.py` (MIT). "Remasking" means that what is
not committed stays masked; a committed token is never touched again. Options: semi-autoregressive blocks, Gumbel noise,
classifier-free guidance, random remasking, and the two ways to keep EOS from filling a response too early.

Differs from the published code, unless `compat="released"`:
- MASK is no candidate (`mask_token`); published, a slot that predicts MASK uses up a part of the quota and stays;
- a block ends with its last MASK (`surplus_steps=False`); published, steps beyond the slots run for nothing;
- softmax in float64 (`wide`); published, in the dtype of the model;
- with noise, EOS is held back by `confidence_eos_eot_inf` as without (`eos_noise_quirk=False`);
- the response need not be a multiple of the block nor the steps of the blocks; published, that raises.

Why it ends: a block has a fixed number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenthrift.backbones.samplers.blocks import BlockRun, BlockSampler, Chosen
from tokenthrift.backbones.samplers.loop import Compat
from tokenthrift.backbones.samplers.rules import by_quota, quotas
from tokenthrift.backbones.samplers.scores import Scoring

__all__ = ["LladaSampler"]


@dataclass(frozen=True, kw_only=True)
class LladaSampler(BlockSampler):
    """Commits a quota of the most confident slots in each step.

    Attributes:
        steps: calls for a whole response, shared evenly among its blocks.
        compat: which defaults the options left at None have.
        logits_eos_inf, confidence_eos_eot_inf, eos_noise_quirk, wide: see `Scoring`.
        surplus_steps: steps for which no slot is left run all the same.
    """

    steps: int = 128
    compat: Compat = "corrected"
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    eos_noise_quirk: bool | None = None
    wide: bool | None = None
    surplus_steps: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        released = self.compat == "released"
        self.default(mask_token="allow" if released else "renormalize", lockstep=released, empty_blocks=released)
        self.default(eos_noise_quirk=released, wide=not released, surplus_steps=released)

    def scoring(self) -> Scoring:
        """See `BlockSampler.scoring`."""
        assert self.mask_token is not None
        assert self.wide is not None
        assert self.eos_noise_quirk is not None
        return Scoring(
            temperature=self.temperature,
            remasking=self.remasking,
            mask_token=self.mask_token,
            wide=self.wide,
            logits_eos_inf=self.logits_eos_inf,
            confidence_eos_eot_inf=self.confidence_eos_eot_inf,
            eos_noise_quirk=self.eos_noise_quirk,
        )

    def steps_in_blocks(self, run: BlockRun, row: int) -> list[int]:
        """The steps, shared among the blocks of a row, at least one for each.

        Raises:
            ValueError: as published, where blocks or steps do not come out even and `compat` is "released".
        """
        blocks, length = int(run.blocks[row]), int(run.ends[row]) - run.start
        if self.compat == "released" and (length % run.block_length or blocks == 0 or self.steps % blocks):
            raise ValueError(
                f"{length} slots in blocks of {run.block_length} with {self.steps} steps do not come out even, which "
                'the published sampler needs; use compat "corrected"'
            )
        return quotas(torch.tensor([self.steps]), max(1, blocks))[0].clamp(min=1).tolist()

    def block_ended(self, had: int, steps: int, decided: bool) -> bool:
        """See `BlockSampler.block_ended`."""
        return had >= steps or (decided and not self.surplus_steps)

    def choose(self, run: BlockRun, found: Chosen) -> Tensor:
        """The quota of this step for each row."""
        counts = []
        for row in found.rows.tolist():
            steps = run.steps[row]
            assert steps is not None
            plan = quotas(run.masked_at_entry[row : row + 1], steps[int(run.block[row])])[0]
            counts.append(int(plan[run.step_in_block[row]]))
        return by_quota(found.confidence, found.open_slots, torch.tensor(counts, device=found.rows.device))
