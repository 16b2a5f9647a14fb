"""Encoding that checks itself: decode, measure, and mend what missed the wanted error, in a bounded number of passes.

Source: KARL (arXiv 2507.07995) encodes in one pass and never looks at the result; the search that it replaces, ALIT's
(arXiv 2411.02393), looks at every image up to eight times. Here one look finds the images that missed, and only those
cost more: they are encoded once more with all the tokens that their budget allows and the strictest request, and if
that is good enough, the fewest tokens that still are is found by bisection. Where tokens are nested (the first n of m),
bisection needs the decoder only.

An image is *met* where the error of what would be returned was measured and is not above the wanted one, and *best
effort* otherwise; then it is the encoding of the least error that was seen. Bisection supposes that more tokens mean
less error; where an image breaks that, what is returned was still measured, and is only longer than it need be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenthrift.budget import BudgetError, TokenBudget, TokenUsage
from tokenthrift.tokens import TokenBatch

if TYPE_CHECKING:
    from tokenthrift.karl.model import Karl

__all__ = ["bisect", "encoder_passes", "first_tokens", "measure", "repair", "rows", "verdict"]

PASSES = 6
"""Decoder passes that a missed image may cost, the first included."""


def verdict(usage: TokenUsage, budget: TokenBudget) -> Literal["met", "best_effort"]:
    """What verification can say of an image.

    Raises:
        ValueError: the error was not measured, or none was asked for.
    """
    if usage.error is None or budget.target_error is None:
        raise ValueError("only an image that was verified against a target_error has a verdict")
    return "met" if usage.error <= budget.target_error else "best_effort"


def encoder_passes(rounds: int, nested: bool) -> int:
    """How often an image went through the encoder, that took so many decoder passes to verify.

    A miss is encoded once more, and where tokens are not nested, at every count that the search tries.
    """
    return min(rounds, 2) if nested else rounds


def measure(karl: Karl, images: Tensor, tokens: TokenBatch) -> Tensor:
    """Mean absolute error of each image, `(B,)`, decoded."""
    made = karl.decode(tokens, (images.shape[2], images.shape[3]))
    return (made - images).abs().flatten(1).mean(1)


def repair(
    karl: Karl, images: Tensor, tokens: TokenBatch, budgets: Sequence[TokenBudget], passes: int = PASSES
) -> TokenBatch:
    """Measures what was encoded, and encodes anew what missed.

    Args:
        karl: the model.
        images: `(B, 3, H, W)` in [0, 1].
        tokens: `karl.encode` of them under the budgets.
        budgets: of each image; all with a `target_error`.
        passes: most decoder passes for an image, at least 1.

    Returns:
        Tokens with the measured error, and with the number of decoder passes as `rounds`. Counts stay within the caps.

    Raises:
        BudgetError: a budget has no target.
    """
    targets = [budget.target_error for budget in budgets]
    wanted = torch.tensor([-1.0 if t is None else t for t in targets], device=images.device)
    if bool((wanted < 0).any()):
        raise BudgetError("verification without target_error", "a target_error to verify", "e0.05")
    best = _with_errors(tokens, measure(karl, images, tokens), 1)
    # An image that may have no token at all is as good as it gets.
    missed = [i for i, usage in enumerate(best.usage) if usage.cap and verdict(usage, budgets[i]) != "met"]
    if not missed or passes < 2:
        return best
    where = torch.tensor(missed, device=images.device)
    again, wanted = images[where], wanted[where]
    caps = [best.usage[i].cap for i in missed]
    allowed = [replace(budgets[i], max_tokens=cap, target_error=None) for i, cap in zip(missed, caps, strict=True)]
    whole = karl.encode(again, allowed)

    seen = {(i, cap): (whole, i) for i, cap in enumerate(caps)}

    def encoded(counts: Sequence[int], chosen: Sequence[int]) -> TokenBatch:
        """Of some of the missed images: this many tokens each; what was encoded once is not encoded again."""
        if karl.support.nested:
            return first_tokens(rows([(whole, i) for i in chosen]), counts)
        new = [(i, n) for i, n in zip(chosen, counts, strict=True) if (i, n) not in seen]
        if new:
            fewer = [replace(allowed[i], max_tokens=n, min_tokens=min(n, allowed[i].min_tokens)) for i, n in new]
            made = karl.encode(again[torch.tensor([i for i, _ in new], device=again.device)], fewer)
            seen.update({key: (made, place) for place, key in enumerate(new)})
        return rows([seen[key] for key in zip(chosen, counts, strict=True)])

    def errors(counts: Sequence[int], chosen: Sequence[int]) -> list[float]:
        found = encoded(counts, chosen)
        return measure(karl, again[torch.tensor(chosen, device=again.device)], found).tolist()

    # The first pass has shown that so few tokens do not do, if at another request; the search starts above them.
    floors = [max(budgets[i].min_tokens, 1) - 1 for i in missed]
    lows = [max(f, min(best.usage[i].used, cap - 1)) for i, f, cap in zip(missed, floors, caps, strict=True)]
    counts, reached, rounds = bisect(errors, lows, caps, wanted.tolist(), passes - 1)
    mended = encoded(counts, range(len(missed)))
    places = dict(zip(missed, range(len(missed)), strict=True))
    out: list[tuple[TokenBatch, int]] = []
    usage: list[TokenUsage] = []
    for i, first in enumerate(best.usage):
        place = places.get(i)
        assert first.error is not None
        if place is None:
            out.append((best, i))
            usage.append(first)
            continue
        spent = 1 + rounds[place]
        if reached[place] <= wanted[place] or reached[place] < first.error:
            out.append((mended, place))
            usage.append(replace(first, used=counts[place], rounds=spent, error=reached[place]))
        else:
            out.append((best, i))
            usage.append(replace(first, rounds=spent))
    return replace(rows(out), usage=tuple(usage))


def bisect(
    errors: Callable[[Sequence[int], Sequence[int]], list[float]],
    lows: Sequence[int],
    highs: Sequence[int],
    wanted: Sequence[float],
    passes: int,
) -> tuple[list[int], list[float], list[int]]:
    """For each item, few tokens whose error is not above the wanted one, all items at once.

    Args:
        errors: of some items (second argument, their numbers) at some counts (first argument).
        lows: counts that are known or taken to be too few.
        highs: the most that may be used; tried first, and the answer where even they are not enough.
        wanted: errors.
        passes: most measurements of an item, at least 1.

    Returns:
        For each item the count, its measured error, and how often the item was measured.
    """
    everyone = range(len(highs))
    count, reached, spent = list(highs), errors(highs, everyone), [1] * len(highs)
    low, active = list(lows), [i for i in everyone if reached[i] <= wanted[i]]
    while active := [i for i in active if count[i] - low[i] > 1 and spent[i] < passes]:
        middle = [(count[i] + low[i]) // 2 for i in active]
        for i, n, error in zip(active, middle, errors(middle, active), strict=True):
            spent[i] += 1
            if error <= wanted[i]:
                count[i], reached[i] = n, error
            else:
                low[i] = n
    return count, reached, spent


def first_tokens(tokens: TokenBatch, counts: Sequence[int]) -> TokenBatch:
    """The first tokens of each item, of a batch that is padded on the right.

    Args:
        tokens: at least so many for each item.
        counts: to keep.
    """
    width = max(counts)
    mask = torch.arange(width, device=tokens.mask.device) < torch.tensor(counts, device=tokens.mask.device)[:, None]
    return replace(
        tokens,
        embeddings=tokens.embeddings[:, :width] * mask[..., None],
        mask=mask,
        positions=tokens.positions[:, :width].masked_fill(~mask, -1),
        codes=None if tokens.codes is None else tokens.codes[:, :width].masked_fill(~mask, -1),
        usage=tuple(replace(u, used=n, error=None) for u, n in zip(tokens.usage, counts, strict=True)),
    )


def rows(picks: Sequence[tuple[TokenBatch, int]]) -> TokenBatch:
    """A batch of single items of other batches, padded on the right."""
    kept = [batch.mask[i] for batch, i in picks]
    lengths = torch.tensor([int(mask.sum()) for mask in kept], device=kept[0].device)

    def join(values: list[Tensor], padding: float) -> Tensor:
        return pad_sequence([v[m] for v, m in zip(values, kept, strict=True)], True, padding)

    coded = all(batch.codes is not None for batch, _ in picks)
    return TokenBatch(
        embeddings=join([batch.embeddings[i] for batch, i in picks], 0),
        mask=torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None],
        positions=join([batch.positions[i] for batch, i in picks], -1),
        codes=join([b.codes[i] for b, i in picks if b.codes is not None], -1) if coded else None,
        usage=tuple(batch.usage[i] for batch, i in picks),
    )


def _with_errors(tokens: TokenBatch, errors: Tensor, rounds: int) -> TokenBatch:
    usage = [replace(u, error=e, rounds=rounds) for u, e in zip(tokens.usage, errors.tolist(), strict=True)]
    return replace(tokens, usage=tuple(usage))
