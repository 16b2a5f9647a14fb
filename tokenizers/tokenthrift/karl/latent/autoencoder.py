"""Latent distillation: a grid of features to a sequence of latents, and tokens back to a grid.

Source: KARL (arXiv 2507.07995), section 3. The encoder reads the target error, the grid cells and learned queries; what
comes out at the queries are the latents. The decoder reads learned cells and the tokens, each with its position; what
comes out at the cells are the features.

What differs, unless `compat="released"`: position tables have the size of the trained grid and are interpolated for
others, where the published 64 x 64 ones are read at every fourth row and column; the error is added to every query; and
masks, see `transformer`. Halted tokens are never computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenthrift.karl.config import KarlConfig
from tokenthrift.karl.latent.conditioning import ErrorBins, ErrorEmbedding
from tokenthrift.karl.latent.transformer import Transformer, causal_latents

__all__ = ["LatentDecoder", "LatentEncoder", "position_table", "resized"]


class LatentEncoder(nn.Module):
    """Grid features and pixels to latents."""

    def __init__(self, config: KarlConfig) -> None:
        super().__init__()
        self.config = config
        size, factor = config.encoder.hidden_size, config.base.factor
        self.patches = nn.Conv2d(3, size - config.base.latent_channels, factor, stride=factor)
        self.positions = nn.Parameter(position_table(config, size))
        self.queries = nn.Parameter(torch.randn(config.max_position_embeddings, size) * math.pow(size, -0.5))
        self.error = ErrorBins(size) if config.compat == "released" else ErrorEmbedding(size)
        self.transformer = Transformer(config.encoder)

    def forward(self, images: Tensor, rows: Tensor, mask: Tensor, errors: Tensor) -> Tensor:
        """Latents.

        Args:
            images: `(B, 3, H, W)`.
            rows: base features `(B, h * w, latent_channels)`.
            mask: `(B, T)` bool, right-padded.
            errors: `(B,)`.

        Returns:
            `(B, T, hidden_size)`; anything in padding.
        """
        patches = self.patches(images)
        grid = patches.shape[2:]
        cells = torch.cat([patches.flatten(2).transpose(1, 2), rows], 2)
        cells = cells + resized(self.positions, grid, self.config).flatten(1).T
        error = self.error(errors)[:, None]
        queries = self.queries[: mask.shape[1]].expand(len(images), -1, -1)
        if self.config.compat == "corrected":
            queries = queries + error
        x = torch.cat([error, cells, queries], 1)
        first = x.shape[1] - mask.shape[1]
        seen: Tensor | None = None
        if self.config.latent_attention == "causal":
            seen = causal_latents(first, mask.shape[1], mask.device)
        elif not bool(mask.all()):
            seen = F.pad(mask, (first, 0), value=True)[:, None, None]
        latents: Tensor = self.transformer(x, seen)[:, first:]
        return latents


class LatentDecoder(nn.Module):
    """Tokens to what the base tokenizer needs for each grid cell."""

    def __init__(self, config: KarlConfig) -> None:
        super().__init__()
        self.config = config
        size, scale = config.decoder.hidden_size, math.pow(config.encoder.hidden_size, -0.5)
        self.embed = nn.Linear(config.token_dim, size)
        self.places = nn.Parameter(torch.randn(config.max_position_embeddings, size) * scale)
        self.cell = nn.Parameter(torch.randn(1, 1, size) * scale)
        self.positions = nn.Parameter(position_table(config, size))
        self.transformer = Transformer(config.decoder)
        self.norm_out = nn.LayerNorm(size)
        self.head = nn.Sequential(nn.Linear(size, 2 * size), nn.Tanh(), nn.Linear(2 * size, config.base.outputs))

    def forward(self, values: Tensor, positions: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
        """Computes the tokens that are there and no others.

        Args:
            values: `(B, N, token_dim)`; finite in padding too.
            positions: `(B, N)` int64, of each token; anything in padding.
            mask: `(B, N)` bool.
            grid: rows and columns.

        Returns:
            `(B, h * w, outputs)`.
        """
        tokens = self.embed(values) + self.places[positions.clamp(min=0)]
        cells = (self.cell + resized(self.positions, grid, self.config).flatten(1).T).expand(len(values), -1, -1)
        count = cells.shape[1]
        seen = None if bool(mask.all()) else F.pad(mask, (count, 0), value=True)[:, None, None]
        x = self.transformer(torch.cat([cells, tokens], 1), seen)[:, :count]
        out: Tensor = self.head(self.norm_out(x))
        return out


def position_table(config: KarlConfig, hidden_size: int) -> Tensor:
    """Random `(hidden_size, rows, columns)`."""
    sides = (config.released_table,) * 2 if config.compat == "released" else config.grid
    return torch.randn(hidden_size, *sides) * math.pow(config.encoder.hidden_size, -0.5)


def resized(table: Tensor, grid: Sequence[int], config: KarlConfig) -> Tensor:
    """A position table `(hidden_size, rows, columns)` for any grid; as it is for its own."""
    if tuple(table.shape[1:]) == tuple(grid):
        return table
    if config.compat == "released":
        return F.interpolate(table[None], size=tuple(grid), mode="nearest")[0]
    return F.interpolate(table[None], size=tuple(grid), mode="bicubic", align_corners=False)[0]
