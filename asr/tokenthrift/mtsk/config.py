"""What a Llama-MTSK model is made of and how it decodes, as plain data.

Source: Llama-MTSK (arXiv 2503.06362), sections 3 and 4.1; the defaults are its audio-visual setting with Whisper small,
AV-HuBERT large and Llama 3.2-1B. `compat="released"` computes what the authors' code computes, mistakes included; each
place where the two differ says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

from tokenthrift.config import ConfigError, check_within
from tokenthrift.mtsk.compression import Compression
from tokenthrift.mtsk.lora import Strategy
from tokenthrift.mtsk.rates import Measured, Rates

__all__ = [
    "AudioConfig",
    "DecodeConfig",
    "LanguageModelConfig",
    "LoraConfig",
    "MTSKConfig",
    "Task",
    "VideoConfig",
    "scales_of",
]

Task = Literal["asr", "vsr", "avsr"]


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

    width: int = 768
    layers: int = 12
    heads: int = 12
    ffn: int = 3072
    bins: int = 80
    source: str | None = None
    """Folder or Hub id of its weights, in the layout of transformers; None keeps them in the model's own file."""

    def __post_init__(self) -> None:
        for name, high in (("width", 4096), ("layers", 64), ("heads", 64), ("ffn", 16_384), ("bins", 128)):
            check_within(f"audio.{name}", getattr(self, name), 1, high)
        if self.width % self.heads or self.width % 2:
            raise ConfigError(f"audio.width {self.width} must be even and a multiple of heads {self.heads}")


@dataclass(frozen=True, kw_only=True)
class VideoConfig:
    """The AV-HuBERT visual encoder; the defaults are those of large."""

    width: int = 1024
    layers: int = 24
    heads: int = 16
    ffn: int = 4096
    channels: tuple[int, int, int, int] = (64, 128, 256, 512)
    """Of the four stages of its ResNet."""
    crop: int = 88
    """Side of the square mouth crop that it reads."""
    trained: bool = False
    """Whether training changes it."""
    lora: int = 0
    """Bottleneck of its adapters on queries and values (64 in the paper's lip-reading models), 0 for none."""
    source: str | None = None
    """Folder or Hub id of `avhubert.safetensors`; None keeps the weights in the model's own file."""

    def __post_init__(self) -> None:
        for name, high in (("width", 4096), ("layers", 64), ("heads", 64), ("ffn", 16_384)):
            check_within(f"video.{name}", getattr(self, name), 1, high)
        for channels in self.channels:
            check_within("video.channels", channels, 1, 4096)
        check_within("video.crop", self.crop, 16, 256)
        check_within("video.lora", self.lora, 0, 4096)
        if self.width % self.heads or self.width % 16:
            raise ConfigError(f"video.width {self.width} must be a multiple of 16 and of heads {self.heads}")
        if self.source is not None and self.trained:
            raise ConfigError("a trained visual encoder belongs in the model's own file: no video.source")


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """The frozen language model; the defaults are those of Llama 3.2-1B but for its long-context positions."""

    family: Literal["llama", "qwen2", "qwen3"] = "llama"
    vocab_size: int = 128_256
    width: int = 2048
    layers: int = 16
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    ffn: int = 8192
    positions: int = 131_072
    rope: dict[str, int | float | str] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 5e5})
    """`rope_parameters` of transformers."""
    norm_eps: float = 1e-5
    tied: bool = True
    """Whether the output projection is the input embedding."""
    source: str | None = None
    """Folder or Hub id of its weights; None keeps them in the model's own file."""

    def __post_init__(self) -> None:
        limits = (("vocab_size", 1_000_000), ("width", 16_384), ("layers", 256), ("heads", 256), ("kv_heads", 256))
        for name, high in (*limits, ("head_dim", 1024), ("ffn", 131_072), ("positions", 2_000_000)):
            check_within(f"language_model.{name}", getattr(self, name), 1, high)
        check_within("language_model.norm_eps", self.norm_eps, 1e-12, 1e-2)
        if self.heads % self.kv_heads:
            raise ConfigError(f"language_model.heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters on queries and values of the language model."""

    strategy: Strategy = "MS"
    """One for all scales (MS), one per scale (SS), or both (MSS)."""
    bottleneck: int = 64
    scale: float = 0.125
    """Factor of an adapter's output; alpha over the published code's `rank`, which is a divisor of the width."""

    def __post_init__(self) -> None:
        check_within("lora.bottleneck", self.bottleneck, 1, 16_384)
        check_within("lora.scale", self.scale, 1e-4, 100.0)


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How the model decodes unless the call says otherwise; always the same text for the same input."""

    beams: int = 1
    """Width of the beam search (15 in the paper); 1 takes the likeliest token each time."""
    max_new_tokens: int = 256
    """Most tokens for one item (32 in the paper, which cuts long utterances)."""
    tokens_per_second: float = 12.0
    """Most tokens for each second of an item, on top of 16: what a model that repeats itself may cost."""
    confidence_threshold: float = 0.9
    """Coarse-to-fine keeps a text whose tokens are this likely on (geometric) average."""

    def __post_init__(self) -> None:
        check_within("decode.beams", self.beams, 1, 64)
        check_within("decode.max_new_tokens", self.max_new_tokens, 1, 4096)
        check_within("decode.tokens_per_second", self.tokens_per_second, 0.1, 100.0)
        check_within("decode.confidence_threshold", self.confidence_threshold, 1e-6, 1.0)


@dataclass(frozen=True, kw_only=True)
class MTSKConfig:
    """A whole model."""

    eos_id: int
    """Token that ends a text."""
    bos_id: int | None = None
    """Token that starts a sequence; Qwen has none."""
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    audio: AudioConfig | None = field(default_factory=AudioConfig)
    """None for a model that only reads lips."""
    video: VideoConfig | None = field(default_factory=VideoConfig)
    """None for a model that only listens."""
    audio_rates: tuple[int, ...] = (4, 16)
    video_rates: tuple[int, ...] = (2, 5)
    tasks: tuple[Task, ...] = ("avsr",)
    """What the model is trained for; a model of several tasks has scales without audio or without video."""
    compression: Compression = "average"
    projector_width: int = 2048
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
        check_within("projector_width", self.projector_width, 1, 65_536)
        for name, token in (("eos_id", self.eos_id), ("bos_id", self.bos_id)):
            if token is not None:
                check_within(name, token, 0, self.language_model.vocab_size - 1)
        unknown = [str(line.rates) for line in self.table if line.rates not in self.scales]
        if unknown:
            raise ConfigError(f"table has rates that the model has not: {', '.join(unknown)}")

    @property
    def scales(self) -> tuple[Rates, ...]:
        """Every pair of rates the model is trained for, in the published order: video rates outside, audio inside."""
        return scales_of(self.tasks, self.audio_rates, self.video_rates)

    @property
    def released(self) -> bool:
        """Whether the model computes what the authors' code computes."""
        return self.compat == "released"
