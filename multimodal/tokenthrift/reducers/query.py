"""Reducers that read the question: which tokens matter depends on what is asked. No attention maps are needed.

`ConditionalDiversity` is CDPruner (arXiv 2506.10967, section 3): a determinantal point process over the similarity of
the tokens, weighed by their relevance to the question, so that relevant tokens are kept and near-copies are not.
`QuerySelection` is the idea of SparseVLM (arXiv 2410.04417, section 3): only the words of the question that have to do
with what is seen ("raters") rate the tokens, and the best rated are kept.

A question comes as embeddings of the width of the tokens: `reduce(tokens, budget, query=[(Q, D), ...])`, one tensor for
each item, None for an item without one. `attach` gives the text embeddings of the item's row to every reducer with
`reads_query`. Without a question `ConditionalDiversity` is plain diversity, and `QuerySelection` keeps the tokens most
like the mean of their item.

Differs from the published code: CDPruner compares CLIP's two towers and SparseVLM reads attention inside the language
model; here question and tokens are compared where both are input of the language model, by their cosine, so nothing of
a model is opened and any attention kernel serves. The mean of the item is taken off its tokens first, and the mean of
the question off its words: embeddings of either kind share a large common part that says nothing of relevance.
SparseVLM's recycling of dropped tokens is not done, since `BipartiteMerging` is that as a method of its own; its
pruning in several layers is one step here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from tokenthrift.budget import BudgetLike
from tokenthrift.reducers.base import Item, ItemReducer
from tokenthrift.reducers.diversity import greedy_determinant, unit_rows
from tokenthrift.tokens import TokenBatch

__all__ = ["ConditionalDiversity", "QueryReducer", "QuerySelection", "relevance"]

_LEAST = 1e-6


def relevance(embeddings: Tensor, query: Tensor) -> Tensor:
    """How relevant each token is to a question: the mean cosine with the words that rate.

    Args:
        embeddings: (N, D) tokens, N at least 1.
        query: (Q, D) words of the question, Q at least 1.

    Returns:
        (N,) in at least float32, between -1 and 1. Words rate whose best cosine with a token is at least the mean of
        all words'.
    """
    words = query.detach().to(embeddings)
    if len(words) > 1:
        words = words - words.mean(0)
    alike = unit_rows(words) @ unit_rows(embeddings - embeddings.mean(0)).T
    best = alike.amax(1)
    # Rounding must not leave a question of equal words without any rater.
    raters = best >= best.mean() - _LEAST
    return alike[raters].mean(0)


class QueryReducer(ItemReducer):
    """An `ItemReducer` whose `reduce` also takes the question."""

    reads_query: ClassVar[bool] = True
    """Tells `attach` to give the text of the row as `query`."""

    def reduce(
        self,
        tokens: TokenBatch,
        budget: BudgetLike | Sequence[BudgetLike],
        query: Sequence[Tensor | None] | None = None,
    ) -> TokenBatch:
        """See `TokenReducer.reduce`.

        Args:
            tokens: Native tokens, padded on either side.
            budget: Ceilings for each item.
            query: (Q_i, D) embeddings of the question of every item, without padding; None where there is none.

        Raises:
            BudgetError: The budget cannot be honored.
            ValueError: A real token or a question is not finite, or a question is of another width.
        """
        questions = [None] * len(tokens.mask) if query is None else list(query)
        if len(questions) != len(tokens.mask):
            raise ValueError(f"{len(tokens.mask)} items but {len(questions)} questions; None stands for no question")
        for i, question in enumerate(questions):
            if question is None:
                continue
            if question.ndim != 2 or question.shape[1] != tokens.embeddings.shape[2]:
                raise ValueError(
                    f"question {i} is {tuple(question.shape)}; it needs the width of the tokens, "
                    f"(Q, {tokens.embeddings.shape[2]})"
                )
            if not bool(question.isfinite().all()):
                raise ValueError(f"question {i} is NaN or infinite")
        rules = [partial(self.shrink, query=q if q is not None and len(q) else None) for q in questions]
        return self.reduce_each(tokens, budget, rules)

    def shrink(self, item: Item, cap: int, query: Tensor | None = None) -> Item:
        """See `ItemReducer.shrink`; the question is (Q, D), or None."""
        if cap == 0:
            return item.select(item.positions[:0])
        return item.select(self.choose(item.embeddings, cap, query).sort().values)

    @abstractmethod
    def choose(self, embeddings: Tensor, cap: int, query: Tensor | None) -> Tensor:
        """Which `cap` of (N, D) tokens stay: (cap,) int64 in any order."""


class ConditionalDiversity(QueryReducer):
    """Keeps tokens that are relevant to the question and unlike each other (CDPruner)."""

    def choose(self, embeddings: Tensor, cap: int, query: Tensor | None) -> Tensor:
        """See `QueryReducer.choose`."""
        weights = torch.ones(len(embeddings), device=embeddings.device)
        if query is not None:
            found = relevance(embeddings, query)
            spread = found.amax() - found.amin()
            weights = (found - found.amin() + _LEAST) / (spread + _LEAST)
        return greedy_determinant(embeddings, weights, cap)


class QuerySelection(QueryReducer):
    """Keeps the tokens most similar to the words of the question that have to do with them (SparseVLM's idea)."""

    def choose(self, embeddings: Tensor, cap: int, query: Tensor | None) -> Tensor:
        """See `QueryReducer.choose`."""
        if query is None:
            unit = unit_rows(embeddings)
            scores = unit @ unit.mean(0)
        else:
            scores = relevance(embeddings, query)
        return scores.argsort(descending=True, stable=True)[:cap]
