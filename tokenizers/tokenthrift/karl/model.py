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
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tokenthrift.budget import BudgetLike, BudgetSupport, TokenBudget, TokenUsage
from tokenthrift.hub import HubModel
from tokenthrift.karl.base.autoencoder_kl import AutoencoderKL
from tokenthrift.karl.bits import BitFormat, read_codes, write_codes
from tokenthrift.karl.calibration import requested
from tokenthrift.karl.config import ERROR_BINS, KarlConfig
from tokenthrift.karl.verified import repair
from tokenthrift.karl.halting import HaltingHead, kept
from tokenthrift.karl.inputs import check_images, check_tokens, grid_of, per_image
from tokenthrift.karl.latent.autoencoder import LatentDecoder, LatentEncoder
from tokenthrift.karl.latent.packing import groups, pack
from tokenthrift.karl.quantizer import CosineQuantizer, Quantized
from tokenthrift.karl.base.vqgan import Vqgan
from tokenthrift.tokens import TokenBatch

__all__ = ["EncodedLatents", "Karl"]

PIXELS_AT_ONCE = 2**19  # that go through the model together: 8 images of 256 x 256, 128 of 64 x 64
# A decision closer than this may fall otherwise in another batch: sums in float32 differ there by some 1e-6.
CLOSE_COSINE, CLOSE_LOGIT = 2e-5, 1e-4


class EncodedLatents(NamedTuple):
    """What the encoder makes of images, T the largest count of the batch, padded on the right."""

    latents: Tensor
    """`(B, T, width)`."""
    halting_logits: Tensor
    """`(B, T)`, of the probability that a token is not needed."""
    tokens: Tensor
    """`(B, T, token_dim)`, before quantization."""
    mask: Tensor
    """`(B, T)` bool."""


class Karl(HubModel):
    """Adaptive image tokenizer.

    The base tokenizer is frozen when the model is made; training its last stage unfreezes it.

    Args:
        config: sizes and behavior.
    """

    system: ClassVar[str] = "karl"
    config_class: ClassVar[type] = KarlConfig
    config: KarlConfig

    def __init__(self, config: KarlConfig) -> None:
        super().__init__(config)
        released = config.compat == "released"
        self.encoder = LatentEncoder(config)
        self.halting = HaltingHead(config.encoder.hidden_size)
        self.norm_tokens = nn.LayerNorm(config.encoder.hidden_size)
        self.to_tokens = nn.Linear(config.encoder.hidden_size, config.token_dim)
        self.quantizer = CosineQuantizer(config.codebook_size, config.token_dim) if config.codebook_size else None
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
        """The budgets that this model honors."""
        config = self.config
        return BudgetSupport(
            fields=frozenset({"max_tokens", "retention", "target_error"}),
            max_tokens=config.max_tokens,
            nested=config.latent_attention == "causal" and config.halting == "prefix",
            adaptive=True,
        )

    def plan(self, native: Sequence[int], budget: BudgetLike | Sequence[BudgetLike] | None = None) -> tuple[int, ...]:
        """The most tokens that each image will keep; exactly so many where no `target_error` is set.

        Args:
            native: what each image has before any is dropped: `config.max_tokens`, whatever its size.
            budget: for all of them or for each.

        Raises:
            BudgetError: a ceiling is not honored, or leaves less than the floor.
        """
        budgets = per_image(budget, len(native))
        return tuple(self.support.caps([n], one)[0] for n, one in zip(native, budgets, strict=True))

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        budget: BudgetLike | Sequence[BudgetLike] | None = None,
        generator: torch.Generator | None = None,
        *,
        verify: bool = False,
        calibrated: bool = False,
    ) -> TokenBatch:
        """Tokens of images, at most as many as their budgets allow.

        Without `target_error` an image has as many as its budget allows. In float32, codes and counts are exactly those
        of the image alone: where one was decided by less than rounding, the image is computed once more by itself.

        Args:
            images: `(B, 3, H, W)` floating-point in [0, 1], sides multiples of `config.base.factor`.
            budget: for all images or for each; no ceiling if not given.
            generator: draws the VAE's latents, as the published code does; their mean is taken if not given.
            verify: decode, measure, and encode anew what missed its `target_error`, in at most six decoder passes; see
                `guarantee.verdict` for what can be said of each image then.
            calibrated: ask for as much less error as makes a miss as rare as `config.calibration` promises.

        Returns:
            Embeddings are what the decoder reads (`token_dim` numbers), right-padded; positions are places among the
            native tokens; codes where the model has them.

        Raises:
            BudgetError: a budget cannot be honored.
            TypeError, ValueError: images that cannot be encoded; nothing is computed then.
        """
        check_images(images, self.config)
        budgets = per_image(budget, len(images))
        caps = self.plan([self.config.max_tokens] * len(images), budgets)
        asked = requested(self.config.calibration, budgets, caps) if calibrated else budgets
        weight = self.to_tokens.weight
        images = images.to(weight).contiguous()
        at_once = max(1, PIXELS_AT_ONCE // math.prod(images.shape[2:]))
        items: list[tuple[Tensor, Tensor, Tensor | None]] = []
        for i in range(0, len(images), at_once):
            part = slice(i, i + at_once)
            items += self._encode(images[part], asked[part], caps[part], generator)
        values = pad_sequence([item[0] for item in items], batch_first=True)
        positions = pad_sequence([item[1] for item in items], batch_first=True, padding_value=-1)
        codes = [item[2] for item in items if item[2] is not None]
        tokens = TokenBatch(
            embeddings=values,
            mask=positions >= 0,
            positions=positions,
            codes=pad_sequence(codes, batch_first=True, padding_value=-1) if codes else None,
            usage=tuple(
                TokenUsage(native=self.config.max_tokens, cap=cap, used=len(item[1]))
                for cap, item in zip(caps, items, strict=True)
            ),
        )
        return repair(self, images, tokens, budgets) if verify else tokens

    def _encode(
        self,
        images: Tensor,
        budgets: Sequence[TokenBudget],
        caps: Sequence[int],
        generator: torch.Generator | None,
    ) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        device = images.device
        targets = [budget.target_error for budget in budgets]
        errors = torch.tensor([ERROR_BINS[0] if target is None else target for target in targets], device=device)
        found = self.encode_latents(images, self.base.encode(images, generator), torch.tensor(caps, device=device), errors)
        least = [c if t is None else min(b.min_tokens, c) for b, t, c in zip(budgets, targets, caps, strict=True)]
        keep = kept(
            found.halting_logits,
            found.mask,
            threshold=self.config.halting_threshold,
            prefix=self.config.halting == "prefix",
            least=torch.tensor(least, device=device),
        )
        values, codes, _ = self.quantize(found.tokens, keep)
        items = []
        for i, (stays, close) in enumerate(zip(keep, self._close_calls(found, keep, targets), strict=True)):
            if close and len(images) > 1 and generator is None:
                one = slice(i, i + 1)
                items += self._encode(images[one], budgets[one], caps[one], None)
            else:
                code = None if codes is None else codes[i, stays]
                items.append((values[i, stays], stays.nonzero().flatten(), code))
        return items

    def _close_calls(self, found: EncodedLatents, keep: Tensor, targets: Sequence[float | None]) -> list[bool]:
        """Which images have a code or a halting that rounding may decide; none in half precision, where all have."""
        if found.tokens.dtype in (torch.float16, torch.bfloat16):
            return [False] * len(keep)
        close = torch.zeros(len(keep), dtype=torch.bool, device=keep.device)
        if self.quantizer is not None:
            close = self.quantizer.margin(found.tokens, keep) < CLOSE_COSINE
        distance = (found.halting_logits - torch.logit(found.halting_logits.new_tensor(self.config.halting_threshold))).abs()
        halting = ((distance < CLOSE_LOGIT) & found.mask).any(1)
        adaptive = torch.tensor([target is not None for target in targets], device=keep.device)
        marks: list[bool] = (close | (halting & adaptive)).tolist()
        return marks

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
        values, found, mask = pack(tokens.embeddings.to(self.to_tokens.weight), tokens.mask)
        positions = tokens.positions.gather(1, found.clamp(min=0))
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
            positions: where each stands; the first ones if not given, which is how `halting="prefix"` keeps them.

        Raises:
            ValueError: the model has continuous tokens, a code is not in its codebook, or lengths differ.
        """
        if self.quantizer is None or self.config.codebook_size is None:
            raise ValueError("this model has continuous tokens and no codes")
        places = positions or [range(len(row)) for row in codes]
        if [len(row) for row in places] != [len(row) for row in codes]:
            raise ValueError("there must be one position for each code")
        bad = [code for row in codes for code in row if not 0 <= code < self.config.codebook_size]
        if bad:
            raise ValueError(f"codes must be from 0 to {self.config.codebook_size - 1}, found {bad[0]}")
        device = self.to_tokens.weight.device
        ids, where = (
            pad_sequence(
                [torch.tensor(list(row), dtype=torch.long, device=device) for row in rows],
                batch_first=True,
                padding_value=-1,
            )
            for rows in (codes, places)
        )
        native = self.config.max_tokens
        return TokenBatch(
            embeddings=self.quantizer.lookup(ids),
            mask=ids >= 0,
            positions=where,
            codes=ids,
            usage=tuple(TokenUsage(native=native, cap=len(row), used=len(row)) for row in codes),
        )

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
            errors: `(B,)` mean absolute error to aim for.
        """
        width = int(counts.max())
        mask = torch.arange(width, device=images.device) < counts[:, None].to(images.device)
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

    def expand(self, values: Tensor, keep: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """The decoder's pass over the tokens that stay; the others are taken out, not masked.

        Args:
            values: `(B, T, token_dim)`, token i at position i; what is not kept is not read.
            keep: `(B, T)` bool.
            grid: rows and columns of the image's features; the trained ones if not given.

        Returns:
            `(B, h * w, base.outputs)`: code logits or latents for each grid cell.
        """
        packed = pack(values, keep)
        return self.decode_packed(packed.values, packed.positions, packed.mask, grid)

    def decode_packed(
        self, values: Tensor, positions: Tensor, mask: Tensor, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """As `expand`, for tokens that say where they stood.

        Args:
            values: `(B, N, token_dim)`; zero in padding.
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

    def to_features(self, output: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Features `(B, C, h, w)` for `base.decode`, of a decoder's output `(B, h * w, base.outputs)`."""
        return self.base.to_features(output, grid or self.config.grid)
