"""What a KARL model is made of, as plain data, and the sizes that the paper names.

Source: KARL (arXiv 2507.07995), sections 3 and 4, and the authors' configurations. The head counts are theirs, also the
odd ones (`karl_small` is 1024 wide with heads of 128 numbers).

What differs: `compat="corrected"`, the default, repairs what the published forward pass gets wrong and adds two things
that a budget needs, `latent_attention="causal"` and `halting="prefix"` (see `KarlConfig`). `compat="released"` computes
what the published code computes, for its checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

from tokenthrift.config import ConfigError, check_within
from tokenthrift.karl.calibration import Calibration

__all__ = ["BASES", "ERROR_BINS", "NAMED_SIZES", "BaseConfig", "KarlConfig", "TransformerConfig", "named"]

ERROR_BINS: Final = (
    0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.09, 0.10, 0.12, 0.14, 0.16, 0.18, 0.20, 0.24, 0.28, 0.32, 0.38,
)  # fmt: skip
"""Mean absolute errors per pixel in [0, 1] that the published model can be asked for."""


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The base tokenizer: an image to a grid of features and back. The defaults are MaskGIT's VQGAN for ImageNet."""

    kind: Literal["vqgan", "vae"] = "vqgan"
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Width of every resolution in multiples of `channels`; each but the first halves the image."""
    patch: int = 1
    """Side of the squares of pixels that are folded into channels before the first convolution and unfolded after the
    last; the published tokenizers fold none. A small one without its costly full resolution learns faster."""
    blocks: int = 2
    """Residual blocks for each resolution."""
    latent: int = 256
    """Channels of a feature."""
    groups: int = 32
    """Groups of the group normalisation."""
    codes: int = 1024
    """Entries of the VQGAN's codebook."""
    scale: float = 0.2325
    """What the VAE's latents are multiplied by, so that their standard deviation is about 1."""

    def __post_init__(self) -> None:
        for name, high in (
            ("channels", 1024),
            ("patch", 64),
            ("blocks", 8),
            ("latent", 1024),
            ("groups", 64),
            ("codes", 65_536),
        ):
            check_within(f"base.{name}", getattr(self, name), 1, high)
        check_within("base.multipliers: their number", len(self.multipliers), 1, 8)
        for multiplier in self.multipliers:
            check_within("base.multipliers", multiplier, 1, 16)
        check_within("base.scale", self.scale, 1e-4, 1e4)
        if self.channels % self.groups:
            raise ConfigError(f"base.channels {self.channels} must be a multiple of groups {self.groups}")

    @property
    def factor(self) -> int:
        """Pixels on the side of a grid cell."""
        return self.patch << (len(self.multipliers) - 1)

    @property
    def outputs(self) -> int:
        """Numbers that the latent-distillation decoder predicts for each grid cell: code logits, or the latent."""
        return self.codes if self.kind == "vqgan" else self.latent


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """One of the two transformers."""

    width: int = 1024
    layers: int = 8
    heads: int = 8

    def __post_init__(self) -> None:
        for name, high in (("width", 8192), ("layers", 64), ("heads", 64)):
            check_within(f"transformer {name}", getattr(self, name), 1, high)
        if self.width % self.heads:
            raise ConfigError(f"transformer width {self.width} must be a multiple of heads {self.heads}")


@dataclass(frozen=True, kw_only=True)
class KarlConfig:
    """A whole model."""

    base: BaseConfig = field(default_factory=BaseConfig)
    encoder: TransformerConfig = field(default_factory=TransformerConfig)
    decoder: TransformerConfig = field(default_factory=TransformerConfig)
    grid: tuple[int, int] = (16, 16)
    """Rows and columns of features that the model is trained on; other grids resize its position table."""
    max_tokens: int = 256
    """Tokens that an image has before any is dropped (*native*), whatever its grid."""
    table: int = 256
    """Rows of the token tables, at least `max_tokens`; the published ones have 512, of which half go unused."""
    token_width: int = 12
    codes: int | None = 4096
    """Entries of the token codebook; None keeps continuous tokens."""
    latent_attention: Literal["causal", "full"] = "causal"
    """Whom a token sees in the encoder: the image and the tokens before it, so that n tokens are the first n of m
    tokens and a lower cap needs no second pass; or everything, as published, where every count makes other tokens."""
    halting: Literal["prefix", "subset"] = "prefix"
    """What a token above the threshold ends: everything from the first such one on, or only itself, as published, in
    which case a list of the kept positions is part of the description."""
    threshold: float = 0.75
    """Halting probability above which a token is dropped."""
    calibration: Calibration | None = None
    """What makes `encode(..., calibrated=True)` keep its promise; of these very weights."""
    compat: Literal["corrected", "released"] = "corrected"
    released_table: int = 64
    """Rows and columns of the published position tables, of which the grid reads every fourth; only for "released"."""

    def __post_init__(self) -> None:
        check_within("released_table", self.released_table, max(self.grid), 256)
        for side in self.grid:
            check_within("grid", side, 1, 64)
        check_within("max_tokens", self.max_tokens, 1, 4096)
        check_within("table", self.table, self.max_tokens, 4096)
        check_within("token_width", self.token_width, 1, 1024)
        check_within("threshold", self.threshold, 0.0, 1.0)
        if self.codes is not None:
            check_within("codes", self.codes, 2, 1_048_576)
        if self.encoder.width <= self.base.latent:
            raise ConfigError(
                f"encoder.width {self.encoder.width} must exceed base.latent {self.base.latent}: a grid cell is the "
                f"base feature beside a patch embedding of what is left of the width"
            )
        if self.compat == "released" and (self.latent_attention, self.halting) != ("full", "subset"):
            raise ConfigError('compat "released" goes with latent_attention "full" and halting "subset"')

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the model is trained on."""
        return self.grid[0] * self.base.factor, self.grid[1] * self.base.factor


def _sizes(width: int, layers: int, heads: int) -> TransformerConfig:
    return TransformerConfig(width=width, layers=layers, heads=heads)


BASES: Final = MappingProxyType(
    {
        "vqgan": BaseConfig(),
        "vae": BaseConfig(kind="vae", latent=16),
        "vqgan_small": BaseConfig(channels=32, multipliers=(1, 2, 2, 4), blocks=1, latent=32, groups=8, codes=512),
        "vae_small": BaseConfig(
            kind="vae", channels=32, multipliers=(1, 2, 2, 4), blocks=1, latent=16, groups=8, scale=1.0
        ),
    }
)
"""Base tokenizers: the two published ones (256 px to 16 x 16), and small ones (64 px to 8 x 8, 32 px to 4 x 4)."""

NAMED_SIZES: Final = MappingProxyType(
    {
        "karl_tiny": (_sizes(512, 8, 8), _sizes(512, 8, 8)),
        "karl_small": (_sizes(1024, 8, 8), _sizes(1024, 8, 8)),
        "karl_base": (_sizes(768, 12, 12), _sizes(768, 12, 12)),
        "karl_small_decoder_semilarge": (_sizes(1024, 8, 8), _sizes(1024, 16, 16)),
        "karl_semilarge": (_sizes(1024, 16, 16), _sizes(1024, 16, 16)),
    }
)
"""The paper's sizes: latent-distillation encoder and decoder. All released checkpoints are `karl_small`."""


def named(
    size: str, base: str = "vqgan", *, quantised: bool = True, compat: Literal["corrected", "released"] = "corrected"
) -> KarlConfig:
    """The configuration of a named size on a published base tokenizer, for 256 px.

    Args:
        size: one of `NAMED_SIZES`.
        base: one of `BASES`.
        quantised: 4096 cosine codes, or continuous tokens.
        compat: "released" also has the published 512-row tables.

    Raises:
        ConfigError: a name is not known.
    """
    for name, known in ((size, NAMED_SIZES), (base, BASES)):
        if name not in known:
            raise ConfigError(f"{name!r} is none of {', '.join(known)}")
    encoder, decoder = NAMED_SIZES[size]
    released = compat == "released"
    return KarlConfig(
        base=BASES[base],
        encoder=encoder,
        decoder=decoder,
        table=512 if released else 256,
        codes=4096 if quantised else None,
        latent_attention="full" if released else "causal",
        halting="subset" if released else "prefix",
        compat=compat,
    )
