"""What a Llama-MTSK model is made of and how it decodes, as plain data.

Source: Llama-MTSK (arXiv 2503.06362), sections 3 and 4.1; the defaults are its audio-visual setting with Whisper small,
AV-HuBERT large and Llama 3.2-1B. `compat="released"` computes what the authors' code computes, mistakes included; each
place where the two differ says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, TypeAlias

from tokenthrift.config import ConfigError, check_within
from tokenthrift.lazy import deprecated
from tokenthrift.mtsk.rates import Measured, Rates

__all__ = [
    "AudioConfig",
    "Compression",
    "DecodeConfig",
    "Decoding",
    "LanguageModelConfig",
    "LoraConfig",
    "MtskConfig",
    "Strategy",
    "Task",
    "VideoConfig",
    "scales_of",
    "upgraded",
]

_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")

Task: TypeAlias = Literal["asr", "vsr", "avsr"]
Strategy: TypeAlias = Literal["MS", "SS", "MSS"]
"""Adapters: one for all scales (MS), one per scale (SS), or both (MSS)."""
Compression: TypeAlias = Literal["average", "stack"]
"""How states become a token; see `tokenthrift.reducers.pooling.pool_by_rate`."""


def scales_of(tasks: Iterable[Task], audio_rates: Sequence[int], video_rates: Sequence[int]) -> tuple[Rates, ...]:
    """Every pair of rates of some tasks, in the published order: video rates outside, audio inside."""
    pairs = {
        "avsr": [Rates(a, v) for v, a in product(video_rates, audio_rates)],
        "asr": [Rates(audio=a) for a in audio_rates],
        "vsr": [Rates(video=v) for v in video_rates],
    }
    return tuple(rates for task in tasks for rates in pairs[task])


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """The frozen Whisper encoder; the defaults are those of small.en."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    num_mel_bins: int = 80
    trailing_silence: float = 0.0
    """Seconds of silence that the encoder reads after a recording, up to 30 s in all; it makes no tokens."""
    source: str | None = None
    """Folder or Hub id of its weights, in the layout of transformers; None keeps them in the model's own file."""

    def __post_init__(self) -> None:
        _check_transformer("audio", self)
        check_within("audio.num_mel_bins", self.num_mel_bins, 1, 128)
        check_within("audio.trailing_silence", self.trailing_silence, 0.0, 30.0)
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 2:
            raise ConfigError(
                f"audio.hidden_size {self.hidden_size} must be even and a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """The AV-HuBERT visual encoder; the defaults are those of large."""

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    channels: tuple[int, int, int, int] = (64, 128, 256, 512)
    """Channels of the four stages of its ResNet."""
    crop: int = 88
    """Side of the square mouth crop that it reads."""
    shrink: int = 1
    """Squares of so many pixels are averaged first, for a small encoder; `crop` is a multiple."""
    features_only: bool = False
    """The model has no visual encoder: its video comes as states of `hidden_size`, 25 a second, made elsewhere."""
    positions: bool = False
    """Sinusoidal positions are added to its states, for a language model that counts no positions of its own."""
    trained: bool = False
    """Whether training changes it."""
    lora: int = 0
    """Bottleneck of its adapters on queries and values (64 in the paper's lip-reading models), 0 for none."""
    source: str | None = None
    """Folder or Hub id of `avhubert.safetensors`; None keeps the weights in the model's own file."""

    def __post_init__(self) -> None:
        _check_transformer("video", self)
        for channels in self.channels:
            check_within("video.channels", channels, 1, 4096)
        check_within("video.crop", self.crop, 16, 256)
        check_within("video.shrink", self.shrink, 1, 8)
        if self.crop % self.shrink:
            raise ConfigError(f"video.crop {self.crop} must be a multiple of video.shrink {self.shrink}")
        check_within("video.lora", self.lora, 0, 4096)
        if self.positions and self.hidden_size % 2:
            raise ConfigError(f"video.positions need an even video.hidden_size, not {self.hidden_size}")
        if not self.features_only and (self.hidden_size % self.num_attention_heads or self.hidden_size % 16):
            raise ConfigError(
                f"video.hidden_size {self.hidden_size} must be a multiple of 16 and of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.source is not None and self.trained:
            raise ConfigError("a trained visual encoder belongs in the model's own file: no video.source")
        if self.features_only and (self.trained or self.lora or self.source is not None):
            raise ConfigError("video.features_only has no visual encoder, so no trained, lora or source either")


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """The frozen language model; the defaults are those of Llama 3.2-1B but for its long-context positions."""

    model_type: Literal["llama", "qwen2", "qwen3"] = "llama"
    vocab_size: int = 128_256
    hidden_size: int = 2048
    num_hidden_layers: int = 16
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 64
    intermediate_size: int = 8192
    max_position_embeddings: int = 131_072
    rope_parameters: dict[str, int | float | str] = field(
        default_factory=lambda: {"rope_type": "default", "rope_theta": 5e5}
    )
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    """Whether the output projection is the input embedding."""
    attention_bias: bool = False
    """Whether the projections of a Llama's attention have a bias; Qwen has what its type has."""
    mlp_bias: bool = False
    """The same for its feed-forward."""
    hidden_act: str = "silu"
    """Activation of the feed-forward, by its name in transformers."""
    source: str | None = None
    """Folder or Hub id of its weights; None keeps them in the model's own file."""

    def __post_init__(self) -> None:
        if self.hidden_act not in _ACTIVATIONS:
            raise ConfigError(
                f"language_model.hidden_act must be one of {', '.join(_ACTIVATIONS)}, not {self.hidden_act!r}"
            )
        if self.model_type != "llama" and (self.attention_bias or self.mlp_bias):
            raise ConfigError("language_model.attention_bias and mlp_bias are settings of a Llama")
        limits = (
            *(("vocab_size", 1_000_000), ("hidden_size", 16_384), ("num_hidden_layers", 256), ("head_dim", 1024)),
            *(("num_attention_heads", 256), ("num_key_value_heads", 256), ("intermediate_size", 131_072)),
            ("max_position_embeddings", 2_000_000),
        )
        for name, high in limits:
            check_within(f"language_model.{name}", getattr(self, name), 1, high)
        check_within("language_model.rms_norm_eps", self.rms_norm_eps, 1e-12, 1e-2)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"language_model.num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters on queries and values of the language model."""

    strategy: Strategy = "MS"
    bottleneck: int = 64
    scale: float = 0.125
    """Factor of an adapter's output; alpha over the published code's `rank`, which is a divisor of the hidden size."""

    def __post_init__(self) -> None:
        check_within("lora.bottleneck", self.bottleneck, 1, 16_384)
        check_within("lora.scale", self.scale, 1e-4, 100.0)


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How the model decodes unless the call says otherwise; always the same text for the same input.

    A field that is None has the value of the model's `compat`: see `MtskConfig.decoding`.
    """

    beams: int | None = None
    """Width of the beam search; 1 is greedy. None: 1, released 15."""
    max_new_tokens: int | None = None
    """Most tokens for one item. None: 256, released 32, which cuts long utterances."""
    tokens_per_second: float | None = None
    """Most tokens for each second of an item, on top of 16: the most that a model that repeats itself may cost. None:
    12, released no such limit."""
    confidence_threshold: float = 0.9
    """Coarse-to-fine keeps a text whose tokens are this likely on (geometric) average."""
    suppress_tokens: tuple[int, ...] = ()
    """Tokens that are never written, as in transformers' generation config."""

    def __post_init__(self) -> None:
        for name, low, high in (("beams", 1, 64), ("max_new_tokens", 1, 4096), ("tokens_per_second", 0.1, 100.0)):
            if (value := getattr(self, name)) is not None:
                check_within(f"decode.{name}", value, low, high)
        check_within("decode.confidence_threshold", self.confidence_threshold, 1e-6, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """A `DecodeConfig` without open fields; `tokens_per_second` may be infinite."""

    beams: int
    max_new_tokens: int
    tokens_per_second: float
    confidence_threshold: float
    suppress_tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class MtskConfig:
    """A whole model."""

    eos_id: int
    """Token that ends a text."""
    bos_id: int | None = None
    """Token that starts a sequence; Qwen has none."""
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    audio: AudioConfig | None = field(default_factory=AudioConfig)
    """None for a model that only reads lips."""
    video: VideoConfig | None = field(default_factory=VideoConfig)
    """None for a model of audio alone."""
    audio_rates: tuple[int, ...] = (4, 16)
    video_rates: tuple[int, ...] = (2, 5)
    tasks: tuple[Task, ...] = ("avsr",)
    """What the model is trained for; a model of several tasks has scales without audio or without video."""
    compression: Compression = "average"
    projector_hidden_size: int = 2048
    projector_norm: bool = True
    lora: LoraConfig = field(default_factory=LoraConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    compat: Literal["corrected", "released"] = "corrected"
    table: tuple[Measured, ...] = ()
    """Development-set word errors by rates and noise, from which a budget chooses."""

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"tasks must be some of asr, vsr and avsr, each once, not {list(self.tasks)}")
        for name, part, tasks in (("audio", self.audio, {"asr", "avsr"}), ("video", self.video, {"vsr", "avsr"})):
            needed = bool(tasks.intersection(self.tasks))
            rates = getattr(self, f"{name}_rates")
            if (part is not None) != needed or bool(rates) != needed:
                raise ConfigError(f"tasks {list(self.tasks)} need {'an' if needed else 'no'} encoder and rates: {name}")
            if list(rates) != sorted(set(rates)) or any(not 1 <= rate <= 100 for rate in rates):
                raise ConfigError(f"{name}_rates must be ascending and within 1 to 100, not {list(rates)}")
        if self.released and self.audio is not None and self.audio.trailing_silence:
            raise ConfigError("compat='released' fills every recording up to 30 s: no audio.trailing_silence")
        check_within("projector_hidden_size", self.projector_hidden_size, 1, 65_536)
        for name, token in (("eos_id", self.eos_id), ("bos_id", self.bos_id)):
            if token is not None:
                check_within(name, token, 0, self.language_model.vocab_size - 1)
        for token in self.decode.suppress_tokens:
            check_within("decode.suppress_tokens", token, 0, self.language_model.vocab_size - 1)
        if self.eos_id in self.decode.suppress_tokens:
            raise ConfigError("decode.suppress_tokens has eos_id, without which no text ends")
        unknown = [str(line.rates) for line in self.table if line.rates not in self.scales]
        if unknown:
            raise ConfigError(f"table has rates that the model does not have: {', '.join(unknown)}")

    @property
    def scales(self) -> tuple[Rates, ...]:
        """Every pair of rates the model is trained for, in the published order: video rates outside, audio inside."""
        return scales_of(self.tasks, self.audio_rates, self.video_rates)

    @property
    def released(self) -> bool:
        """Whether the model computes what the authors' code computes."""
        return self.compat == "released"

    @property
    def decoding(self) -> Decoding:
        """How the model decodes, with every field of `decode` that is open filled in."""
        own = self.decode
        beams, most, per_second = (15, 32, math.inf) if self.released else (1, 256, 12.0)
        return Decoding(
            beams=beams if own.beams is None else own.beams,
            max_new_tokens=most if own.max_new_tokens is None else own.max_new_tokens,
            tokens_per_second=per_second if own.tokens_per_second is None else own.tokens_per_second,
            confidence_threshold=own.confidence_threshold,
            suppress_tokens=own.suppress_tokens,
        )


_TRANSFORMER = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
}
_VERSION_1: dict[str, dict[str, str]] = {
    "audio": _TRANSFORMER | {"bins": "num_mel_bins"},
    "video": _TRANSFORMER,
    "language_model": _TRANSFORMER
    | {
        "family": "model_type",
        "kv_heads": "num_key_value_heads",
        "positions": "max_position_embeddings",
        "rope": "rope_parameters",
        "norm_eps": "rms_norm_eps",
        "tied": "tie_word_embeddings",
    },
}


def upgraded(fields: dict[str, Any], version: int) -> dict[str, Any]:
    """The plain data of a configuration of format 1 under today's names; unknown names stay, so that they raise."""
    if version > 1:
        return fields
    out = {{"projector_width": "projector_hidden_size"}.get(name, name): value for name, value in fields.items()}
    for part, names in _VERSION_1.items():
        if isinstance(out.get(part), dict):
            out[part] = {names.get(name, name): value for name, value in out[part].items()}
    return out


def _check_transformer(part: str, sizes: AudioConfig | VideoConfig) -> None:
    limits = {"hidden_size": 4096, "num_hidden_layers": 64, "num_attention_heads": 64, "intermediate_size": 16_384}
    for name, high in limits.items():
        check_within(f"{part}.{name}", getattr(sizes, name), 1, high)


__getattr__ = deprecated(__name__, {"MTSKConfig": "MtskConfig"})
