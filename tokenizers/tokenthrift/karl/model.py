"""KARL: an image as a few tokens, as many as its content needs for a wanted error, in one pass.

Source: KARL (arXiv 2507.07995), sections 3 and 4. A base tokenizer makes a grid of features of the image; the encoder
distils them into a sequence of tokens, told which reconstruction error to aim for, and says for each token whether it
is needed; the decoder makes the features of the tokens that stay, and the base tokenizer the image of the features.

What differs from the published code, unless `compat="released"`: masks belong to their image at any batch size; the
error takes any value and acts from the first step; grids need not be square and position tables fit them; dropped
tokens are not computed; tokens see only those before them, so that n of them are the first n of m. Always: batches of
different counts, tokens and codes as a result, images from tokens or codes, hard caps besides the wanted error, and
inputs that are checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenthrift.budget import BudgetSupport
from tokenthrift.hub import HubModel
from tokenthrift.karl.autoencoder_kl import AutoencoderKL
from tokenthrift.karl.conditioning import ErrorBins, ErrorEmbedding
from tokenthrift.karl.config import KarlConfig
from tokenthrift.karl.halting import HaltingHead
from tokenthrift.karl.packing import groups, pack
from tokenthrift.karl.quantiser import CosineQuantiser, Quantised
from tokenthrift.karl.transformer import Transformer, causal_latents
from tokenthrift.karl.vqgan import Vqgan

__all__ = ["Distilled", "Karl"]


class Distilled(NamedTuple):
    """What the encoder makes of images, T the largest count of the batch, padded on the right."""

    latents: Tensor
    """`(B, T, width)`."""
    halting_logits: Tensor
    """`(B, T)`, of the probability that a token is not needed."""
    tokens: Tensor
    """`(B, T, token_width)`, before quantisation."""
    mask: Tensor
    """`(B, T)` bool."""


class LatentEncoder(nn.Module):
    """Grid features and pixels to latents."""

    def __init__(self, config: KarlConfig) -> None:
        super().__init__()
        self.config = config
        width, factor = config.encoder.width, config.base.factor
        self.patches = nn.Conv2d(3, width - config.base.latent, factor, stride=factor)
        self.positions = nn.Parameter(position_table(config, width))
        self.queries = nn.Parameter(torch.randn(config.table, width) * math.pow(width, -0.5))
        self.error = ErrorBins(width) if config.compat == "released" else ErrorEmbedding(width)
        self.transformer = Transformer(config.encoder)

    def forward(self, images: Tensor, rows: Tensor, mask: Tensor, errors: Tensor) -> Tensor:
        """Latents.

        Args:
            images: `(B, 3, H, W)`.
            rows: base features `(B, h * w, latent)`.
            mask: `(B, T)` bool, right-padded.
            errors: `(B,)`.

        Returns:
            `(B, T, width)`; anything in padding.
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
        width, table_scale = config.decoder.width, math.pow(config.encoder.width, -0.5)
        self.embed = nn.Linear(config.token_width, width)
        self.places = nn.Parameter(torch.randn(config.table, width) * table_scale)
        self.cell = nn.Parameter(torch.randn(1, 1, width) * table_scale)
        self.positions = nn.Parameter(position_table(config, width))
        self.transformer = Transformer(config.decoder)
        self.norm_out = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, config.base.outputs))

    def forward(self, values: Tensor, positions: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
        """Computes the tokens that are there and no others.

        Args:
            values: `(B, N, token_width)`; finite in padding too.
            positions: `(B, N)` int64, where each token stood; anything in padding.
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


class Karl(HubModel):
    """Adaptive image tokenizer.

    The base tokenizer is frozen when the model is made; training its last stage unfreezes it.

    Args:
        config: sizes and behaviour.
    """

    system: ClassVar[str] = "karl"
    config_class: ClassVar[type] = KarlConfig
    config: KarlConfig

    def __init__(self, config: KarlConfig) -> None:
        super().__init__(config)
        released = config.compat == "released"
        self.encoder = LatentEncoder(config)
        self.halting = HaltingHead(config.encoder.width)
        self.norm_tokens = nn.LayerNorm(config.encoder.width)
        self.to_tokens = nn.Linear(config.encoder.width, config.token_width)
        self.quantiser = CosineQuantiser(config.codes, config.token_width) if config.codes else None
        self.decoder = LatentDecoder(config)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        base = Vqgan if config.base.kind == "vqgan" else AutoencoderKL
        self.base: Vqgan | AutoencoderKL = base(config.base, released=released).requires_grad_(False)

    @property
    def support(self) -> BudgetSupport:
        """The budgets that this model honours."""
        config = self.config
        return BudgetSupport(
            fields=frozenset({"max_tokens", "retention", "target_error"}),
            max_tokens=config.max_tokens,
            nested=config.latent_attention == "causal" and config.halting == "prefix",
            adaptive=True,
        )

    def distil(self, images: Tensor, features: Tensor, counts: Tensor, errors: Tensor) -> Distilled:
        """The encoder's pass.

        Args:
            images: `(B, 3, H, W)` in [0, 1].
            features: `base.encode` of them, `(B, C, h, w)`.
            counts: `(B,)` int64, tokens for each image, from 1 to `config.table`.
            errors: `(B,)` mean absolute error to aim for.
        """
        width = int(counts.max())
        mask = torch.arange(width, device=images.device) < counts[:, None].to(images.device)
        latents = self.encoder(images, self.base.rows(features), mask, errors)
        return Distilled(latents, self.halting(latents), self.to_tokens(self.norm_tokens(latents)), mask)

    def quantise(self, tokens: Tensor, mask: Tensor) -> Quantised:
        """Tokens as the decoder reads them; continuous ones as they are.

        Args:
            tokens: `(B, T, token_width)`.
            mask: `(B, T)` bool.
        """
        if self.quantiser is not None:
            quantised: Quantised = self.quantiser(tokens, mask)
            return quantised
        return Quantised(torch.where(mask[..., None], tokens, 0), None, tokens.new_zeros(()))

    def expand(self, values: Tensor, keep: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """The decoder's pass over the tokens that stay; the others are taken out, not masked.

        Args:
            values: `(B, T, token_width)`, token i at position i; what is not kept is not read.
            keep: `(B, T)` bool.
            grid: rows and columns of the image's features; the trained ones if not given.

        Returns:
            `(B, h * w, base.outputs)`: code logits or latents for each grid cell.
        """
        packed = pack(values, keep)
        return self.expand_packed(packed.values, packed.positions, packed.mask, grid)

    def expand_packed(
        self, values: Tensor, positions: Tensor, mask: Tensor, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """As `expand`, for tokens that say where they stood.

        Args:
            values: `(B, N, token_width)`; zero in padding.
            positions: `(B, N)` int64.
            mask: `(B, N)` bool, right-padded.
            grid: rows and columns.
        """
        grid = grid or self.config.grid
        counts = mask.sum(1).tolist()
        parts = groups(counts, math.prod(grid))
        if len(parts) == 1:
            out: Tensor = self.decoder(values, positions, mask, grid)
            return out
        done = []
        for rows in parts:
            width = counts[rows[0]]
            done.append(self.decoder(values[rows, :width], positions[rows, :width], mask[rows, :width], grid))
        order = torch.tensor([row for rows in parts for row in rows], device=values.device).argsort()
        return torch.cat(done)[order]

    def features_of(self, output: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Features `(B, C, h, w)` for `base.decode`, of a decoder's output `(B, h * w, base.outputs)`."""
        return self.base.features_of(output, grid or self.config.grid)


def position_table(config: KarlConfig, width: int) -> Tensor:
    """Random `(width, rows, columns)`."""
    sides = (config.released_table,) * 2 if config.compat == "released" else config.grid
    return torch.randn(width, *sides) * math.pow(config.encoder.width, -0.5)


def resized(table: Tensor, grid: Sequence[int], config: KarlConfig) -> Tensor:
    """A position table `(width, rows, columns)` for any grid; as it is for its own."""
    if tuple(table.shape[1:]) == tuple(grid):
        return table
    if config.compat == "released":
        return F.interpolate(table[None], size=tuple(grid), mode="nearest")[0]
    return F.interpolate(table[None], size=tuple(grid), mode="bicubic", align_corners=False)[0]
