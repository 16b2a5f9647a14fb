"""The target error, which conditions the encoder.

Source: KARL (arXiv 2507.07995), section 3: one token in front of the sequence says which reconstruction error to aim
for. Errors are mean absolute differences per pixel in [0, 1].

What differs: the published code rounds the error up to one of 19 bins, each a learned row that starts as one number
repeated; the layer normalization after it maps every such row to zero, so that at first the error has no effect at all.
`ErrorBins` is that. `ErrorEmbedding` takes any error: sines and cosines of its logarithm through a small perceptron,
which differ from the first step on. The encoder also adds it to every token's query.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from tokenthrift.karl.config import ERROR_BINS

__all__ = ["ErrorBins", "ErrorEmbedding", "bin_of", "pixel_error"]

FREQUENCIES = 16


def pixel_error(made: Tensor, images: Tensor) -> Tensor:
    """Mean absolute difference of each image, `(B,)`, of images `(B, 3, H, W)`."""
    return (made - images).abs().flatten(1).mean(1)


def bin_of(errors: Tensor) -> Tensor:
    """Index `(B,)` of the smallest of the published bins that is at least the error; the last one above all."""
    bins = torch.tensor(ERROR_BINS, device=errors.device)
    return torch.searchsorted(bins, errors.to(bins.dtype).contiguous()).clamp(max=len(ERROR_BINS) - 1)


class ErrorBins(nn.Module):
    """The published embedding: a row for each bin, all of one number at first."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(ERROR_BINS)[:, None].repeat(1, hidden_size))

    def forward(self, errors: Tensor) -> Tensor:
        """Errors `(B,)` to `(B, hidden_size)`."""
        return self.table[bin_of(errors)]


class ErrorEmbedding(nn.Module):
    """A smooth embedding of any error; below the smallest and above the largest bin it is that of the bin."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, errors: Tensor) -> Tensor:
        """Errors `(B,)` to `(B, hidden_size)`, computed at least in float32."""
        dtype = next(self.parameters()).dtype
        errors = errors.to(torch.promote_types(dtype, torch.float32))
        low, high = math.log(ERROR_BINS[0]), math.log(ERROR_BINS[-1])
        position = (errors.clamp(ERROR_BINS[0], ERROR_BINS[-1]).log() - low) / (high - low)
        # Half a turn at the lowest frequency keeps the ends apart; at the highest, neighboring bins are.
        turns = math.pi * torch.arange(1, FREQUENCIES + 1, device=errors.device)
        angles = position[:, None] * turns
        waves = torch.cat([angles.sin(), angles.cos()], 1)
        return cast(Tensor, self.mlp(waves.to(dtype)))
