"""Encoding that checks itself: decode, measure, and refine what missed its target error, in a bounded number of passes.

Source: KARL (arXiv 2507.07995) encodes in one pass and never looks at the result; the search that it replaces, ALIT's
(arXiv 2411.02393), looks at every image up to eight times. Here one decoder pass finds the images that missed, and only
those cost more: they are encoded once more with all the tokens that their budget allows, conditioned on the smallest
error, and if that is good enough, bisection finds the fewest tokens that still are. Where tokens are nested (the first
n of m), bisection needs the decoder only.

An image is *met* where the error of what is returned was measured and is not above its target, and *best effort*
otherwise; then it is the encoding of the least error that was seen. Bisection supposes that more tokens mean less
error. Where an image breaks that, what is returned was still measured, and is only longer than it need be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from tokenthrift.budget import BudgetError, BudgetLike, TokenBudget, TokenUsage, budgets_for
from tokenthrift.karl.latent.conditioning import pixel_error
from tokenthrift.karl.model import Karl
from tokenthrift.tokens import TokenBatch

__all__ = ["bisect", "encode_verified", "encoder_passes", "measure", "verdict"]

PASSES = 6
"""Decoder passes that a missed image may cost, the first included."""


def verdict(usage: TokenUsage, budget: TokenBudget) -> Literal["met", "best_effort"]:
    """What verification can say of an image.

    Raises:
        ValueError: the error was not measured, or the budget has no target.
    """
    if usage.error is None or budget.target_error is None:
        raise ValueError("only an image that was verified against a target_error has a verdict")
    return "met" if usage.error <= budget.target_error else "best_effort"


def encoder_passes(rounds: int, nested: bool) -> int:
    """How often an image went through the encoder that took so many decoder passes to verify.

    A miss is encoded once more, and where tokens are not nested, at every count that the search tries.
    """
    return min(rounds, 2) if nested else rounds


def measure(karl: Karl, images: Tensor, tokens: TokenBatch) -> Tensor:
    """Mean absolute error of each image, `(B,)`, decoded."""
    return pixel_error(karl.decode(tokens, (images.shape[2], images.shape[3])), images)


@torch.no_grad()
def encode_verified(
    karl: Karl,
    images: Tensor,
    budget: BudgetLike | Sequence[BudgetLike],
    generator: torch.Generator | None = None,
    *,
    calibrated: bool = False,
    passes: int = PASSES,
) -> TokenBatch:
    """`karl.encode`, and a second look at what came out.

    Args:
        karl: the model.
        images: `(B, 3, H, W)` floating-point in [0, 1].
        budget: for all images, or a list with one for each; all with a `target_error`.
        generator: draws the VAE's latents, once for all passes.
        calibrated: as in `Karl.encode`, for the first pass.
        passes: most decoder passes for an image, at least 1.

    Returns:
        Tokens with the measured error, and with the number of decoder passes as `rounds`. Counts stay within the caps;
        `verdict` says which images met their target.

    Raises:
        BudgetError: a budget has no target, or cannot be honored.
        TypeError, ValueError: images that cannot be encoded.
    """
    budgets = budgets_for(budget, len(images))
    if any(one.target_error is None for one in budgets):
        raise BudgetError("verification without target_error", "a target_error to verify", "e0.05")
    features = None if generator is None else karl.base_features(images, generator)
    first = karl.encode(images, budgets, calibrated=calibrated, features=features)
    images = images.to(first.embeddings)
    measured = measure(karl, images, first).tolist()
    first = replace(first, usage=tuple(replace(u, error=e) for u, e in zip(first.usage, measured, strict=True)))
    # An image that may have no token at all is as good as it gets.
    missed = [i for i, usage in enumerate(first.usage) if usage.cap and verdict(usage, budgets[i]) != "met"]
    if not missed or passes < 2:
        return first
    search = _Search(karl, images[missed], None if features is None else features[missed], [budgets[i] for i in missed])
    # The first pass has shown that so few tokens do not do, if on another condition; the search starts above them.
    caps = [first.usage[i].cap for i in missed]
    floors = [max(budgets[i].min_tokens, 1) - 1 for i in missed]
    lows = [max(f, min(first.usage[i].used, cap - 1)) for i, f, cap in zip(missed, floors, caps, strict=True)]
    targets = [float(budgets[i].target_error or 0) for i in missed]
    counts, errors, rounds = bisect(search.errors, lows, caps, targets, passes - 1)
    refined = search.encoded(counts, range(len(missed)))
    rows, usage = list(range(len(images))), list(first.usage)
    for place, i in enumerate(missed):
        usage[i] = replace(usage[i], rounds=1 + rounds[place])
        if errors[place] <= targets[place] or errors[place] < measured[i]:
            rows[i] = len(images) + place
            usage[i] = replace(usage[i], used=counts[place], error=errors[place])
    found = TokenBatch.cat([first, refined]).select(rows).first([one.used for one in usage])
    return replace(found, usage=tuple(usage))


class _Search:
    """Images that missed, encoded with any number of tokens, conditioned on the smallest error."""

    def __init__(self, karl: Karl, images: Tensor, features: Tensor | None, budgets: Sequence[TokenBudget]) -> None:
        self.karl, self.images, self.features = karl, images, features
        self.budgets = [replace(budget, target_error=None) for budget in budgets]
        self.whole = self._encode(range(len(images)), self.budgets)
        self.seen = {(i, usage.cap): self.whole.select([i]) for i, usage in enumerate(self.whole.usage)}

    def encoded(self, counts: Sequence[int], chosen: Sequence[int]) -> TokenBatch:
        """Some of the images with this many tokens each; what was encoded once is not encoded again."""
        if self.karl.support.nested:
            return self.whole.select(chosen).first(counts)
        wanted = list(zip(chosen, counts, strict=True))
        new = [key for key in wanted if key not in self.seen]
        if new:
            budgets = [
                replace(self.budgets[i], max_tokens=n, min_tokens=min(n, self.budgets[i].min_tokens)) for i, n in new
            ]
            made = self._encode([i for i, _ in new], budgets)
            self.seen |= {key: made.select([place]) for place, key in enumerate(new)}
        return TokenBatch.cat([self.seen[key] for key in wanted])

    def errors(self, counts: Sequence[int], chosen: Sequence[int]) -> list[float]:
        """Their errors."""
        found: list[float] = measure(self.karl, self.images[list(chosen)], self.encoded(counts, chosen)).tolist()
        return found

    def _encode(self, chosen: Sequence[int], budgets: Sequence[TokenBudget]) -> TokenBatch:
        index = list(chosen)
        return self.karl.encode(
            self.images[index], budgets, features=None if self.features is None else self.features[index]
        )


def bisect(
    errors: Callable[[Sequence[int], Sequence[int]], list[float]],
    lows: Sequence[int],
    highs: Sequence[int],
    targets: Sequence[float],
    passes: int,
) -> tuple[list[int], list[float], list[int]]:
    """For each item, few tokens whose error is not above its target, all items at once.

    Args:
        errors: of some items (second argument, their numbers) at some counts (first argument).
        lows: counts that are known or taken to be too few.
        highs: the most that may be used; tried first, and the answer where even they are not enough.
        targets: errors.
        passes: most measurements of an item, at least 1.

    Returns:
        For each item the count, its measured error, and how often the item was measured.
    """
    everyone = range(len(highs))
    count, achieved, spent = list(highs), errors(highs, everyone), [1] * len(highs)
    low, active = list(lows), [i for i in everyone if achieved[i] <= targets[i]]
    while active := [i for i in active if count[i] - low[i] > 1 and spent[i] < passes]:
        middle = [(count[i] + low[i]) // 2 for i in active]
        for i, n, error in zip(active, middle, errors(middle, active), strict=True):
            spent[i] += 1
            if error <= targets[i]:
                count[i], achieved[i] = n, error
            else:
                low[i] = n
    return count, achieved, spent
