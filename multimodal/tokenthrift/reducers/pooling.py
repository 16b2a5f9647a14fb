"""Reducers that join neighbours: average pooling, and stacking along the channels.

Both are the compressions of Llama-AVSR and Llama-MTSK (arXiv 2503.06362, section 3.2), which fix a rate and drop or pad
the remainder. Here the count is fixed: N tokens fall into exactly n windows, the i-th from floor(i N / n) to
floor((i + 1) N / n), so every token is in one window, windows differ by at most one token, and pooling to n m and then
to n is pooling to n. Averages are weighted by how many native tokens each token already stands for.

Stacking changes the width of the embeddings, which the laws of a budget did not foresee. What holds:

* A batch that its budget leaves whole comes back bit for bit, at width D.
* Any other batch has width `rate * D`, whatever its items: windows of fewer tokens, and items left whole beside others
  that shrink, end in zeros. So a row equals the row alone, up to those zeros, and a projector meets one width.
* A window holds at most `rate` tokens, so fewer than ceil(N / rate) tokens is a BudgetError, not a silent change.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenthrift.budget import BudgetError, TokenBudget
from tokenthrift.reducers.base import Item, ItemReducer

__all__ = ["AveragePooling", "Stacking", "average_windows", "stack_windows", "window_starts"]


def window_starts(native: int, cap: int) -> Tensor:
    """Where the windows begin, and the end of the last: (cap + 1,) int64 from 0 to native, for 1 <= cap <= native."""
    return torch.arange(cap + 1) * native // cap


def average_windows(embeddings: Tensor, sizes: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean of every window, computed in at least float32.

    Args:
        embeddings: (N, D).
        sizes: (N,) float32 weights.
        starts: (n + 1,) as from `window_starts`.

    Returns:
        (n, D) means in the dtype of the embeddings, and (n,) summed weights.
    """
    precise = torch.promote_types(embeddings.dtype, torch.float32)
    lengths = starts.diff().to(embeddings.device)
    window = torch.arange(len(lengths), device=embeddings.device).repeat_interleave(lengths)
    mass = sizes.new_zeros(len(lengths)).index_add(0, window, sizes)
    sums = embeddings.new_zeros(len(lengths), embeddings.shape[1], dtype=precise)
    sums = sums.index_add(0, window, embeddings.to(precise) * sizes.to(precise)[:, None])
    return (sums / mass.to(precise)[:, None]).to(embeddings.dtype), mass


def stack_windows(embeddings: Tensor, starts: Tensor, rate: int) -> Tensor:
    """Concatenates the tokens of every window along the channels.

    Args:
        embeddings: (N, D).
        starts: (n + 1,) as from `window_starts`, no window longer than `rate`.
        rate: Places per window; those a window does not fill are zeros.

    Returns:
        (n, rate * D).
    """
    places = starts[:-1, None] + torch.arange(rate)
    places = places.where(places < starts[1:, None], len(embeddings)).to(embeddings.device)
    return pad(embeddings, (0, 0, 0, 1))[places].flatten(1)


class AveragePooling(ItemReducer):
    """Averages windows of neighbouring tokens; a window stands at the place of its first token."""

    def shrink(self, item: Item, cap: int) -> Item:
        """See `ItemReducer.shrink`."""
        if cap == 0:
            return item.select(item.positions[:0])
        starts = window_starts(len(item.positions), cap)
        embeddings, sizes = average_windows(item.embeddings, item.weights(), starts)
        return Item(embeddings, item.positions[starts[:-1].to(item.positions.device)], None, sizes)


class Stacking(ItemReducer):
    """Stacks windows of neighbouring tokens along the channels, to width `rate * D`; see the head of this file.

    Args:
        rate: Most tokens in one window, at least 2.
    """

    def __init__(self, rate: int) -> None:
        if rate < 2:
            raise ValueError(f"stacking joins at least 2 tokens, not {rate}")
        self.rate = rate

    def plan(
        self, native: Sequence[int], budget: TokenBudget, seconds: Sequence[float] | None = None
    ) -> tuple[int, ...]:
        """See `TokenReducer.plan`. Raises BudgetError below ceil(native / rate) tokens."""
        caps = super().plan(native, budget, seconds)
        for n, cap in zip(native, caps, strict=True):
            if cap < (least := -(-n // self.rate)):
                raise BudgetError(
                    f"{cap} of {n} tokens by stacking at most {self.rate}", f"{least} to {n} tokens", least
                )
        return caps

    def shrink(self, item: Item, cap: int) -> Item:
        """See `ItemReducer.shrink`."""
        starts = window_starts(len(item.positions), cap)
        places = starts[:-1].to(item.positions.device)
        _, sizes = average_windows(item.embeddings[:, :0], item.weights(), starts)
        return Item(stack_windows(item.embeddings, starts, self.rate), item.positions[places], None, sizes)

    def keep(self, item: Item) -> Item:
        """Widened with zeros to the width of the others."""
        width = item.embeddings.shape[1]
        return item._replace(embeddings=pad(item.embeddings, (0, width * (self.rate - 1))), codes=None)
