"""VQToken's codes in front of a language model: see `tokenthrift.prefixes`.

Source: VQToken (arXiv 2503.16980), whose codes enter a LLaVA-OneVision; here they enter any language model. The encoder
is that of a `VideoAnswerer`; a VQToken without one reduces what another model encodes, by `attach`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenthrift.budget import BudgetLike, BudgetSupport, SizeLike, TokenUsage
from tokenthrift.tokens import TokenBatch
from tokenthrift.vqtoken.synthetic.answerer import VideoAnswerer

__all__ = ["VideoPrefix"]


class VideoPrefix:
    """Clips as the codes of a VideoAnswerer; a `Prefix`.

    Args:
        model: its encoder and its VQToken are used.
    """

    kind = "video"

    def __init__(self, model: VideoAnswerer) -> None:
        self.model = model

    @property
    def token_size(self) -> int:
        """Width of a token."""
        return self.model.config.token_dim

    @property
    def support(self) -> BudgetSupport:
        """That of VQToken."""
        return self.model.support

    def plan(
        self, items: Sequence[SizeLike], budget: BudgetLike | Sequence[BudgetLike] = None
    ) -> tuple[TokenUsage, ...]:
        """See `VideoAnswerer.plan`."""
        return self.model.plan(items, budget)

    @torch.no_grad()
    def encode(self, items: Sequence[Tensor]) -> TokenBatch:
        """Native tokens of clips; each is (num_frames, 3, size, size), uint8 or in [0, 1]."""
        return self.model.encode(torch.stack(list(items)))

    @torch.no_grad()
    def reduce(self, tokens: TokenBatch, budget: BudgetLike | Sequence[BudgetLike]) -> TokenBatch:
        """See `TokenReducer.reduce`."""
        return self.model.vqtoken.reduce(tokens, budget)
