"""What a dLLM-ASR model is made of and how it decodes, as plain data.

Source: dLLM-ASR (arXiv 2601.17902). The paper's sizes (Whisper-large-v3, LLaDA-8B) are reached with other numbers here;
its threshold of 0.9 is the default. Draft settings are ours: the paper does not say how large the CTC branch is nor how
its draft meets the mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tokenthrift.config import ConfigError, check_within

__all__ = [
    "AdapterConfig",
    "BackboneConfig",
    "DecodeConfig",
    "DllmAsrConfig",
    "DraftConfig",
    "DraftUse",
    "EncoderConfig",
]


DraftUse = Literal["confident", "length", "both", "none"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The frozen Whisper encoder; the defaults are those of tiny.en."""

    width: int = 384
    layers: int = 4
    heads: int = 6
    ffn: int = 1536
    bins: int = 80
    tail: float = 0.0
    """Seconds of silence that it hears after a recording: trained on 30 s always, it reads what ends at once badly. The
    states of the silence are not kept."""

    def __post_init__(self) -> None:
        for name, high in (("width", 4096), ("layers", 64), ("heads", 64), ("ffn", 16_384), ("bins", 128)):
            check_within(f"encoder.{name}", getattr(self, name), 1, high)
        check_within("encoder.tail", self.tail, 0.0, 30.0)
        if self.width % self.heads or self.width % 2:
            raise ConfigError(f"encoder.width {self.width} must be even and a multiple of heads {self.heads}")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """From encoder states (50 a second) to the memory of the language model."""

    pool: int = 2
    """Average pooling of encoder states; 2 gives 25 a second, as in the paper."""
    stride: int = 2
    """Stride of the convolution after it; 2 gives 12.5 a second, 1 leaves the convolution and the projection out."""

    def __post_init__(self) -> None:
        check_within("adapter.pool", self.pool, 1, 8)
        check_within("adapter.stride", self.stride, 1, 8)


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """The CTC head over characters, on the same encoder."""

    width: int = 256
    layers: int = 3
    heads: int = 4
    ffn: int = 1024

    def __post_init__(self) -> None:
        for name, high in (("width", 4096), ("layers", 32), ("heads", 64), ("ffn", 16_384)):
            check_within(f"draft.{name}", getattr(self, name), 1, high)
        if self.width % self.heads:
            raise ConfigError(f"draft.width {self.width} must be a multiple of heads {self.heads}")


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The masked-diffusion language model."""

    family: Literal["whisper", "bert", "modernbert", "llama"] = "whisper"
    """"whisper" cross-attends to the memory; the others read it as a prefix."""
    width: int = 384
    layers: int = 4
    heads: int = 6
    ffn: int = 1536
    positions: int = 256
    """Longest input: start tokens and response, and for prefix models the memory too."""

    def __post_init__(self) -> None:
        for name, high in (("width", 8192), ("layers", 128), ("heads", 128), ("ffn", 65_536)):
            check_within(f"backbone.{name}", getattr(self, name), 1, high)
        check_within("backbone.positions", self.positions, 16, 16_384)
        if self.width % self.heads:
            raise ConfigError(f"backbone.width {self.width} must be a multiple of heads {self.heads}")


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How the model decodes unless the call says otherwise."""

    confidence_threshold: float = 0.9
    """Probability from which a token is committed in a round."""
    max_rounds: int | None = None
    """Most rounds; the last one commits what is still open."""
    draft: DraftUse = "confident"
    """What the CTC draft gives: its sure words and the length, the length, or nothing (length from the duration).
    "both" denoises the first two side by side, in the same rounds, and keeps the one the CTC head likes better."""
    draft_threshold: float = 0.9
    """CTC posterior below which a word of the draft is left to the language model."""
    slack: float = 0.3
    """Spare slots in an unsure span, as a share of its draft tokens, on top of one; what is not needed is deleted."""
    margin: int = 2
    """Spare slots at the end."""
    verify: float = 0.05
    """Draft tokens that the language model gives less than this in round 1 are opened again; 0 trusts the draft."""
    recheck: bool = False
    """Doubt committed tokens too, after every round; a text then ends with a round that changes nothing, or at the most
    rounds. Needs `verify`, below which a token is doubted."""
    prune: Literal["every", "first", "never"] = "every"
    """When a committed end of text shortens the response: after every round, after the first as published, or never."""
    tokens_per_second: float = 5.0
    """Slots for each second of audio where the draft gives no length."""

    def __post_init__(self) -> None:
        check_within("decode.confidence_threshold", self.confidence_threshold, 1e-6, 1.0)
        if self.max_rounds is not None:
            check_within("decode.max_rounds", self.max_rounds, 1, 1024)
        check_within("decode.draft_threshold", self.draft_threshold, 0.0, 1.0)
        check_within("decode.slack", self.slack, 0.0, 4.0)
        check_within("decode.margin", self.margin, 0, 64)
        check_within("decode.verify", self.verify, 0.0, 1.0)
        if self.recheck and not self.verify:
            raise ConfigError("decode.recheck needs decode.verify above 0: nothing is doubted at 0")
        check_within("decode.tokens_per_second", self.tokens_per_second, 0.1, 50.0)


@dataclass(frozen=True, kw_only=True)
class DllmAsrConfig:
    """A whole model."""

    vocab_size: int
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)

    def __post_init__(self) -> None:
        check_within("vocab_size", self.vocab_size, 8, 300_000)
        if self.adapter.stride == 1 and self.encoder.width != self.backbone.width:
            raise ConfigError(
                f"without a convolution (adapter.stride 1) the backbone reads encoder states as they are: "
                f"backbone.width {self.backbone.width} must equal encoder.width {self.encoder.width}"
            )
