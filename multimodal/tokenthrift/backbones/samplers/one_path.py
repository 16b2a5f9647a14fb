"""DiffuSpec's drafting as a sampler: one call of the model, and the best path through what it says.

Source: DiffuSpec (arXiv 2510.02358), causal-consistency path search; see `diffuspec` for the lattice, the search and
the whole speculative loop. As a sampler it fills whatever canvas there is, so it drafts for certified decoding too.

Differs: slots that are decided stay as they are, with one candidate; a path that ends early ends the text. Without a
proxy (an n-gram model of the text so far) the path is that of the most probable tokens.

Why it ends: there is one call, which commits every slot.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenthrift.backbones.samplers.diffuspec import DiffuSpec, Proxy, lattice, path_search
from tokenthrift.backbones.samplers.loop import Call, Canvas, Generators, Run, Sampler, TokenIds

__all__ = ["OnePathSampler"]


@dataclass(frozen=True, kw_only=True)
class OnePathSampler(Sampler):
    """Commits the best path after one call.

    Attributes:
        options: of lattice and search.
        proxy: scores of a causal model; None likes every token the same.
    """

    options: DiffuSpec = field(default_factory=DiffuSpec)
    proxy: Proxy | None = None

    def begin(self, canvas: Canvas, tokens: TokenIds, generators: Generators) -> Run:
        """See `Sampler.begin`."""
        return _OnePathRun(self, canvas, tokens, generators)


class _OnePathRun(Run):
    def __init__(self, sampler: OnePathSampler, canvas: Canvas, tokens: TokenIds, generators: Generators) -> None:
        super().__init__(canvas, tokens, generators)
        self.sampler = sampler

    def request(self) -> Call | None:
        """The rows with an open slot, once."""
        rows = (self.mask & (self.ids == self.tokens.mask))[:, self.start :].any(1).nonzero().squeeze(1)
        if self.calls or not len(rows):
            return None
        width = int(self.ends[rows].max())
        return Call(self.ids[rows, :width], self.mask[rows, :width], rows)

    def step(self, call: Call, logits: Tensor, last: bool) -> None:
        """Searches the path of each row."""
        del last
        wide = logits.to(torch.float64, copy=True)
        wide[..., self.tokens.mask] = -torch.inf
        log_p = wide.log_softmax(-1).nan_to_num(nan=-torch.inf)
        for at, row in enumerate(call.rows.tolist()):
            before = call.ids[at, : self.start][call.mask[at, : self.start]].tolist()
            slots = range(self.start, int(self.ends[row]))
            given = [(int(call.ids[at, slot]), 0.0) for slot in slots]
            candidates = [
                [own] if own[0] != self.tokens.mask else self._candidates(log_p[at, slot])
                for slot, own in zip(slots, given, strict=True)
            ]
            path = path_search(candidates, self.tokens.eos, self.sampler.options, self.sampler.proxy, before)
            for slot, token in zip(slots, path, strict=False):
                if given[slot - self.start][0] == self.tokens.mask:
                    self.ids[row, slot], self.confidence[row, slot] = token, log_p[at, slot, token].exp()
            end = self.start + len(path)
            self.mask[row, end:], self.ids[row, end:] = False, self.tokens.eos
            self.ends[row] = min(int(self.ends[row]), end)
        self.rounds[call.rows] += 1

    def _candidates(self, log_p: Tensor) -> list[tuple[int, float]]:
        found = lattice(log_p[None], self.tokens.eos, self.sampler.options)[0]
        return [(token, value) for token, value in found if token != self.tokens.mask]
