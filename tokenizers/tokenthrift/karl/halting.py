"""Which tokens are kept.

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

__all__ = ["HaltingHead", "halting_margin", "kept"]

HEAD_SIZE = 512


class HaltingHead(nn.Module):
    """Logits of omega for every token."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, HEAD_SIZE), nn.Tanh(), nn.Linear(HEAD_SIZE, 1))

    def forward(self, latents: Tensor) -> Tensor:
        """`(B, T, hidden_size)` to `(B, T)`."""
        return cast(Tensor, self.mlp(self.norm(latents))).squeeze(-1)


def kept(logits: Tensor, mask: Tensor, *, threshold: float, prefix: bool, least: Tensor | int = 1) -> Tensor:
    """The tokens that are kept.

    Args:
        logits: `(B, T)` of omega.
        mask: `(B, T)` bool, True where there is a token.
        threshold: a token is halted where omega is above it; 1 halts none.
        prefix: whether the first halted token ends the image.
        least: tokens that are kept in any case, `(B,)` or one number: the first ones, or without `prefix` those of the
            smallest omega.

    Returns:
        `(B, T)` bool.
    """
    keep = mask & ~(logits.sigmoid() > threshold)
    if prefix:
        keep = keep.long().cumprod(1).bool()
    return keep | (mask & (_ranks(logits, mask, prefix) < _column(least, mask)))


def halting_margin(logits: Tensor, mask: Tensor, *, threshold: float, prefix: bool, least: Tensor | int = 1) -> Tensor:
    """How clearly `kept` chose: how far all logits of an image may move at most for it to choose the same tokens.

    Args:
        logits: as in `kept`, and so are the others.

    Returns:
        `(B,)`, infinite where nothing is chosen.
    """
    if not mask.shape[1]:
        return logits.new_full(mask.shape[:1], torch.inf)
    ranks, floor = _ranks(logits, mask, prefix), _column(least, mask)
    edge = torch.logit(logits.new_tensor(threshold))
    distance, halted = (logits - edge).abs(), mask & (logits > edge)
    if not prefix:
        margin = distance.masked_fill(~(mask & (ranks >= floor)), torch.inf).amin(1)
        # The last token of the floor and the one behind it may meet halfway, which matters where that one is halted.
        last, following = (logits.masked_fill(~(mask & (ranks == at)), 0).sum(1) for at in (floor - 1, floor))
        meet = (floor[:, 0] > 0) & (halted & (ranks == floor)).any(1)
        return torch.where(meet, torch.minimum(margin, (following - last) / 2), margin)
    early = halted & (ranks <= floor)
    # The image ends with its floor until every token that is halted so early is not, and without any, it ends at the
    # first halted token: that one and all before it decide.
    decisive = mask & (ranks <= (mask & ~halted).long().cumprod(1).sum(1, keepdim=True))
    margin = distance.masked_fill(~decisive, torch.inf).amin(1)
    margin = torch.where(early.any(1), distance.masked_fill(~early, 0).amax(1), margin)
    return margin.masked_fill(floor[:, 0] >= mask.sum(1), torch.inf)


def _ranks(logits: Tensor, mask: Tensor, prefix: bool) -> Tensor:
    """`(B, T)`: how many tokens come before each when some have to be kept."""
    if prefix:
        return torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    return logits.masked_fill(~mask, torch.inf).argsort(dim=1, stable=True).argsort(1)


def _column(least: Tensor | int, mask: Tensor) -> Tensor:
    return least[:, None] if isinstance(least, Tensor) else torch.full((len(mask), 1), least, device=mask.device)
