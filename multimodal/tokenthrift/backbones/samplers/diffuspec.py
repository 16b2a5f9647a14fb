"""DiffuSpec: a diffusion model drafts, a causal model verifies, the text is the causal model's own.

Source: DiffuSpec (arXiv 2510.02358; no official code). One forward pass over the prefix and k MASK gives a lattice of
candidates; a beam search picks the path that diffusion and a causal proxy (an n-gram model) like best; the causal model
reads it once, keeps the longest run it would have written and adds its next token; the draft length k follows how much
was accepted. With greedy verification the result is exactly the greedy text of the causal model.

Differs from the reproduction that is published (pluto0x0/DiffuSpec): its lattice ends at the first slot where EOS is
among the `max_candidates` most probable tokens, whatever its probability; here it ends where EOS is the most probable
one. `compat="released"` restores that.

Why it ends: every round writes at least the causal model's own next token, up to `max_new_tokens`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenthrift.backbones.samplers.loop import Compat

__all__ = ["AdaptiveLength", "DiffuSpec", "LengthRule", "Speculated", "lattice", "path_search", "speculate"]

Proxy = Callable[[Sequence[int], int], float]
"""(tokens so far, next token) -> its log-probability under a cheap causal model."""


@dataclass(frozen=True, kw_only=True)
class DiffuSpec:
    """The settings of the path search, as in the paper.

    Attributes:
        mass: probability that the candidates of a slot have together.
        max_candidates: most candidates of a slot; EOS is always one more where it is not among them.
        beam: paths kept.
        weight: of the diffusion model's log-probability, the proxy has the rest.
        compat: "released" ends the lattice where EOS is among the most probable candidates.
    """

    mass: float = 0.8
    max_candidates: int = 15
    beam: int = 3
    weight: float = 0.5
    compat: Compat = "corrected"

    def __post_init__(self) -> None:
        if not (0 < self.mass <= 1 and 0 <= self.weight <= 1 and min(self.max_candidates, self.beam) >= 1):
            raise ValueError("mass and weight are shares, max_candidates and beam at least 1")


def lattice(log_p: Tensor, eos_id: int, options: DiffuSpec) -> list[list[tuple[int, float]]]:
    """Candidates of each slot with their log-probabilities, the most probable first.

    Args:
        log_p: (k, vocab) of the diffusion model.
        eos_id: id of EOS.
        options: mass and number of candidates.

    Returns:
        A list for each slot up to the one that may end the text.
    """
    released, slots = options.compat == "released", []
    values, order = log_p.sort(dim=-1, descending=True, stable=True)
    most = min(options.max_candidates, log_p.shape[-1])
    for row, (tokens, scores) in enumerate(zip(order[:, :most].tolist(), values[:, :most].tolist(), strict=True)):
        mass, kept, ends = 0.0, [], False
        for token, value in zip(tokens, scores, strict=True):
            kept.append((token, value))
            mass += float(torch.tensor(value).exp())
            ends = ends or token == eos_id
            if mass >= options.mass and (ends or not released):
                break
        if eos_id not in (token for token, _ in kept):
            kept.append((eos_id, float(log_p[row, eos_id])))
        slots.append(kept)
        if ends if released else kept[0][0] == eos_id:
            break
    return slots


def path_search(
    slots: Sequence[Sequence[tuple[int, float]]],
    eos_id: int,
    options: DiffuSpec,
    proxy: Proxy | None = None,
    prefix: Sequence[int] = (),
) -> list[int]:
    """The path through a lattice with the best sum of weighted log-probabilities; it ends after EOS.

    Args:
        slots: see `lattice`.
        eos_id: id of EOS.
        options: beam and weight.
        proxy: scores of a causal model; None likes every token the same.
        prefix: tokens before the lattice.
    """
    paths: list[tuple[list[int], float]] = [([], 0.0)]
    for candidates in slots:
        longer = []
        for path, total in paths:
            if path and path[-1] == eos_id:
                longer.append((path, total))
                continue
            for token, log_p in candidates:
                causal = proxy([*prefix, *path], token) if proxy else 0.0
                longer.append(([*path, token], total + options.weight * log_p + (1 - options.weight) * causal))
        paths = sorted(longer, key=lambda item: item[1], reverse=True)[: options.beam]
        if all(path[-1] == eos_id for path, _ in paths):
            break
    return paths[0][0]


@dataclass(frozen=True, slots=True)
class AdaptiveLength:
    """How long the next draft is, after the drafts so far; a value, `after` gives the next.

    Attributes:
        length: slots of the next draft.
        generated, accepted: moving averages of how much the diffusion model wrote before EOS, and of how much of it
            was accepted.
    """

    length: int = 30
    generated: float = 0.0
    accepted: float = 0.0

    def after(self, generated: int, accepted: int, rule: LengthRule | None = None) -> AdaptiveLength:
        """The state after one more draft."""
        rule = rule or LengthRule()
        mean = (1 - rule.decay) * self.generated + rule.decay * generated
        kept = (1 - rule.decay) * self.accepted + rule.decay * accepted
        length = int(mean) + (rule.growth if kept >= mean else 0)
        return AdaptiveLength(max(rule.shortest, min(rule.longest, length)), mean, kept)


@dataclass(frozen=True, kw_only=True)
class LengthRule:
    """The paper's constants: the share of the newest draft in the averages, the growth, and the bounds."""

    decay: float = 0.5
    growth: int = 10
    shortest: int = 20
    longest: int = 30


@dataclass(frozen=True, slots=True)
class Speculated:
    """The outcome of `speculate`.

    Attributes:
        ids: the new tokens, EOS included where the text ends.
        lengths: draft length of each round.
        accepted: draft tokens that the causal model accepted in each round, as far as they were written.
    """

    ids: list[int]
    lengths: list[int]
    accepted: list[int]


@torch.no_grad()
def speculate(
    draft: Callable[[list[int], int], Tensor],
    verify: Callable[[list[int], list[int]], Tensor],
    prefix: Sequence[int],
    eos_id: int,
    *,
    max_new_tokens: int,
    options: DiffuSpec | None = None,
    rule: LengthRule | None = None,
    proxy: Proxy | None = None,
) -> Speculated:
    """Writes the greedy text of a causal model with few passes of it.

    Args:
        draft: (tokens so far, k) -> (k, vocab) log-probabilities of the diffusion model for the next k slots.
        verify: (tokens so far, draft of n tokens) -> (n + 1,) the causal model's greedy token after the tokens so far,
            after the first draft token, and so on; one pass.
        prefix: tokens before the text.
        eos_id: id of EOS.
        max_new_tokens: most tokens to write.
        options: of the path search.
        rule: of the draft length.
        proxy: of the path search.
    """
    options, rule = options or DiffuSpec(), rule or LengthRule()
    state = AdaptiveLength(rule.longest)
    ids: list[int] = []
    lengths: list[int] = []
    kept: list[int] = []
    while len(ids) < max_new_tokens and (not ids or ids[-1] != eos_id):
        so_far = [*prefix, *ids]
        log_p = draft(so_far, state.length)
        path = path_search(lattice(log_p, eos_id, options), eos_id, options, proxy, so_far)
        greedy = verify(so_far, path).tolist()
        agreed = next((at for at, token in enumerate(path) if token != greedy[at]), len(path))
        new = path[:agreed] if path[:agreed][-1:] == [eos_id] else [*path[:agreed], greedy[agreed]]
        ids += new
        written = log_p.argmax(-1).tolist()
        generated = written.index(eos_id) if eos_id in written else state.length
        lengths.append(state.length)
        kept.append(min(agreed, max_new_tokens - (len(ids) - len(new))))
        state = state.after(generated, agreed, rule)
    return Speculated(ids[:max_new_tokens], lengths, kept)
