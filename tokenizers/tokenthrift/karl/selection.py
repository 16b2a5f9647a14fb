"""What each image of a batch may have, and what it was given: the plain data between a budget and a batch of tokens.

KARL (arXiv 2507.07995) has one budget and one image at a time; here every image of a batch has limits of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from tokenthrift.budget import TokenBudget, TokenUsage
from tokenthrift.karl.config import ERROR_BINS
from tokenthrift.padding import pad_rows
from tokenthrift.tokens import TokenBatch

__all__ = ["EncodedImage", "Limits", "batch_of"]


class Limits(NamedTuple):
    """What each image may have, `(B,)` each."""

    caps: Tensor
    """Most tokens, int64."""
    errors: Tensor
    """Error that the encoder is conditioned on."""
    floors: Tensor
    """Tokens that are kept whatever the halting head says, int64; all of them where there is no target error."""

    @classmethod
    def of(cls, budgets: Sequence[TokenBudget], caps: Sequence[int], device: torch.device) -> Self:
        """The limits under some budgets, whose caps are known."""
        targets = [budget.target_error for budget in budgets]
        errors = [ERROR_BINS[0] if target is None else target for target in targets]
        floors = [
            cap if target is None else min(budget.min_tokens, cap)
            for budget, target, cap in zip(budgets, targets, caps, strict=True)
        ]
        return cls(*(torch.tensor(values, device=device) for values in (list(caps), errors, floors)))

    def rows(self, index: slice | Tensor) -> Self:
        """Those of some of the images."""
        return type(self)(*(part[index] for part in self))

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return type(self)(*(part.to(device) for part in self))


class EncodedImage(NamedTuple):
    """The kept tokens of one image."""

    values: Tensor
    """`(N, token_dim)`, as the decoder reads them."""
    positions: Tensor
    """`(N,)` int64, among the native tokens."""
    codes: Tensor | None
    """`(N,)` int64; None for continuous tokens."""
    close: bool = False
    """Whether rounding may have decided a code or a halting."""


def batch_of(images: Sequence[EncodedImage], usage: Sequence[TokenUsage]) -> TokenBatch:
    """A batch of images that were encoded, padded on the right."""
    values, mask = pad_rows([image.values for image in images])
    codes = [image.codes for image in images if image.codes is not None]
    return TokenBatch(
        embeddings=values,
        mask=mask,
        positions=pad_rows([image.positions for image in images], value=-1)[0],
        codes=pad_rows(codes, value=-1)[0] if codes else None,
        usage=tuple(usage),
    )
