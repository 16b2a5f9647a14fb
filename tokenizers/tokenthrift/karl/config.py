"""What a KARL model is made of, as plain data, and the sizes that the paper names.

Source: KARL (arXiv 2507.07995), sections 3 and 4, and the authors' configurations. The numbers of heads are theirs,
also the odd ones (`karl_small` has 1024 channels and heads of 128).

What differs: `compat="corrected"`, the default, repairs what the published forward pass gets wrong and adds two things
that a budget needs, `latent_attention="causal"` and `halting="prefix"` (see `KarlConfig`). `compat="released"` computes
what the published code computes, for its checkpoints, and is the only field that has to be set for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal

from tokenthrift.config import ConfigError, check_within
from tokenthrift.karl.calibration import Calibration

__all__ = ["BASES", "ERROR_BINS", "NAMED_SIZES", "BaseConfig", "KarlConfig", "TransformerConfig", "named", "upgraded"]

ERROR_BINS: Final = (
    0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.09, 0.10, 0.12, 0.14, 0.16, 0.18, 0.20, 0.24, 0.28, 0.32, 0.38,
)  # fmt: skip
"""Mean absolute errors per pixel in [0, 1] that the published model can be conditioned on."""

PUBLISHED_POSITIONS: Final = 512
"""Rows of the published token tables, of which half are never used."""


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The base tokenizer: an image to a grid of features and back. The defaults are MaskGIT's VQGAN for ImageNet."""

    kind: Literal["vqgan", "vae"] = "vqgan"
    """The VQGAN of MaskGIT, or the KL autoencoder of latent diffusion."""
    channels: int = 128
    """Channels at the finest resolution."""
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channels of each resolution as multiples of `channels`; each resolution but the first halves the image."""
    patch_size: int = 1
    """Side of the squares of pixels that are folded into channels before the first convolution and unfolded after the
    last; the published tokenizers fold none. A small tokenizer without the costly full resolution learns faster."""
    num_res_blocks: int = 2
    """Residual blocks for each resolution."""
    latent_channels: int = 256
    """Channels of a feature."""
    norm_num_groups: int = 32
    """Groups of the group normalization."""
    codebook_size: int = 1024
    """Entries of the VQGAN's codebook."""
    scaling_factor: float = 0.2325
    """What the VAE's latents are multiplied by, so that their standard deviation is about 1."""

    def __post_init__(self) -> None:
        for name, high in (
            ("channels", 1024),
            ("patch_size", 64),
            ("num_res_blocks", 8),
            ("latent_channels", 1024),
            ("norm_num_groups", 64),
            ("codebook_size", 65_536),
        ):
            check_within(f"base.{name}", getattr(self, name), 1, high)
        check_within("base.channel_multipliers: their number", len(self.channel_multipliers), 1, 8)
        for multiplier in self.channel_multipliers:
            check_within("base.channel_multipliers", multiplier, 1, 16)
        check_within("base.scaling_factor", self.scaling_factor, 1e-4, 1e4)
        if self.channels % self.norm_num_groups:
            raise ConfigError(
                f"base.channels {self.channels} must be a multiple of norm_num_groups {self.norm_num_groups}"
            )

    @property
    def factor(self) -> int:
        """Pixels on the side of a grid cell."""
        return self.patch_size << (len(self.channel_multipliers) - 1)

    @property
    def outputs(self) -> int:
        """Numbers that the latent decoder predicts for each grid cell: code logits, or the latent."""
        return self.codebook_size if self.kind == "vqgan" else self.latent_channels


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """One of the two transformers."""

    hidden_size: int = 1024
    """Channels of every position."""
    num_hidden_layers: int = 8
    """Blocks."""
    num_attention_heads: int = 8
    """Heads of every block."""

    def __post_init__(self) -> None:
        for name, high in (("hidden_size", 8192), ("num_hidden_layers", 64), ("num_attention_heads", 64)):
            check_within(f"transformer {name}", getattr(self, name), 1, high)
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"transformer hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )


@dataclass(frozen=True, kw_only=True)
class KarlConfig:
    """A whole model. Fields whose default depends on `compat` are None or 0 until the object is made."""

    base: BaseConfig = field(default_factory=BaseConfig)
    """The base tokenizer."""
    encoder: TransformerConfig = field(default_factory=TransformerConfig)
    """The transformer that makes tokens of features."""
    decoder: TransformerConfig = field(default_factory=TransformerConfig)
    """The transformer that makes features of tokens."""
    grid: tuple[int, int] = (16, 16)
    """Rows and columns of features that the model is trained on; other grids resize its position table."""
    max_tokens: int = 256
    """Tokens that an image has before any is dropped (*native*), whatever its grid."""
    max_position_embeddings: int = 0
    """Rows of the token tables, at least `max_tokens`; 0 means `max_tokens`, or in "released" for 512."""
    token_dim: int = 12
    """Numbers of a token."""
    codebook_size: int | None = 4096
    """Entries of the token codebook; None keeps continuous tokens."""
    latent_attention: Literal["causal", "full"] | None = None
    """What a token sees in the encoder. "causal": the image and the tokens before it, so that n tokens are the first n
    of m tokens and a lower cap needs no second pass. "full": everything, as published, so that every number of tokens
    gives other tokens. Causal unless `compat` is "released"."""
    halting: Literal["prefix", "subset"] | None = None
    """What the first halted token ends. "prefix": the image. "subset": only itself, as published; then the positions of
    the kept tokens are part of the description. Prefix unless `compat` is "released"."""
    halting_threshold: float = 0.75
    """Halting probability above which a token is dropped."""
    calibration: Calibration | None = None
    """Errors that the model was measured to stay within; `encode(..., calibrated=True)` needs it."""
    compat: Literal["corrected", "released"] = "corrected"
    """Whether the model computes correctly or as the published code does."""
    released_table: int = 64
    """Rows and columns of the published position tables, of which the grid reads every fourth; only for "released"."""

    def __post_init__(self) -> None:
        released = self.compat == "released"
        for name, value in (
            (
                "max_position_embeddings",
                self.max_position_embeddings or (PUBLISHED_POSITIONS if released else self.max_tokens),
            ),
            ("latent_attention", self.latent_attention or ("full" if released else "causal")),
            ("halting", self.halting or ("subset" if released else "prefix")),
        ):
            object.__setattr__(self, name, value)
        check_within("released_table", self.released_table, max(self.grid), 256)
        for side in self.grid:
            check_within("grid", side, 1, 64)
        check_within("max_tokens", self.max_tokens, 1, 4096)
        check_within("max_position_embeddings", self.max_position_embeddings, self.max_tokens, 4096)
        check_within("token_dim", self.token_dim, 1, 1024)
        check_within("halting_threshold", self.halting_threshold, 0.0, 1.0)
        if self.codebook_size is not None:
            check_within("codebook_size", self.codebook_size, 2, 1_048_576)
        if self.encoder.hidden_size <= self.base.latent_channels:
            raise ConfigError(
                f"encoder.hidden_size {self.encoder.hidden_size} must exceed base.latent_channels "
                f"{self.base.latent_channels}: a grid cell is the base feature beside a patch embedding of what is left"
            )
        if released and (self.latent_attention, self.halting) != ("full", "subset"):
            raise ConfigError('compat "released" goes with latent_attention "full" and halting "subset"')

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the model is trained on."""
        return self.grid[0] * self.base.factor, self.grid[1] * self.base.factor

    @property
    def nested(self) -> bool:
        """Whether n tokens of an image are the first n of m tokens."""
        return self.latent_attention == "causal" and self.halting == "prefix"


# Names of format_version 1, and those of today.
BASE_FIELDS: Final = {
    "multipliers": "channel_multipliers",
    "patch": "patch_size",
    "blocks": "num_res_blocks",
    "latent": "latent_channels",
    "groups": "norm_num_groups",
    "codes": "codebook_size",
    "scale": "scaling_factor",
}
TRANSFORMER_FIELDS: Final = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
}
FIELDS: Final = {
    "table": "max_position_embeddings",
    "token_width": "token_dim",
    "codes": "codebook_size",
    "threshold": "halting_threshold",
}


def upgraded(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration of format_version 1 under the names of today."""

    def renamed(data: Any, names: Mapping[str, str]) -> Any:
        return {names.get(name, name): value for name, value in data.items()} if isinstance(data, Mapping) else data

    found: dict[str, Any] = renamed(fields, FIELDS)
    parts = {"base": BASE_FIELDS, "encoder": TRANSFORMER_FIELDS, "decoder": TRANSFORMER_FIELDS}
    found |= {part: renamed(found[part], names) for part, names in parts.items() if part in found}
    # Version 1 had defaults of its own for what may be left out.
    return {"max_position_embeddings": 256, "latent_attention": "causal", "halting": "prefix", **found}


def _sizes(hidden_size: int, layers: int, heads: int) -> TransformerConfig:
    return TransformerConfig(hidden_size=hidden_size, num_hidden_layers=layers, num_attention_heads=heads)


_SMALL: Final[dict[str, Any]] = {
    "channels": 32,
    "channel_multipliers": (1, 2, 2, 4),
    "num_res_blocks": 1,
    "norm_num_groups": 8,
}

BASES: Final = MappingProxyType(
    {
        "vqgan": BaseConfig(),
        "vae": BaseConfig(kind="vae", latent_channels=16),
        "vqgan_small": BaseConfig(latent_channels=32, codebook_size=512, **_SMALL),
        "vae_small": BaseConfig(kind="vae", latent_channels=16, scaling_factor=1.0, **_SMALL),
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
"""The paper's sizes: latent encoder and latent decoder. All released checkpoints are `karl_small`."""


def named(
    size: str, base: str = "vqgan", *, quantized: bool = True, compat: Literal["corrected", "released"] = "corrected"
) -> KarlConfig:
    """The configuration of a named size on a published base tokenizer, for 256 px.

    Args:
        size: one of `NAMED_SIZES`.
        base: one of `BASES`.
        quantized: 4096 cosine codes, or continuous tokens.
        compat: "released" computes as published.

    Raises:
        ConfigError: a name is not known.
    """
    for name, known in ((size, NAMED_SIZES), (base, BASES)):
        if name not in known:
            raise ConfigError(f"{name!r} is none of {', '.join(known)}")
    encoder, decoder = NAMED_SIZES[size]
    codebook_size = 4096 if quantized else None
    return KarlConfig(base=BASES[base], encoder=encoder, decoder=decoder, codebook_size=codebook_size, compat=compat)
