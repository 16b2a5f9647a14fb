"""What a reducer is, and the part that all training-free ones share.

A reducer turns the native tokens of a batch into at most as many as a budget allows, and says beforehand how many that
will be. `ItemReducer` handles batching, padding, checks and usage around a rule for one item.

Differs from published reducers, which work on whole padded batches: items are taken out of the padding and reduced one
by one. A batched matrix product may differ in its last bit with the padding, and a near-tie then keeps another token;
one item at a time, a row cannot depend on its neighbors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenthrift.budget import BudgetLike, BudgetSupport, SizeLike, TokenUsage
from tokenthrift.padding import pad_rows
from tokenthrift.tokens import TokenBatch

__all__ = ["Item", "ItemReducer", "TokenReducer", "check_finite", "pad_items", "unpad"]


class TokenReducer(Protocol):
    """Reduces native tokens under a budget; trained and training-free ones alike."""

    @property
    def support(self) -> BudgetSupport:
        """What the reducer honors."""

    def plan(
        self, items: Sequence[SizeLike], budget: BudgetLike | Sequence[BudgetLike] = None
    ) -> tuple[TokenUsage, ...]:
        """What every item will keep, or at most keep where content decides; see `TokenPlanner.plan`."""

    def reduce(self, tokens: TokenBatch, budget: BudgetLike | Sequence[BudgetLike]) -> TokenBatch:
        """Keeps to the plan. A budget at or above native returns the input bit for bit.

        Args:
            tokens: Native tokens, padded on either side.
            budget: Ceilings for each item.

        Raises:
            BudgetError: The budget cannot be honored.
            ValueError: A real token is not finite.
        """


class Item(NamedTuple):
    """The real tokens of one item: embeddings (N, D), positions (N,), and where known codes, sizes and sources.

    `sources` (M,) is for tokens that were merged: of each of the M native ones, the index among the N, -1 if dropped.
    """

    embeddings: Tensor
    positions: Tensor
    codes: Tensor | None
    sizes: Tensor | None
    sources: Tensor | None = None

    def select(self, indices: Tensor) -> Item:
        """Keeps the tokens at `indices` (n,) int64."""
        codes, sizes = (None if values is None else values[indices] for values in (self.codes, self.sizes))
        sources = self.sources
        if sources is not None:
            new = sources.new_full((len(self.positions) + 1,), -1)
            new[indices] = torch.arange(len(indices), device=new.device)
            sources = new[sources]  # -1 reads the last entry, which stays -1
        return Item(self.embeddings[indices], self.positions[indices], codes, sizes, sources)

    def merged(self, embeddings: Tensor, positions: Tensor, sizes: Tensor, group: Tensor) -> Item:
        """The item with its tokens joined.

        Args:
            embeddings: (n, D), of every group.
            positions: (n,), of its first member.
            sizes: (n,), its native tokens.
            group: (N,) int64, the group of each token.
        """
        sources = group
        if self.sources is not None:
            sources = torch.cat([group, group.new_full((1,), -1)])[self.sources]
        return Item(embeddings, positions, None, sizes, sources)

    def weights(self) -> Tensor:
        """(N,) float32: how many native tokens each stands for; 1 where nothing was merged yet."""
        return torch.ones(len(self.positions), device=self.positions.device) if self.sizes is None else self.sizes


class ItemReducer(ABC):
    """A reducer made of a rule for one item. Keeps exactly what it plans; real tokens come out left-aligned.

    `usage` of the result describes this reduction: reducing twice, native is what the first left.
    """

    support = BudgetSupport(
        fields=frozenset({"max_tokens", "retention", "tokens_per_second"}), nested=False, training_free=True
    )

    @abstractmethod
    def shrink(self, item: Item, cap: int) -> Item:
        """Reduces one item to exactly `cap` tokens, with positions strictly increasing; `0 <= cap < N`."""

    def plan(
        self, items: Sequence[SizeLike], budget: BudgetLike | Sequence[BudgetLike] = None
    ) -> tuple[TokenUsage, ...]:
        """See `TokenPlanner.plan`; here the plan is the exact count."""
        return self.support.plan(items, budget)

    def reduce(self, tokens: TokenBatch, budget: BudgetLike | Sequence[BudgetLike]) -> TokenBatch:
        """See `TokenReducer.reduce`."""
        return self.reduce_each(tokens, budget, [self.shrink] * len(tokens.mask))

    def reduce_each(
        self,
        tokens: TokenBatch,
        budget: BudgetLike | Sequence[BudgetLike],
        rules: Sequence[Callable[[Item, int], Item]],
    ) -> TokenBatch:
        """`reduce` with a rule for every item: `shrink`, told what it should know of the item besides."""
        usage = self.plan(tokens.item_sizes(), budget)
        check_finite(tokens)
        if all(item.used == item.native for item in usage):
            return self.keep_all(replace(tokens, usage=usage))
        items = [
            shrink(item, planned.used) if planned.used < planned.native else self.keep(item)
            for shrink, item, planned in zip(rules, unpad(tokens), usage, strict=True)
        ]
        return pad_items(items, tokens.seconds, usage)

    def keep(self, item: Item) -> Item:
        """An item that its budget leaves whole, in a batch where others shrink."""
        return item

    def keep_all(self, tokens: TokenBatch) -> TokenBatch:
        """A batch that its budget leaves whole."""
        return tokens


def check_finite(tokens: TokenBatch) -> None:
    """Raises a ValueError that names the items whose real tokens are NaN or infinite."""
    broken = (~tokens.embeddings.isfinite().all(-1) & tokens.mask).any(1).nonzero().flatten().tolist()
    if broken:
        raise ValueError(f"real tokens of items {broken} are NaN or infinite; mask them or correct the encoder")


def unpad(tokens: TokenBatch) -> list[Item]:
    """The items of a batch, without padding."""
    columns = (tokens.embeddings, tokens.positions, tokens.codes, tokens.sizes)
    rows = ((None if values is None else values[i][real] for values in columns) for i, real in enumerate(tokens.mask))
    items = [Item(*row) for row in rows]  # type: ignore[arg-type]
    if tokens.sources is None:
        return items
    return [item._replace(sources=sources) for item, sources in zip(items, tokens.sources, strict=True)]


def pad_items(items: Sequence[Item], seconds: tuple[float, ...] | None, usage: tuple[TokenUsage, ...]) -> TokenBatch:
    """Items of one width as a batch, left-aligned; sizes, codes and sources where any of them has some."""
    embeddings, mask = pad_rows([item.embeddings for item in items])
    coded, sized, merged = (
        any(values is not None for values in column) for column in zip(*(i[2:] for i in items), strict=True)
    )
    sources = [_by_position(i.positions) if i.sources is None else i.sources for i in items] if merged else []
    codes = [torch.full_like(i.positions, -1) if i.codes is None else i.codes for i in items]
    return TokenBatch(
        embeddings=embeddings,
        mask=mask,
        positions=pad_sequence([item.positions for item in items], batch_first=True, padding_value=-1),
        codes=pad_sequence(codes, batch_first=True, padding_value=-1) if coded else None,
        sizes=pad_sequence([item.weights() for item in items], batch_first=True) if sized else None,
        sources=pad_sequence(sources, batch_first=True, padding_value=-1) if merged else None,
        seconds=seconds,
        usage=usage,
    )


def _by_position(positions: Tensor) -> Tensor:
    """The sources of tokens (n,) that were not merged."""
    sources = positions.new_full((int(positions.max()) + 1 if len(positions) else 0,), -1)
    sources[positions] = torch.arange(len(positions), device=positions.device)
    return sources
