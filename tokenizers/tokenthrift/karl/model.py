"""KARL: an image as a few tokens, as many as its content needs for a target error, in one pass.

Source: KARL (arXiv 2507.07995), sections 3 and 4. A base tokenizer makes a grid of features of the image. The encoder
makes a sequence of tokens of the features, is conditioned on a reconstruction error, and says for each token whether it
is needed. The decoder makes features of the tokens that are kept, and the base tokenizer makes the image of them.

What differs from the published code, unless `compat="released"`: masks belong to their image at any batch size; the
error takes any value and acts from the first step; grids need not be square and position tables fit them; dropped
tokens are not computed; tokens see only those before them, so that n of them are the first n of m. Always: batches of
different counts, tokens and codes as a result, images from tokens or codes, hard caps besides the target error, and
inputs that are checked.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tokenthrift.auto.processing import image_files
from tokenthrift.budget import (
    BudgetLike,
    BudgetSupport,
    ItemSize,
    NativeCost,
    SizeLike,
    TokenUsage,
    budgets_for,
    sizes_of,
)
from tokenthrift.hub import HubModel
from tokenthrift.karl.base.autoencoder_kl import AutoencoderKL
from tokenthrift.karl.base.vqgan import Vqgan
from tokenthrift.karl.bits import BitFormat, read_codes, write_codes
from tokenthrift.karl.calibration import requested
from tokenthrift.karl.config import KarlConfig, upgraded
from tokenthrift.karl.halting import HaltingHead, halting_margin, kept
from tokenthrift.karl.inputs import check_images, check_tokens, grid_of
from tokenthrift.karl.latent.autoencoder import LatentDecoder, LatentEncoder
from tokenthrift.karl.latent.packing import groups
from tokenthrift.karl.quantizer import CosineQuantizer, Quantized
from tokenthrift.karl.selection import EncodedImage, Limits, batch_of
from tokenthrift.padding import length_mask, pack
from tokenthrift.tokens import TokenBatch

__all__ = ["EncodedLatents", "Karl"]

PIXELS_AT_ONCE = 2**19  # that go through the model together: 8 images of 256 x 256, 128 of 64 x 64
# A decision that is closer than this may be another one in another batch. Measured differences between an image of a
# batch and the image alone, and between float32 and float64: at most 2e-6 of a cosine and 4e-6 of a logit.
CLOSE_COSINE, CLOSE_LOGIT = 8e-6, 2e-5


class EncodedLatents(NamedTuple):
    """What the encoder makes of images, T the largest count of the batch, padded on the right."""

    latents: Tensor
    """`(B, T, hidden_size)`."""
    halting_logits: Tensor
    """`(B, T)`, of the probability that a token is not needed."""
    tokens: Tensor
    """`(B, T, token_dim)`, before quantization."""
    mask: Tensor
    """`(B, T)` bool."""


class Karl(HubModel):
    """Adaptive image tokenizer, in evaluation mode until `train()` is called.

    The base tokenizer is frozen when the model is made; the last stage of training unfreezes it.

    Args:
        config: sizes and behavior.
    """

    system: ClassVar[str] = "karl"
    config_class: ClassVar[type] = KarlConfig
    config: KarlConfig

    def __init__(self, config: KarlConfig) -> None:
        super().__init__(config)
        released, size = config.compat == "released", config.encoder.hidden_size
        self.encoder = LatentEncoder(config)
        self.halting = HaltingHead(size)
        self.norm_tokens = nn.LayerNorm(size)
        self.to_tokens = nn.Linear(size, config.token_dim)
        # The spelling of the weight files, which stays; see `quantizer`.
        self.quantiser = CosineQuantizer(config.codebook_size, config.token_dim) if config.codebook_size else None
        self.decoder = LatentDecoder(config)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        base = Vqgan if config.base.kind == "vqgan" else AutoencoderKL
        self.base: Vqgan | AutoencoderKL = base(config.base, released=released).requires_grad_(False)
        self.eval()

    @classmethod
    def upgrade_config(cls, fields: dict[str, Any], version: int) -> dict[str, Any]:
        """The fields of format_version 1 under the names of today."""
        return upgraded(fields)

    def processor_files(self) -> dict[str, dict[str, Any]]:
        """For `AutoImageProcessor` of transformers."""
        return image_files(*self.config.size)

    @property
    def quantizer(self) -> CosineQuantizer | None:
        """The token codebook; None where tokens are continuous."""
        return self.quantiser

    @property
    def support(self) -> BudgetSupport:
        """The budgets that this model honors."""
        return BudgetSupport(
            fields=frozenset({"max_tokens", "retention", "target_error"}),
            max_tokens=self.config.max_tokens,
            nested=self.config.nested,
            adaptive=True,
        )

    @property
    def native_cost(self) -> NativeCost:
        """Native tokens of an image, whatever its size."""
        return NativeCost(per_image=self.config.max_tokens)

    def plan(
        self, items: Sequence[SizeLike], budget: BudgetLike | Sequence[BudgetLike] = None
    ) -> tuple[TokenUsage, ...]:
        """The most tokens that each image will keep; exactly so many where no `target_error` is set.

        Args:
            items: the images; nothing needs to be known of them, and `ItemSize()` is an image.
            budget: for all of them, or a list with one for each.

        Raises:
            BudgetError: a ceiling is not honored, or leaves less than the floor.
        """
        native = self.config.max_tokens
        images = [replace(size, native=native) if size.native is None else size for size in sizes_of(items)]
        return self.support.plan(images, budget)

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        budget: BudgetLike | Sequence[BudgetLike] = None,
        generator: torch.Generator | None = None,
        *,
        calibrated: bool = False,
        features: Tensor | None = None,
    ) -> TokenBatch:
        """Tokens of images, at most as many as their budgets allow; `verified.encode_verified` also checks the error.

        Without `target_error` an image has as many as its budget allows. In float32, codes and counts are exactly those
        of the image alone: where one is decided by less than rounding, it is decided once more in float64.

        Args:
            images: `(B, 3, H, W)` floating-point in [0, 1], sides multiples of `config.base.factor`.
            budget: for all images, or a list with one for each; no ceiling if not given.
            generator: draws the VAE's latents, as the published code does; their mean is taken if not given.
            calibrated: condition the encoder on a smaller error, so that misses are as rare as in `config.calibration`.
            features: `base_features` of the images; computed if not given.

        Returns:
            Embeddings are what the decoder reads (`token_dim` numbers), right-padded; positions are those among the
            native tokens; codes where the model has them.

        Raises:
            BudgetError: a budget cannot be honored.
            TypeError, ValueError: images that cannot be encoded; nothing is computed then.
        """
        check_images(images, self.config)
        plan, budgets = self.plan([ItemSize()] * len(images), budget), budgets_for(budget, len(images))
        caps = [usage.cap for usage in plan]
        if calibrated:
            budgets = requested(self.config.calibration, budgets, caps)
        images = images.to(self.to_tokens.weight).contiguous()
        limits = Limits.of(budgets, caps, images.device)
        found: list[EncodedImage] = []
        for part in self._parts(images):
            given = self.base.encode(images[part], generator) if features is None else features[part]
            found += self._choose(images[part], given, limits.rows(part))
        close = [i for i, one in enumerate(found) if one.close]
        # Latents that were drawn belong to their batch, so that no image alone would have them.
        if close and generator is None and features is None:
            exact = self._decide_in_double(images[close], limits.rows(torch.tensor(close, device=images.device)))
            for i, one in zip(close, exact, strict=True):
                found[i] = one
        return batch_of(found, [replace(u, used=len(one.positions)) for u, one in zip(plan, found, strict=True)])

    def base_features(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Features `(B, C, h, w)` of the base tokenizer, for `encode(..., features=...)`; arguments as there."""
        check_images(images, self.config)
        images = images.to(self.to_tokens.weight).contiguous()
        with torch.no_grad():
            return torch.cat([self.base.encode(images[part], generator) for part in self._parts(images)])

    def _parts(self, images: Tensor) -> Iterator[slice]:
        """Slices of a batch that go through the model together."""
        at_once = max(1, PIXELS_AT_ONCE // math.prod(images.shape[2:]))
        return (slice(i, i + at_once) for i in range(0, len(images), at_once))

    def _choose(self, images: Tensor, features: Tensor, limits: Limits) -> list[EncodedImage]:
        """Encodes, halts and quantizes images that go through the model together."""
        config = self.config
        found = self.encode_latents(images, features, limits.caps, limits.errors)
        rule: dict[str, Any] = {"threshold": config.halting_threshold, "prefix": config.halting == "prefix"}
        keep = kept(found.halting_logits, found.mask, least=limits.floors, **rule)
        values, codes, _ = self.quantize(found.tokens, keep)
        close = torch.zeros(len(keep), dtype=torch.bool, device=keep.device)
        if images.dtype == torch.float32:  # in half precision all decisions are close, in double precision none is
            margin = halting_margin(found.halting_logits, found.mask, least=limits.floors, **rule)
            close = margin < CLOSE_LOGIT
            if self.quantizer is not None:
                close |= self.quantizer.margin(found.tokens, keep) < CLOSE_COSINE
        return [
            EncodedImage(values[i, row], row.nonzero().flatten(), None if codes is None else codes[i, row], mark)
            for i, (row, mark) in enumerate(zip(keep, close.tolist(), strict=True))
        ]

    def _decide_in_double(self, images: Tensor, limits: Limits) -> Iterator[EncodedImage]:
        """As `_choose`, in float64, where rounding decides nothing; the values are in the model's precision."""
        # Decoders take no part, so they are not copied; some devices have no float64, and the CPU always has.
        unused = {id(part): nn.Identity() for part in (self.decoder, self.base.decoder)}
        device = torch.device("cpu") if images.device.type == "mps" else images.device
        exact = copy.deepcopy(self, unused).to(device, torch.float64)
        for part in self._parts(images):
            pixels = images[part].to(device, torch.float64)
            for one in exact._choose(pixels, exact.base.encode(pixels), limits.rows(part).to(device)):
                codes = None if one.codes is None else one.codes.to(images.device)
                values = one.values.to(images)
                if codes is not None and self.quantizer is not None:
                    values = self.quantizer.lookup(codes)  # bit for bit what the other images have
                yield EncodedImage(values, one.positions.to(images.device), codes)

    @torch.no_grad()
    def decode(self, tokens: TokenBatch, size: tuple[int, int] | None = None) -> Tensor:
        """Images of tokens.

        Args:
            tokens: as `encode` or `from_codes` make them; only embeddings, positions and mask are read.
            size: height and width in pixels; those of `config.size` if not given.

        Returns:
            `(B, 3, H, W)` in [0, 1].

        Raises:
            ValueError: tokens of another model, or a size that the model has no grid for.
        """
        check_tokens(tokens, self.config)
        grid = grid_of(size or self.config.size, self.config)
        values, mask = pack(tokens.embeddings.to(self.to_tokens.weight), tokens.mask)
        positions, _ = pack(tokens.positions, tokens.mask)
        at_once = max(1, PIXELS_AT_ONCE // (math.prod(grid) * self.config.base.factor**2))
        images = []
        for i in range(0, len(mask), at_once):
            part = slice(i, i + at_once)
            output = self.decode_packed(values[part], positions[part], mask[part], grid)
            images.append(self.base.decode(self.to_features(output, grid)).clamp(0, 1))
        return torch.cat(images)

    @torch.no_grad()
    def from_codes(
        self, codes: Sequence[Sequence[int]], positions: Sequence[Sequence[int]] | None = None
    ) -> TokenBatch:
        """The tokens of stored codes, for `decode`.

        Args:
            codes: of each image.
            positions: of each code; the first ones if not given, which is how `halting="prefix"` keeps them.

        Raises:
            ValueError: the model has continuous tokens, a code is not in its codebook, or lengths differ.
        """
        if self.quantizer is None or self.config.codebook_size is None:
            raise ValueError("this model has continuous tokens and no codes")
        where = positions or [range(len(row)) for row in codes]
        if [len(row) for row in where] != [len(row) for row in codes]:
            raise ValueError("there must be one position for each code")
        bad = [code for row in codes for code in row if not 0 <= code < self.config.codebook_size]
        if bad:
            raise ValueError(f"codes must be from 0 to {self.config.codebook_size - 1}, found {bad[0]}")
        device = self.to_tokens.weight.device
        ids, columns = (
            [torch.tensor(list(row), dtype=torch.long, device=device) for row in rows] for rows in (codes, where)
        )
        native = self.config.max_tokens
        usage = [TokenUsage(native=native, cap=len(row), used=len(row)) for row in codes]
        found = [EncodedImage(self.quantizer.lookup(row), at, row) for row, at in zip(ids, columns, strict=True)]
        return batch_of(found, usage)

    def to_bytes(self, tokens: TokenBatch, size: tuple[int, int] | None = None) -> bytes:
        """The tokens as a byte string of `bits.BitFormat.string_bits` bits, for `from_bytes` of the same kind of model.

        Args:
            tokens: as `encode` or `from_codes` make them; only codes and positions are read.
            size: height and width in pixels of the images, which are kept; those of `config.size` if not given.

        Raises:
            BudgetError: the model has continuous tokens.
            ValueError: an image without tokens, or a size that the model has no grid for.
        """
        layout, grid = BitFormat.of(self.config), grid_of(size or self.config.size, self.config)
        if tokens.codes is None:
            raise ValueError("tokens without codes cannot be written; encode them with a model that has a codebook")
        return write_codes(tokens.codes, tokens.positions, layout, None if grid == self.config.grid else grid)

    def from_bytes(self, data: bytes) -> tuple[TokenBatch, tuple[int, int]]:
        """The tokens of a byte string, and height and width in pixels: `decode(*from_bytes(data))` gives the images.

        Raises:
            BitStringError: the string is damaged, cut short, or of another kind of model.
            BudgetError: the model has continuous tokens.
        """
        codes, positions, grid = read_codes(data, BitFormat.of(self.config))
        rows, columns = grid or self.config.grid
        return self.from_codes(codes, positions), (rows * self.config.base.factor, columns * self.config.base.factor)

    def encode_latents(self, images: Tensor, features: Tensor, counts: Tensor, errors: Tensor) -> EncodedLatents:
        """The encoder's pass.

        Args:
            images: `(B, 3, H, W)` in [0, 1].
            features: `base.encode` of them, `(B, C, h, w)`.
            counts: `(B,)` int64, tokens for each image, from 1 to `config.max_position_embeddings`.
            errors: `(B,)` mean absolute error to condition on.
        """
        mask = length_mask(counts.to(images.device))
        latents = self.encoder(images, self.base.rows(features), mask, errors)
        return EncodedLatents(latents, self.halting(latents), self.to_tokens(self.norm_tokens(latents)), mask)

    def quantize(self, tokens: Tensor, mask: Tensor) -> Quantized:
        """Tokens as the decoder reads them; continuous ones as they are.

        Args:
            tokens: `(B, T, token_dim)`.
            mask: `(B, T)` bool.
        """
        if self.quantizer is not None:
            quantized: Quantized = self.quantizer(tokens, mask)
            return quantized
        return Quantized(torch.where(mask[..., None], tokens, 0), None, tokens.new_zeros(()))

    def decode_latents(self, values: Tensor, keep: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """The decoder's pass over the tokens that are kept; the others are taken out, not masked.

        Args:
            values: `(B, T, token_dim)`, token i at position i; what is not kept is not read.
            keep: `(B, T)` bool.
            grid: rows and columns of the image's features; the trained ones if not given.

        Returns:
            `(B, h * w, base.outputs)`: code logits or latents for each grid cell.
        """
        packed, mask = pack(values, keep)
        positions, _ = pack(torch.arange(keep.shape[1], device=keep.device).expand_as(keep), keep)
        return self.decode_packed(packed, positions, mask, grid)

    def decode_packed(
        self, values: Tensor, positions: Tensor, mask: Tensor, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """As `decode_latents`, for tokens with positions of their own.

        Args:
            values: `(B, N, token_dim)`; padding is not read.
            positions: `(B, N)` int64.
            mask: `(B, N)` bool, right-padded.
            grid: rows and columns.
        """
        grid = grid or self.config.grid
        values = torch.where(mask[..., None], values, 0)
        counts = mask.sum(1).tolist()
        parts = groups(counts, math.prod(grid))
        if len(parts) == 1:
            out: Tensor = self.decoder(values, positions, mask, grid)
            return out
        done = []
        for rows in parts:
            most = counts[rows[0]]
            done.append(self.decoder(values[rows, :most], positions[rows, :most], mask[rows, :most], grid))
        order = torch.tensor([row for rows in parts for row in rows], device=values.device).argsort()
        return torch.cat(done)[order]

    def to_features(self, output: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Features `(B, C, h, w)` for `base.decode`, of a decoder's output `(B, h * w, base.outputs)`."""
        return self.base.to_features(output, grid or self.config.grid)
