"""KARL in front of a language model: see `tokenthrift.prefixes`.

Source: KARL (arXiv 2507.07995); its authors never put tokens into a language model. A picture is encoded once at its
most tokens, and since tokens are nested, every budget is a cut of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tokenthrift.budget import BudgetLike, BudgetSupport, SizeLike, TokenUsage
from tokenthrift.karl.model import Karl
from tokenthrift.tokens import TokenBatch

__all__ = ["KarlPrefix"]


class KarlPrefix:
    """Pictures as KARL's tokens; a `Prefix`.

    Args:
        karl: a model with nested tokens.

    Raises:
        ValueError: its tokens are not nested, so that a cut of them is not what it makes of a smaller budget.
    """

    kind = "image"

    def __init__(self, karl: Karl) -> None:
        if not karl.support.nested:
            raise ValueError('a prefix of KARL needs nested tokens: latent_attention="causal" and halting="prefix"')
        self.karl = karl

    @property
    def token_size(self) -> int:
        """Width of a token."""
        return self.karl.config.token_dim

    @property
    def support(self) -> BudgetSupport:
        """Counts only: an error to reach is KARL's own `encode(images, "e0.05")`."""
        return replace(self.karl.support, fields=frozenset({"max_tokens", "retention"}), adaptive=False)

    def plan(
        self, items: Sequence[SizeLike], budget: BudgetLike | Sequence[BudgetLike] = None
    ) -> tuple[TokenUsage, ...]:
        """See `TokenPlanner.plan`."""
        return self.support.plan([usage.native for usage in self.karl.plan(items)], budget)

    def encode(self, items: Sequence[Tensor]) -> TokenBatch:
        """All tokens of pictures.

        Args:
            items: (3, H, W) each, in [0, 1], of the model's size.
        """
        return self.karl.encode(torch.stack(list(items)))

    def reduce(self, tokens: TokenBatch, budget: BudgetLike | Sequence[BudgetLike]) -> TokenBatch:
        """See `TokenReducer.reduce`: the first tokens."""
        usage = self.plan(tokens.item_sizes(), budget)
        if all(each.used == each.native for each in usage):
            return replace(tokens, usage=usage)
        return replace(tokens.first([each.used for each in usage]), usage=usage)
