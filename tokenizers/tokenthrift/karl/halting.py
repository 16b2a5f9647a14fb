"""Which tokens stay.

Source: KARL (arXiv 2507.07995), section 3: a head on every token gives the probability omega that it is not needed; a
token with omega above 0.75 is halted. The paper's halted set is any subset, so that a faithful description needs the
list of kept positions besides the tokens themselves.

What differs: with `prefix`, the first halted token ends the image, which is what the head is trained to say (its labels
are a kept prefix and a halted suffix); then a count describes the set, and n tokens are the first n of m.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

__all__ = ["HaltingHead", "kept"]

HIDDEN = 512


class HaltingHead(nn.Module):
    """Logits of omega for every token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))

    def forward(self, latents: Tensor) -> Tensor:
        """`(B, T, width)` to `(B, T)`."""
        return cast(Tensor, self.mlp(self.norm(latents))).squeeze(-1)


def kept(logits: Tensor, mask: Tensor, *, threshold: float, prefix: bool, least: Tensor | int = 1) -> Tensor:
    """The tokens that stay.

    Args:
        logits: `(B, T)` of omega.
        mask: `(B, T)` bool, True where there is a token.
        threshold: a token is halted where omega is above it; 1 halts none.
        prefix: whether the first halted token ends the image.
        least: tokens that stay in any case, `(B,)` or one number: the first ones, or without `prefix` those of the
            smallest omega.

    Returns:
        `(B, T)` bool.
    """
    halted = logits.sigmoid() > threshold
    stays = mask & ~halted
    if prefix:
        stays = stays.long().cumprod(1).bool()
    if not isinstance(least, Tensor):
        least = torch.full((len(mask),), least, device=mask.device)
    if prefix:
        rank = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    else:
        rank = logits.masked_fill(~mask, float("inf")).argsort(dim=1, stable=True).argsort(1)
    return stays | (mask & (rank < least[:, None]))
