"""Reducers that join neighbors: average pooling, and stacking along the channels.

Both are the compressions of Llama-AVSR and Llama-MTSK (arXiv 2503.06362, section 3.2), which fix a rate and drop or pad
the remainder. Here the count is fixed: N tokens fall into exactly n windows, the i-th from floor(i N / n) to
floor((i + 1) N / n), so every token is in one window, windows differ by at most one token, and pooling to n m and then
to n is pooling to n. Averages are weighted by how many native tokens each token already stands for.

Stacking changes the width of the embeddings to `rate * D`, always: windows of fewer tokens, and items that their budget
leaves whole, end in zeros. So a row equals the row alone and a projector meets one width; a budget at or above native
gives the input bit for bit in the first D channels. A window holds at most `rate` tokens, so fewer than ceil(N / rate)
tokens is a BudgetError, not a silent change.

`pool_by_rate` is the other way round, as both papers do it: a rate is given, the count follows. It works on padded
batches and is the compression of Llama-MTSK and the pooling of dLLM-ASR's adapter (arXiv 2601.17902). What differs from
the published code: there every item gets as many tokens as the longest of its batch, so a short one ends in tokens made
of padding, and the last N mod rate states are dropped; here the last token is made of the states that are left, and
padding is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenthrift.budget import BudgetError, BudgetLike, SizeLike, TokenUsage
from tokenthrift.padding import length_mask
from tokenthrift.reducers.base import Item, ItemReducer
from tokenthrift.tokens import TokenBatch

__all__ = ["AveragePooling", "Stacking", "average_windows", "pool_by_rate", "stack_windows", "window_starts"]


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
        rate: Slots per window; those a window does not fill are zeros.

    Returns:
        (n, rate * D).
    """
    indices = starts[:-1, None] + torch.arange(rate)
    indices = indices.where(indices < starts[1:, None], len(embeddings)).to(embeddings.device)
    return pad(embeddings, (0, 0, 0, 1))[indices].flatten(1)


def pool_by_rate(
    states: Tensor,
    lengths: Tensor,
    rate: int,
    mode: Literal["average", "stack"] = "average",
    *,
    whole_windows: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token of every `rate` consecutive states, over a padded batch.

    Args:
        states: (B, N, D); what stands after the end of an item is not read.
        lengths: (B,) states of each item.
        rate: States per token, at least 1.
        mode: Mean of the states (D wide), or the states one after another (rate * D wide, zeros where they end early).
        whole_windows: Drop the states that do not fill a window, as published.

    Returns:
        (B, n, D or rate * D), zero after the end of an item, and (B,) tokens of each item.
    """
    if rate < 1:
        raise ValueError(f"a rate is a number of states per token from 1, not {rate}")
    counts = lengths // rate if whole_windows else -(-lengths // rate)
    size = states.shape[1] // rate if whole_windows else -(-states.shape[1] // rate)
    valid = length_mask(lengths, states.shape[1])
    states = states.masked_fill(~valid[..., None], 0.0)
    missing = size * rate - states.shape[1]
    # A negative padding cuts the states that fill no window.
    windows = pad(states, (0, 0, 0, missing)).unflatten(1, (size, rate))
    if mode == "stack":
        tokens = windows.flatten(2)
    else:
        filled = pad(valid, (0, missing)).unflatten(1, (size, rate)).sum(2)
        tokens = windows.sum(2) / filled.clamp_min(1)[..., None]
    return tokens.masked_fill(~length_mask(counts, size)[..., None], 0.0), counts


class AveragePooling(ItemReducer):
    """Averages windows of neighboring tokens; a window has the position of its first token."""

    def shrink(self, item: Item, cap: int) -> Item:
        """See `ItemReducer.shrink`."""
        if cap == 0:
            return item.select(item.positions[:0])
        starts = window_starts(len(item.positions), cap)
        embeddings, sizes = average_windows(item.embeddings, item.weights(), starts)
        first, window = starts[:-1].to(item.positions.device), torch.arange(cap).repeat_interleave(starts.diff())
        return item.merged(embeddings, item.positions[first], sizes, window.to(item.positions.device))


class Stacking(ItemReducer):
    """Stacks windows of neighboring tokens along the channels, to width `rate * D`; see the head of this file.

    Args:
        rate: Most tokens in one window, at least 2.
    """

    def __init__(self, rate: int) -> None:
        if rate < 2:
            raise ValueError(f"stacking joins at least 2 tokens, not {rate}")
        self.rate = rate

    def plan(
        self, items: Sequence[SizeLike], budget: BudgetLike | Sequence[BudgetLike] = None
    ) -> tuple[TokenUsage, ...]:
        """See `TokenPlanner.plan`. Raises BudgetError below ceil(native / rate) tokens."""
        usage = super().plan(items, budget)
        for item in usage:
            if item.cap < (least := -(-item.native // self.rate)):
                raise BudgetError(
                    f"{item.cap} of {item.native} tokens by stacking at most {self.rate}",
                    f"{least} to {item.native} tokens",
                    least,
                )
        return usage

    def shrink(self, item: Item, cap: int) -> Item:
        """See `ItemReducer.shrink`."""
        starts = window_starts(len(item.positions), cap)
        first = starts[:-1].to(item.positions.device)
        _, sizes = average_windows(item.embeddings[:, :0], item.weights(), starts)
        return Item(stack_windows(item.embeddings, starts, self.rate), item.positions[first], None, sizes)

    def keep(self, item: Item) -> Item:
        """Widened with zeros to the width of the others."""
        return item._replace(embeddings=self._widen(item.embeddings), codes=None)

    def keep_all(self, tokens: TokenBatch) -> TokenBatch:
        """Widened with zeros: the width never depends on the budget or the batch."""
        return replace(tokens, embeddings=self._widen(tokens.embeddings), codes=None)

    def _widen(self, embeddings: Tensor) -> Tensor:
        return pad(embeddings, (0, embeddings.shape[-1] * (self.rate - 1)))
