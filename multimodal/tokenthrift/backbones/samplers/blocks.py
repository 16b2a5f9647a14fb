"""Decoding a response block by block, which LLaDA, Fast-dLLM, Dream, the entropy bound and dLLM-ASR have in common.

Source: LLaDA (arXiv 2502.09992, semi-autoregressive remasking) and Fast-dLLM (arXiv 2505.22618, prefix and dual cache).
The response is cut into blocks from left to right; each forward pass sees the whole canvas (or the block beside cached
keys and values), and only slots up to the end of the present block may be committed. A subclass says how.

Differs from the published loops, which advance a batch together: each row has a block of its own and leaves the batch
when it is done, unless a cache or the option `lockstep` holds rows together; a block without MASK costs no call; a last
block may be shorter.

Why it ends: a call commits at least one slot of every row that it reads and that has an open one, or it uses up one of
a fixed number of steps of the block. Where MASK is allowed as a token and a call without steps changes nothing, the
surest other token is committed; the published loop repeats that call for ever.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tokenthrift.backbones.samplers.loop import Call, Canvas, Generators, Run, Sampler, TokenIds
from tokenthrift.backbones.samplers.rules import best
from tokenthrift.backbones.samplers.scores import MaskToken, Remasking, Scoring, guide, score, uniform

__all__ = ["BlockRun", "BlockSampler", "Cache", "Chosen"]

Cache = Literal["none", "prefix", "dual"]
"""Which keys and values a block reuses after its first call: none, those left of it, or all but its own."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a commit rule may look at.

    Attributes:
        logits: (R, W, vocab) after guidance.
        token: (R, W) candidates.
        confidence: (R, W), -inf where a slot is not open.
        open_slots: (R, W) undecided slots up to the end of the block.
        rows: (R,) rows of the batch.
    """

    logits: Tensor
    token: Tensor
    confidence: Tensor
    open_slots: Tensor
    rows: Tensor


@dataclass(frozen=True, kw_only=True)
class BlockSampler(Sampler):
    """Options that every sampler in blocks has.

    Attributes:
        block_length: slots of a block; None takes the whole response as one.
        temperature, remasking, mask_token: see `Scoring`.
        guidance: scale of classifier-free guidance: a second pass reads the canvas without what was given, 0 for none.
        cache: see `Cache`; needs a `CachedPredict`. After a block's first call its slots see old keys and values of the
            others, which is exact where the model's mask hides them, and an approximation elsewhere.
        lockstep: a block ends for all rows at once.
        empty_blocks: a block without MASK still costs a call.
        aligned: blocks begin at multiples of their length from the first slot of the canvas, prompt included, as those
            of a model with attention over blocks do; the first is shorter where the prompt ends within one.
    """

    block_length: int | None = None
    temperature: float = 0.0
    remasking: Remasking = "low_confidence"
    mask_token: MaskToken | None = None
    guidance: float = 0.0
    cache: Cache = "none"
    lockstep: bool | None = None
    empty_blocks: bool | None = None
    aligned: bool = False

    def __post_init__(self) -> None:
        if self.block_length is not None and self.block_length < 1:
            raise ValueError(f"block_length must be at least 1, not {self.block_length}")
        if not (0 <= self.temperature < math.inf and 0 <= self.guidance < math.inf):
            raise ValueError("temperature and guidance must be finite and not negative")
        if self.cache != "none" and self.guidance:
            raise ValueError("guidance reads every canvas twice and has no cached form: leave one of them out")

    def default(self, **values: Any) -> None:
        """Gives options that were left at None their value."""
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def scoring(self) -> Scoring:
        """How slots are scored."""
        assert self.mask_token is not None
        return Scoring(temperature=self.temperature, remasking=self.remasking, mask_token=self.mask_token)

    def steps_in_blocks(self, run: BlockRun, row: int) -> list[int] | None:
        """Steps of each block of a row; None where a block ends with its last MASK, whatever it takes."""
        del run, row
        return None

    def block_ended(self, had: int, steps: int, decided: bool) -> bool:
        """Whether a block of so many steps is over after `had` calls; `decided` says that no MASK is left."""
        return decided or had >= steps

    @abstractmethod
    def choose(self, run: BlockRun, found: Chosen) -> Tensor:
        """Slots to commit, (R, W) bool, a subset of those that are open."""

    def begin(self, canvas: Canvas, tokens: TokenIds, generators: Generators) -> BlockRun:
        """See `Sampler.begin`."""
        return BlockRun(self, canvas, tokens, generators)


class BlockRun(Run):
    """A decoding in blocks.

    Attributes:
        sampler: the options.
        given: (B, T) bool, slots that were decided from the start.
        block: (B,) the block each row is in.
        step_in_block: (B,) calls it had in that block.
        masked_at_entry: (B,) undecided slots up to the end of the block when it entered it, those of a prompt with
            MASK in it too. Where a slot may predict MASK, those of the block alone, as published: earlier blocks may
            have left others.
    """

    def __init__(self, sampler: BlockSampler, canvas: Canvas, tokens: TokenIds, generators: Generators) -> None:
        super().__init__(canvas, tokens, generators)
        self.sampler = sampler
        self.given = canvas.ids != tokens.mask
        self.given[:, canvas.start :] &= canvas.mask[:, canvas.start :]
        responses = self.ends - self.start
        self.block_length = sampler.block_length or max(1, int(responses.max()) if len(responses) else 1)
        self.origin = self.start - (self.start % self.block_length if sampler.aligned else 0)
        self.blocks = self.count_blocks(self.ends)
        self.steps = [sampler.steps_in_blocks(self, row) for row in range(len(self.ids))]
        self.block = torch.full_like(self.ends, -1)
        self.step_in_block = torch.zeros_like(self.ends)
        self.masked_at_entry = torch.zeros_like(self.ends)
        self.held = sampler.lockstep or sampler.cache != "none"

    def count_blocks(self, ends: Tensor) -> Tensor:
        """Blocks of rows that end at (R,)."""
        return torch.where(ends > self.start, -((self.origin - ends) // self.block_length), 0)

    def firsts(self, rows: Tensor) -> Tensor:
        """(R,) first slot of the present block of each row."""
        return (self.origin + self.block[rows] * self.block_length).clamp(min=self.start)

    def stops(self, rows: Tensor) -> Tensor:
        """(R,) first slot after the present block of each row."""
        return torch.minimum(self.origin + (self.block[rows] + 1) * self.block_length, self.ends[rows])

    def open_slots(self, rows: Tensor, width: int) -> Tensor:
        """(R, W) undecided slots up to the end of the present block."""
        inside = torch.arange(width, device=rows.device) < self.stops(rows)[:, None]
        return inside & self.mask[rows, :width] & (self.ids[rows, :width] == self.tokens.mask)

    def request(self) -> Call | None:
        """The rows that still run, cut to the longest."""
        self._advance()
        rows = (self.block < self.blocks).nonzero().squeeze(1)
        if not len(rows):
            return None
        width, cache = int(self.ends[rows].max()), self.sampler.cache
        ids, mask = self.ids[rows, :width], self.mask[rows, :width]
        if cache == "none":
            if self.sampler.guidance:
                free = ids.masked_fill(self.given[rows, :width], self.tokens.mask)
                ids, mask, rows = torch.cat([ids, free]), torch.cat([mask, mask]), torch.cat([rows, rows])
            return Call(ids, mask, rows)
        first = int(self.origin + self.block[rows[0]] * self.block_length)
        if not bool(self.step_in_block[rows].any()):
            return Call(ids, mask, rows, refresh=True)
        stop = width if cache == "prefix" else min(width, int(self.stops(rows).max()))
        return Call(ids[:, first:stop], mask[:, first:stop], rows, window=(first, stop))

    def step(self, call: Call, logits: Tensor, last: bool) -> None:
        """Scores the undecided slots, commits some, and notes what was committed."""
        rows = call.rows
        if self.sampler.guidance:
            logits, rows = guide(logits, self.sampler.guidance), rows[: len(rows) // 2]
        first = call.window[0] if call.window else 0
        here = slice(first, first + logits.shape[1])
        undecided = self.mask[rows, here] & (self.ids[rows, here] == self.tokens.mask)
        undecided = self.reopen(rows, here, logits, undecided)
        inside = torch.arange(here.start, here.stop, device=rows.device) < self.stops(rows)[:, None]
        open_slots = undecided if last else undecided & inside
        token, confidence = self.candidates(logits, rows, open_slots, first)
        if last:
            chosen = open_slots
            token, confidence = self._other_than_mask(logits, open_slots, token, confidence, open_slots)
        else:
            chosen = self.sampler.choose(self, Chosen(logits, token, confidence, open_slots, rows))
            stuck = self._stuck(rows, open_slots, chosen, token)
            if bool(stuck.any()):
                wanted = open_slots & stuck[:, None]
                token, confidence = self._other_than_mask(logits, wanted, token, confidence, wanted)
                chosen = torch.where(stuck[:, None], best(confidence, open_slots), chosen)
        now = torch.where(chosen, token, self.ids[rows, here].masked_fill(undecided, self.tokens.mask))
        self.ids[rows, here] = now
        self.confidence[rows, here] = torch.where(chosen, confidence.double(), self.confidence[rows, here])
        self.rounds[rows] += 1
        self.step_in_block[rows] += 1
        self.after(rows, undecided, chosen)

    def reopen(self, rows: Tensor, here: slice, logits: Tensor, undecided: Tensor) -> Tensor:
        """Which slots (R, W) are undecided after a look at the logits; a subclass may doubt decided ones."""
        del rows, here, logits
        return undecided

    def after(self, rows: Tensor, undecided: Tensor, chosen: Tensor) -> None:
        """What a subclass does at the end of a step."""

    def candidates(self, logits: Tensor, rows: Tensor, open_slots: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """(R, W) candidate tokens and their confidence, -inf where a slot is not open; logits begin at slot `first`."""
        scoring, shape, device = self.sampler.scoring(), open_slots.shape, logits.device
        lengths = (self.ends[rows] - first).clamp(0, shape[1])
        noise = random = None
        if scoring.temperature:
            wide = (*shape, logits.shape[-1])
            noise = uniform(self.generators, rows, lengths, wide, torch.float64, device)[open_slots]
        if scoring.remasking == "random":
            random = uniform(self.generators, rows, lengths, shape, torch.float32, device)[open_slots]
        found, sure = score(logits[open_slots], self.tokens, scoring, noise, random)
        token = torch.full(shape, self.tokens.mask, dtype=torch.int64, device=device)
        confidence = torch.full(shape, -torch.inf, dtype=sure.dtype, device=device)
        token[open_slots], confidence[open_slots] = found, sure
        return token, confidence

    def _stuck(self, rows: Tensor, open_slots: Tensor, chosen: Tensor, token: Tensor) -> Tensor:
        """(R,) rows that the step would leave as they are, without a count of steps that ends them."""
        moves = (chosen & (token != self.tokens.mask)).any(1)
        free = torch.tensor([self.steps[row] is None for row in rows.tolist()], device=rows.device)
        return free & open_slots.any(1) & ~moves

    def _other_than_mask(
        self, logits: Tensor, where: Tensor, token: Tensor, confidence: Tensor, open_slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Candidates in which the slots of `where` that predict MASK predict their best other token."""
        silent = where & open_slots & ((token == self.tokens.mask) | (confidence == -torch.inf))
        found, sure = score(logits[silent], self.tokens, Scoring())
        token, confidence = token.clone(), confidence.double()
        token[silent], confidence[silent] = found, sure
        return token, confidence

    def _advance(self) -> None:
        """Moves rows whose block is finished to the next block that costs a call."""
        while True:
            rows = (self.block < self.blocks).nonzero().squeeze(1)
            done = rows[self._finished(rows)] if len(rows) else rows
            if not len(done) or (self.held and len(done) < len(rows)):
                return
            self.block[done] += 1
            self.step_in_block[done] = 0
            done = done[self.block[done] < self.blocks[done]]
            if len(done):
                counted = self.open_slots(done, self.ids.shape[1])
                if self.sampler.mask_token != "renormalize":
                    counted &= torch.arange(counted.shape[1], device=rows.device) >= self.firsts(done)[:, None]
                self.masked_at_entry[done] = counted.sum(1)

    def _finished(self, rows: Tensor) -> Tensor:
        """(R,) bool: the present block takes no further call."""
        entered = self.block[rows] >= 0
        had = self.step_in_block[rows]
        done = ~self.open_slots(rows, self.ids.shape[1]).any(1) & ((had > 0) | (not self.sampler.empty_blocks))
        for at, (row, block) in enumerate(zip(rows.tolist(), self.block[rows].tolist(), strict=True)):
            steps = self.steps[row]
            if steps is not None and block >= 0:
                done[at] = self.sampler.block_ended(int(had[at]), steps[block], bool(done[at]))
        return done | ~entered
