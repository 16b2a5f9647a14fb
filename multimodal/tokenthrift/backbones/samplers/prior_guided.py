"""dLLM-ASR's sampler: start from a draft, commit what is sure, cut the canvas at the end of the text.

Source: dLLM-ASR (arXiv 2601.17902), section on inference: prior, token exit, length-adaptive pruning; its threshold
rule is Fast-dLLM's (arXiv 2505.22618, section 3.3).

Differs from the released loop (no license; nothing is taken from it), unless `compat="released"`:
- a committed EOS shortens the canvas after every call (`prune="every"`); released, only after the first;
- a block that pruning emptied costs no call (`empty_blocks=False`);
- MASK is no candidate (`mask_token`);
- `early_stop` of the released function, which nothing turns on, is not there: its model goes on reading MASK where the
  tail was filled with EOS;
- a draft can be verified: in the first call, draft tokens that the model finds unlikely are opened again; with
  `verify_committed` also tokens of its own that were committed beside each other and do not fit together;
- rows are independent and leave the batch in the call that finishes them.

Why it ends: every call commits a slot of each row it reads, each slot is opened again at most once, and with
`verify_committed` a row ends with the call that commits nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenthrift.backbones.samplers.blocks import BlockRun, BlockSampler, Chosen
from tokenthrift.backbones.samplers.loop import Canvas, Compat, Generators, TokenIds
from tokenthrift.backbones.samplers.rules import by_threshold, first_index

__all__ = ["PriorGuidedSampler", "Prune"]

Prune = Literal["every", "first", "never"]
"""After which calls a committed EOS cuts the canvas."""


@dataclass(frozen=True, kw_only=True)
class PriorGuidedSampler(BlockSampler):
    """Commits by a threshold, starting from whatever the canvas holds.

    Attributes:
        threshold: probability in (0, 1] from which a slot is committed; the surest always is. Above 1 only as released.
        prune: when a decided EOS removes itself and all slots right of it.
        verify_threshold: probability in (0, 1]; a draft token that the model gives less in the first call is opened
            again. None trusts the draft.
        verify_committed: apply `verify_threshold` in every call, to committed tokens too.
        compat: which defaults the options left at None have.
    """

    threshold: float = 0.9
    prune: Prune | None = None
    verify_threshold: float | None = None
    verify_committed: bool = False
    compat: Compat = "corrected"

    def __post_init__(self) -> None:
        super().__post_init__()
        released = self.compat == "released"
        most = math.inf if released else 1
        if not 0 < self.threshold <= most or (self.verify_threshold is not None and not 0 < self.verify_threshold <= 1):
            raise ValueError(
                f"threshold {self.threshold} and verify_threshold {self.verify_threshold} must lie in (0, 1]"
            )
        if self.verify_committed and self.verify_threshold is None:
            raise ValueError("verify_committed needs verify_threshold, below which a token is doubted")
        if self.cache != "none" or self.guidance:
            raise ValueError("this sampler looks at the whole canvas and has no guidance and no cache within a block")
        self.default(mask_token="allow" if released else "renormalize", lockstep=False, empty_blocks=released)
        self.default(prune="first" if released else "every")

    def choose(self, run: BlockRun, found: Chosen) -> Tensor:
        """Applies the threshold."""
        return by_threshold(found.confidence, found.open_slots, self.threshold)

    def begin(self, canvas: Canvas, tokens: TokenIds, generators: Generators) -> BlockRun:
        """See `Sampler.begin`."""
        return PriorGuidedRun(self, canvas, tokens, generators)


class PriorGuidedRun(BlockRun):
    """A decoding that doubts drafts and prunes.

    Attributes:
        reopened: (B, T) slots that were opened again.
        unread: (B,) rows with a commit that no call has read yet.
    """

    def __init__(self, sampler: PriorGuidedSampler, canvas: Canvas, tokens: TokenIds, generators: Generators) -> None:
        self.options = sampler
        self.reopened = torch.zeros_like(canvas.mask)
        self.unread = canvas.mask.new_zeros(len(canvas.mask))  # also where there is no slot
        super().__init__(sampler, canvas, tokens, generators)

    def reopen(self, rows: Tensor, here: slice, logits: Tensor, undecided: Tensor) -> Tensor:
        """See `BlockRun.reopen`; notes what the first call thinks of the draft."""
        verify, first = self.options.verify_threshold, self.calls == 1
        if not first and not self.options.verify_committed:
            return undecided
        now, alive = self.ids[rows, here], self.mask[rows, here].clone()
        alive[:, : self.start] = False
        own = torch.ones(now.shape, dtype=torch.float64, device=now.device)
        wide = logits[alive].to(torch.float64, copy=True)
        wide[:, self.tokens.mask] = -torch.inf
        own[alive] = wide.log_softmax(-1).gather(1, now[alive][:, None]).squeeze(1).exp()
        if first:
            self.confidence[rows, here] = torch.where(alive, own, self.confidence[rows, here])
        if verify is None:
            return undecided
        doubted = alive & ~undecided & (own < verify) & ~self.reopened[rows, here]
        self.reopened[rows, here] |= doubted
        return undecided | doubted

    def after(self, rows: Tensor, undecided: Tensor, chosen: Tensor) -> None:
        """Prunes; see `BlockRun.after`."""
        sampler = self.options
        if sampler.prune == "every" or (sampler.prune == "first" and self.calls == 1):
            slots = torch.arange(self.ids.shape[1], device=rows.device)
            ended = self.mask[rows] & (self.ids[rows] == self.tokens.eos) & (slots >= self.start)
            ends = torch.minimum(self.ends[rows], first_index(ended))
            self.ends[rows] = ends
            gone = slots >= ends[:, None]
            self.mask[rows] &= ~gone
            self.ids[rows] = self.ids[rows].masked_fill(gone, self.tokens.eos)
            self.confidence[rows] = self.confidence[rows].masked_fill(gone, torch.nan)
            if not sampler.empty_blocks:
                self.blocks[rows] = blocks = self.count_blocks(ends)
                # A slot that was opened again in an earlier block may still be open where the text now ends before.
                left = (self.mask[rows] & (self.ids[rows] == self.tokens.mask)).any(1)
                self.block[rows] = torch.where(left, torch.minimum(self.block[rows], blocks - 1), self.block[rows])
        kept = self.mask[rows, : chosen.shape[1]]
        self.unread[rows] = (kept & chosen).any(1)

    def _finished(self, rows: Tensor) -> Tensor:
        """A row with a draft to verify takes a call; with `verify_committed` its last one commits nothing.

        What it does not read again was committed in a block whose slots a later call reads.
        """
        done, entered = super()._finished(rows), self.block[rows] >= 0
        if self.options.verify_threshold is not None:
            done &= ~entered | (self.rounds[rows] > 0)
        if self.options.verify_committed:
            done &= ~entered | (self.block[rows] < self.blocks[rows] - 1) | ~self.unread[rows]
        return done
