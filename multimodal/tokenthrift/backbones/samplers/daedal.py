"""DAEDAL: a response that grows until it is long enough, and where the model is lost.

Source: DAEDAL (arXiv 2508.00819, sections 3.2 and 3.3). Phase 1 commits nothing: a row gets more MASK slots at its end
until the last slots are surely EOS. Phase 2 decides block by block every slot that is sure enough; where an undecided
slot of the block is very unsure and the end is not sure either, that one slot becomes several. Without phase 1 and with
`drafts`, the insertion refines a draft that is too short: a draft token that the model finds unlikely in its place
becomes several slots to decide anew.

Differs from the published code, unless `compat="released"`:
- rows are independent: each begins phase 2 when its own end is sure, and leaves the batch when it is done (`lockstep`);
- MASK is no candidate (`mask_token`); published, a slot that predicts MASK is passed over as long as another does not;
- an insertion takes only as many slots as `max_length` leaves (`cut_tail=False`); published, the end of the row is cut;
- softmax and noise in float64 (`wide`); published, noise in float32, softmax too where the model is no wider.

Why it ends: phase 1 adds a slot a call up to `max_length`; in phase 2 every call decides a slot of each row it reads,
and insertions can add no more than `max_length` slots in all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenthrift.backbones.samplers.loop import Call, Canvas, Compat, Generators, Run, Sampler, TokenIds
from tokenthrift.backbones.samplers.scores import MaskToken, Scoring, guide, score, uniform
from tokenthrift.padding import pad_rows

__all__ = ["DaedalSampler", "eos_confidence"]


def eos_confidence(logits: Tensor, eos_id: int, window: int) -> float:
    """How sure a response is of its end.

    Args:
        logits: (L, vocab) of the response.
        eos_id: id of EOS.
        window: how many slots that predict EOS count, from the right; others between them are passed over.

    Returns:
        The sum of their probabilities of EOS, divided by `window` also where there are fewer.
    """
    ends = (logits.argmax(-1) == eos_id).nonzero().squeeze(1)[-window:]
    return float(logits[ends].softmax(-1)[:, eos_id].sum()) / window


@dataclass(frozen=True, kw_only=True)
class DaedalSampler(Sampler):
    """Decodes a response whose length it finds itself; the canvas is what it starts from, 64 MASK in the paper.

    Attributes:
        max_length: most slots of a response.
        block_length: slots of a block of phase 2.
        high: confidence above which a slot is committed.
        low: confidence below which a slot is where something is missing.
        expansion: slots that phase 1 adds at once, and that an insertion makes of one.
        eos_window: slots that say how sure the end is; half as many EOS are appended after phase 1.
        eos_threshold: sureness of the end that ends phase 1.
        eos_insert_threshold: sureness of the end from which nothing is inserted.
        grow: phase 1 runs.
        drafts: draft tokens, too, are where something may be missing, each at most once.
        temperature: of the Gumbel noise in phase 2.
        guidance: of phase 2, see `BlockSampler`.
        compat: which defaults the options left at None have.
        mask_token, wide: see `Scoring`.
        lockstep, cut_tail: see the file's docstring.
    """

    max_length: int = 2048
    block_length: int = 32
    high: float = 0.9
    low: float = 0.1
    expansion: int = 8
    eos_window: int = 32
    eos_threshold: float = 0.5
    eos_insert_threshold: float = 0.9
    grow: bool = True
    drafts: bool = False
    temperature: float = 0.0
    guidance: float = 0.0
    compat: Compat = "corrected"
    mask_token: MaskToken | None = None
    wide: bool | None = None
    lockstep: bool | None = None
    cut_tail: bool | None = None

    def __post_init__(self) -> None:
        if min(self.max_length, self.block_length, self.eos_window) < 1 or self.expansion < 2:
            raise ValueError("max_length, block_length and eos_window must be at least 1, expansion at least 2")
        if not (0 <= self.temperature < math.inf and 0 <= self.guidance < math.inf):
            raise ValueError("temperature and guidance must be finite and not negative")
        for name in ("high", "low", "eos_threshold", "eos_insert_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {getattr(self, name)}")
        released = self.compat == "released"
        values = {"mask_token": "skip" if released else "renormalize", "wide": not released}
        # Phase 1 has no guidance, so rows in different phases could not share a call.
        for name, value in {**values, "lockstep": released or self.guidance > 0, "cut_tail": released}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.mask_token == "allow":
            raise ValueError('mask_token "allow" would leave MASK in the text; use "skip" or "renormalize"')

    def begin(self, canvas: Canvas, tokens: TokenIds, generators: Generators) -> DaedalRun:
        """See `Sampler.begin`.

        Raises:
            ValueError: a response begins longer than `max_length`.
        """
        run = DaedalRun(self, canvas, tokens, generators)
        longest = int((run.ends - run.start).max()) if len(run.ends) else 0
        if longest > self.max_length:
            raise ValueError(f"a response of {longest} slots is longer than max_length {self.max_length}")
        return run


class DaedalRun(Run):
    """A decoding whose rows change length.

    Attributes:
        growing: (B,) bool, rows in phase 1.
        block: (B,) first slot of the block each row is in.
        draft: (B, T) bool, draft tokens that may still be replaced.
    """

    def __init__(self, sampler: DaedalSampler, canvas: Canvas, tokens: TokenIds, generators: Generators) -> None:
        super().__init__(canvas, tokens, generators)
        self.sampler = sampler
        self.draft = (self.ids != tokens.mask) & self.mask & sampler.drafts
        self.draft[:, : self.start] = False
        self.growing = torch.full_like(self.mask[:, 0], sampler.grow)
        self.block = torch.full_like(self.ends, self.start)
        self._advance()

    def request(self) -> Call | None:
        """The rows that still run, cut to the longest; all rows where they are held in lockstep."""
        running = self.growing | (self.block < self.ends)
        if not bool(running.any()):
            return None
        rows = (running | bool(self.sampler.lockstep)).nonzero().squeeze(1)
        width = int(self.ends[rows].max())
        ids, mask = self.ids[rows, :width], self.mask[rows, :width]
        if self.sampler.guidance and not bool(self.growing.any()):
            prompt = mask & (torch.arange(width, device=rows.device) < self.start)
            free = ids.masked_fill(prompt, self.tokens.mask)
            ids, mask, rows = torch.cat([ids, free]), torch.cat([mask, mask]), torch.cat([rows, rows])
        return Call(ids, mask, rows)

    def step(self, call: Call, logits: Tensor, last: bool) -> None:
        """Grows the rows that are in phase 1, decides and inserts in the others."""
        rows = call.rows
        if self.sampler.guidance and not bool(self.growing.any()):
            logits, rows = guide(logits, self.sampler.guidance), rows[: len(rows) // 2]
        if not self.sampler.wide:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self.rounds[rows] += 1
        token, confidence = self._candidates(logits, rows)
        growing = rows[self.growing[rows]].tolist()
        decoded = [_Row(*row) for row in zip(*map(self._split, (self.ids, self.confidence, self.draft)), strict=True)]
        longer = []
        for at, row in enumerate(rows.tolist()):
            if last:
                self._decide(row, decoded[row], logits[at], token[at], confidence[at], last=True)
            elif row in growing:
                if self._grows(decoded[row], logits[at]):
                    longer.append(row)
            elif int(self.block[row]) < int(self.ends[row]):
                self._decide(row, decoded[row], logits[at], token[at], confidence[at], last=False)
                self._insert(row, decoded[row], logits[at], token[at], confidence[at])
        if not last and not (longer and self.sampler.lockstep):
            for row in set(growing) - set(longer):
                self.growing[row] = False
                decoded[row].append(self._room(decoded[row], self.sampler.eos_window // 2), self.tokens.eos)
        self._store(decoded)
        self._advance()

    def _candidates(self, logits: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(R, W) candidate tokens and confidences of every slot; rows in phase 1 need none."""
        sampler, noise = self.sampler, None
        assert sampler.mask_token is not None
        assert sampler.wide is not None
        temperature = 0.0 if bool(self.growing[rows].all()) else sampler.temperature
        if temperature:
            lengths = self.ends[rows].clamp(max=logits.shape[1])
            dtype = torch.float64 if sampler.wide else torch.float32
            noise = uniform(self.generators, rows, lengths, logits.shape, dtype, logits.device).flatten(0, 1)
        scoring = Scoring(temperature=temperature, mask_token=sampler.mask_token, wide=sampler.wide)
        token, confidence = score(logits.flatten(0, 1), self.tokens, scoring, noise)
        return token.reshape(logits.shape[:2]), confidence.reshape(logits.shape[:2])

    def _room(self, row: _Row, wanted: int) -> int:
        """How many of the wanted slots a row may still get."""
        return min(wanted, self.sampler.max_length - (len(row.ids) - self.start))

    def _end(self, row: _Row, logits: Tensor) -> float:
        return eos_confidence(logits[self.start : len(row.ids)], self.tokens.eos, self.sampler.eos_window)

    def _grows(self, row: _Row, logits: Tensor) -> bool:
        """Phase 1: appends MASK where the end is not sure and there is room."""
        more = self._room(row, self.sampler.expansion)
        if more < 1 or self._end(row, logits) >= self.sampler.eos_threshold:
            return False
        row.append(more, self.tokens.mask)
        return True

    def _decide(self, index: int, row: _Row, logits: Tensor, token: Tensor, confidence: Tensor, *, last: bool) -> None:
        """Commits the sure slots of the block, and always the surest; every open slot where `last`."""
        stop = len(row.ids) if last else min(len(row.ids), int(self.block[index]) + self.sampler.block_length)
        at = ((row.ids[:stop] == self.tokens.mask) & self.mask[index, :stop]).nonzero().squeeze(1)
        if not len(at):
            return
        found, sure = token[at], confidence[at]
        silent = found == self.tokens.mask
        chosen = (sure > self.sampler.high) & ~silent
        if last or bool(silent.all()):
            other, better = score(logits[at], self.tokens, Scoring(wide=bool(self.sampler.wide)))
            found, sure = torch.where(silent, other, found), torch.where(silent, better, sure)
            silent = torch.zeros_like(silent)
        if last:
            chosen = torch.ones_like(silent)
        elif not bool(chosen.any()):
            chosen[sure.masked_fill(silent, -torch.inf).nan_to_num(nan=0.0).argmax()] = True
        row.ids[at[chosen]], row.sure[at[chosen]] = found[chosen], sure[chosen].double()

    def _insert(self, index: int, row: _Row, logits: Tensor, token: Tensor, confidence: Tensor) -> None:
        """Turns the least sure slot of the block into several, where it is very unsure and the end is too."""
        sampler, first = self.sampler, int(self.block[index])
        stop = min(len(row.ids), first + sampler.block_length)
        now, draft, here = row.ids[first:stop], row.draft[first:stop], logits[first:stop].double().softmax(-1)
        # A slot that predicts MASK is as sure as MASK is probable, a draft token as it is probable itself.
        doubt = torch.where(token[first:stop] == self.tokens.mask, here[:, self.tokens.mask], confidence[first:stop])
        doubt = torch.where(draft, here.gather(1, now[:, None]).squeeze(1), doubt)
        undecided = now == self.tokens.mask
        candidates = (undecided | draft) & (doubt < sampler.low)
        room = self._room(row, sampler.max_length)
        sure_of_end = self._end(row, logits) >= sampler.eos_insert_threshold
        if room < 1 or sure_of_end or not bool(candidates.any()):
            if not bool(undecided.any()):
                row.draft[first:stop] = False
            return
        slot = first + int(doubt.masked_fill(~candidates, torch.inf).argmin())
        count = sampler.expansion if sampler.cut_tail else min(sampler.expansion, room + 1)
        row.split(slot, count, self.tokens.mask, self.start + sampler.max_length)

    def _split(self, padded: Tensor) -> list[Tensor]:
        return [row[:end].clone() for row, end in zip(padded, self.ends.tolist(), strict=True)]

    def _store(self, rows: list[_Row]) -> None:
        """Pads the rows again; padding holds EOS."""
        prompt = self.mask[:, : self.start]
        self.ends = torch.tensor([len(row.ids) for row in rows], device=self.ends.device)
        self.ids, self.mask = pad_rows([row.ids for row in rows], value=self.tokens.eos)
        self.mask[:, : self.start] = prompt
        self.confidence, _ = pad_rows([row.sure for row in rows], value=torch.nan)
        self.draft, _ = pad_rows([row.draft for row in rows])

    def _advance(self) -> None:
        """Moves rows past the blocks that hold nothing to decide or to doubt."""
        work = self.mask & ((self.ids == self.tokens.mask) | self.draft)
        for row, end in enumerate(self.ends.tolist()):
            first, length = int(self.block[row]), self.sampler.block_length
            while not bool(self.growing[row]) and first < end and not bool(work[row, first : first + length].any()):
                first += length
            self.block[row] = first


@dataclass(slots=True)
class _Row:
    """One row without padding: ids, their confidence, and which are draft tokens that may be replaced."""

    ids: Tensor
    sure: Tensor
    draft: Tensor

    def append(self, count: int, token: int) -> None:
        self.ids = torch.cat([self.ids, self.ids.new_full((count,), token)])
        self.sure = torch.cat([self.sure, self.sure.new_full((count,), torch.nan)])
        self.draft = torch.cat([self.draft, self.draft.new_zeros(count)])

    def split(self, slot: int, count: int, token: int, longest: int) -> None:
        """Puts `count` tokens in the place of one slot and cuts the row at `longest`."""
        rest = _Row(self.ids[slot + 1 :], self.sure[slot + 1 :], self.draft[slot + 1 :])
        self.ids, self.sure, self.draft = self.ids[:slot], self.sure[:slot], self.draft[:slot]
        self.append(count, token)
        self.ids = torch.cat([self.ids, rest.ids])[:longest]
        self.sure = torch.cat([self.sure, rest.sure])[:longest]
        self.draft = torch.cat([self.draft, rest.draft])[:longest]
