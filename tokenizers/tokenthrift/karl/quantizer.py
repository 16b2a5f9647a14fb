"""The token codebook: cosine vector quantization with a remedy for dead codes.

Source: KARL (arXiv 2507.07995), section 3: 4096 codes of 12 numbers; token and code are normalized to length 1, the
nearest code is the one of the largest cosine, and the gradient goes straight through.

What differs: the published code never restarts a code that nobody uses. Here the quantizer counts, in training, how
often each code is chosen (a decaying mean that is saved and resumed with the model), and `restart` moves the dead ones
onto tokens of the current batch. Padding is neither quantized nor counted. Processes that train together count the
codes of all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from tokenthrift.training.processes import rank_and_world

__all__ = ["CosineQuantizer", "Quantized"]

COMMITMENT = 0.25
DECAY = 0.99  # of the mean use of a code, for each batch
COSINES_AT_ONCE = 2**24  # in memory


class Quantized(NamedTuple):
    """Tokens as the decoder reads them."""

    values: Tensor
    """`(B, T, token_dim)`; zero in padding."""
    codes: Tensor | None
    """`(B, T)` int64, -1 in padding; None for continuous tokens."""
    loss: Tensor
    """Scalar; 0 for continuous tokens."""


class CosineQuantizer(nn.Module):
    """A codebook on the unit sphere.

    Args:
        codebook_size: entries.
        token_dim: numbers of a token.
    """

    usage: Tensor

    def __init__(self, codebook_size: int, token_dim: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.empty(codebook_size, token_dim).uniform_(-1, 1) / codebook_size)
        self.register_buffer("usage", torch.ones(codebook_size))

    def forward(self, tokens: Tensor, mask: Tensor) -> Quantized:
        """Quantizes tokens, at least in float32 whatever the surrounding precision.

        Args:
            tokens: `(B, T, token_dim)`; what padding holds is not read.
            mask: `(B, T)` bool, True where a token is real.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            unit, book = self._directions(tokens[mask])
            chosen = nearest(unit.detach(), book.detach())
            found = F.embedding(chosen, book)
            if len(chosen):
                loss = F.mse_loss(found, unit.detach()) + COMMITMENT * F.mse_loss(unit, found.detach())
            else:
                loss = unit.sum() + 0 * book.sum()
            if self.training:
                self._count(chosen)
            # The value is the code itself, bit for bit, so that decoding codes gives the image that tokens gave.
            straight = found.detach() + (unit - unit.detach())
            values = straight.new_zeros(tokens.shape).masked_scatter(mask[..., None], straight)
        codes = torch.full(mask.shape, -1, device=mask.device).masked_scatter(mask, chosen)
        return Quantized(values.to(tokens.dtype), codes, loss)

    def lookup(self, codes: Tensor) -> Tensor:
        """The values of codes `(...)` int64, `(..., token_dim)`; zero for -1."""
        values = F.normalize(self.codebook.float(), dim=-1).to(self.codebook.dtype)[codes.clamp(min=0)]
        return values.masked_fill((codes < 0)[..., None], 0)

    @torch.no_grad()
    def margin(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """How clearly the codes of each image won: the least difference of the two largest cosines, `(B,)`.

        Args:
            tokens: `(B, T, token_dim)`.
            mask: `(B, T)` bool; what lies outside is not looked at.
        """
        unit, book = self._directions(tokens[mask])
        best = torch.cat([(part @ book.T).topk(2).values for part in _parts(unit, book)])
        gaps = unit.new_full(mask.shape, torch.inf).masked_scatter(mask, best[:, 0] - best[:, 1])
        return gaps.amin(1) if mask.shape[1] else gaps.new_full(mask.shape[:1], torch.inf)

    def _directions(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and codes of length 1."""
        precision = torch.promote_types(tokens.dtype, torch.float32)
        return F.normalize(tokens.to(precision), dim=-1), F.normalize(self.codebook.to(precision), dim=-1)

    @torch.no_grad()
    def _count(self, chosen: Tensor) -> None:
        counts = torch.bincount(chosen, minlength=len(self.usage)).to(self.usage.dtype)
        if rank_and_world()[1] > 1:
            distributed.all_reduce(counts)
        share = counts * (len(self.usage) / counts.sum().clamp(min=1))
        self.usage.lerp_(share, 1 - DECAY)

    @torch.no_grad()
    def restart(
        self, tokens: Tensor, mask: Tensor, threshold: float = 0.01, generator: torch.Generator | None = None
    ) -> int:
        """Moves dead codes onto tokens that are in use now.

        Args:
            tokens: `(B, T, token_dim)` of the current batch, before quantization.
            mask: `(B, T)` bool, True where a token is real.
            threshold: a code is dead where its mean use is below this share of the average code's.
            generator: picks the tokens; on the CPU.

        Returns:
            How many codes moved.
        """
        dead = (self.usage < threshold).nonzero().flatten()
        found = tokens[mask]
        picks = torch.randperm(len(found), generator=generator)[: len(dead)].to(found.device)
        dead = dead[: len(picks)]
        self.codebook[dead] = F.normalize(found[picks].float(), dim=-1).to(self.codebook.dtype)
        self.usage[dead] = 1.0
        return len(dead)


def nearest(unit: Tensor, book: Tensor) -> Tensor:
    """Index of the largest cosine: `(N, D)` and `(K, D)`, both of length 1, to `(N,)` int64."""
    return torch.cat([(part @ book.T).argmax(-1) for part in _parts(unit, book)])


def _parts(unit: Tensor, book: Tensor) -> tuple[Tensor, ...]:
    """Tokens whose cosines with a codebook of 65,536 entries still fit into memory."""
    parts: tuple[Tensor, ...] = unit.split(max(1, COSINES_AT_ONCE // len(book)))
    return parts
